"""Export of a pipeline as an original checkpoint: `save_compvis`, and the configuration that belongs to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.compvis.architecture import complete_unet_params
from diffusers_ddpm_ext.compvis.export_stages import (
    bare_first_stage,
    has_stages,
    read_facts,
    stage_params,
    stage_tensors,
    subclass,
)
from diffusers_ddpm_ext.compvis.first_stage.arguments import original_config
from diffusers_ddpm_ext.compvis.first_stage.weights import export_first_stage
from diffusers_ddpm_ext.compvis.reader.archive import PathLike, read_tensors
from diffusers_ddpm_ext.compvis.schema import COMPVIS_EMA_DECAY, FIXED_LOGVAR, REPORT_FILE
from diffusers_ddpm_ext.compvis.state_dict import EMA_DECAY_KEY, EMA_NUM_UPDATES_KEY, SAVED_TABLES, CheckpointContents
from diffusers_ddpm_ext.compvis.unet_params import is_same_network, unet_params_of
from diffusers_ddpm_ext.compvis.weights import (
    EMA_PREFIX,
    UNET_PREFIXES,
    ConvertedTensor,
    ema_buffer_names,
    export_unet,
    is_unchanged,
    resamples_without_weights,
)
from diffusers_ddpm_ext.compvis.wrapper_names import plain_keys
from diffusers_ddpm_ext.diffusion.schedule import make_betas
from diffusers_ddpm_ext.losses.logvar import make_logvar
from diffusers_ddpm_ext.models.ema_metadata import EmaMetadata, load_ema_metadata
from diffusers_ddpm_ext.pipelines.pipeline_ddpm_ext import DDPMExtPipeline
from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler
from diffusers_ddpm_ext.utils.files import write_atomically
from diffusers_ddpm_ext.utils.generations import read_one_generation
from diffusers_ddpm_ext.utils.vocabulary import TO_COMPVIS_BETA_SCHEDULE, TO_COMPVIS_PREDICTION_TYPE
from diffusers_ddpm_ext.utils.wrappers import unwrap

DDPM_TARGET, LATENT_TARGET = "ldm.models.diffusion.ddpm.DDPM", "ldm.models.diffusion.ddpm.LatentDiffusion"
UNET_TARGET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
# Options that only Stability's UNetModel takes.
STABILITY_ONLY = (
    "use_bf16", "disable_self_attentions", "num_attention_blocks", "disable_middle_self_attn",
    "use_linear_in_transformer", "adm_in_channels",
)  # fmt: skip
HEAD_OPTIONS = ("num_heads", "num_head_channels", "num_heads_upsample", "legacy")
RAW_WEIGHT_FILES = ("diffusion_pytorch_model.raw.safetensors", "diffusion_pytorch_model.safetensors.index.raw.json")


@dataclass(frozen=True)
class ExportSource:
    """A pipeline to export, with both sets of weights if it has two.

    Attributes:
        pipeline: with the default weights.
        raw: the network with the raw weights; None if there is only one set.
        ema: decay and number of updates of the EMA, if known.
        facts: what ``conversion.json`` tells of the checkpoint that it was converted from; empty without one.
        weights: both sets of the checkpoint that it was loaded from, and the rows of its network then.
    """

    pipeline: DDPMExtPipeline
    raw: nn.Module | None
    ema: EmaMetadata | None
    facts: Mapping[str, Any] = field(default_factory=dict)
    weights: tuple[CheckpointContents, list[ConvertedTensor]] | None = None


def save_compvis(
    pipeline_or_folder: DDPMExtPipeline | nn.Module | PathLike,
    path: PathLike,
    base: PathLike | None = None,
    use_ema: bool = True,
) -> None:
    """Write a checkpoint that the original classes load with ``strict=True``, given the same configuration.

    Args:
        pipeline_or_folder: a pipeline, or the folder of one. The other set of weights (raw beside EMA) and the number
            of updates are included: from the folder, or as long as its network is unchanged, from the checkpoint that
            `load_compvis` read. An autoencoder, or the folder of one, is written as the original's autoencoder.
        path: ``.ckpt``, ``.pt`` or ``.pth``: ``{"state_dict": ...}``, read by ``torch.load(weights_only=True)``. It is
            written atomically.
        base: an original checkpoint, whose tensors that the pipeline does not have, such as a text encoder, or the
            part of one that conditioning does not use, are copied.
        use_ema: write ``model_ema.*`` too; if there is a single set of weights, a copy of them with 0 updates.

    Raises:
        ValueError: the original's classes cannot express something; the message names it.
        OSError: the file cannot be written.
    """
    target = Path(path)
    if target.suffix not in (".ckpt", ".pt", ".pth"):
        raise ValueError(f"path is {target.name}; the name of an original checkpoint must end in .ckpt, .pt or .pth.")
    stage, other = bare_first_stage(pipeline_or_folder), read_base(base)
    if stage is None:
        state = compvis_state_dict(_export_source(pipeline_or_folder), use_ema, other)
    else:
        state = _on_cpu(export_first_stage(*stage))
    if base is not None:
        state = _with_base(state, other, Path(base).name)
    write_atomically(target, lambda file: torch.save({"state_dict": state}, file), make_parents=False, fsync=True)


def _export_source(source: DDPMExtPipeline | nn.Module | PathLike) -> ExportSource:
    if isinstance(source, nn.Module):
        raise ValueError(f"{type(source).__name__} is neither a pipeline nor an autoencoder, which can be exported.")
    if isinstance(source, DDPMExtPipeline):
        facts, weights = (getattr(source, f"compvis_{name}", None) for name in ("facts", "weights"))
        return ExportSource(source, None, None, facts or {}, weights)
    return read_one_generation(Path(source), _read_source)


def _read_source(folder: Path) -> ExportSource:
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is not the folder of a pipeline: it has no model_index.json.")
    pipeline = DDPMExtPipeline.from_pretrained(folder)
    raw = None
    if any((folder / "unet" / name).is_file() for name in RAW_WEIGHT_FILES):
        raw = type(pipeline.unet).from_pretrained(folder, subfolder="unet", variant="raw")
    return ExportSource(pipeline, raw, load_ema_metadata(folder), read_facts(folder))


def _params(source: ExportSource) -> dict[str, Any]:
    """Arguments of the UNetModel to export to: its original ones, if it is the same network as then.

    What only Stability's UNetModel takes is left out where it is the default, so that CompVis' own takes the rest.
    """
    network = unwrap(source.pipeline.unet)
    if resamples_without_weights(network):
        raise ValueError(
            "conv_resample false cannot be exported: this network was converted from one that resamples without "
            "weights, and has convolutions in their place."
        )
    params, original = unet_params_of(network), source.facts.get("unet_params")
    if original is not None:
        if not isinstance(original, Mapping):
            raise ValueError(f"{REPORT_FILE} has unet_params that are not an object: convert the checkpoint again.")
        complete = complete_unet_params(original)
        params["use_new_attention_order"] = bool(complete["use_new_attention_order"])
        if is_same_network(complete, network):
            params |= {name: complete[name] for name in HEAD_OPTIONS}
    options = complete_unet_params(params)
    defaults = {name for name in STABILITY_ONLY if not np.any(options[name])}
    return {name: value for name, value in params.items() if name not in defaults}


def read_base(base: PathLike | None) -> dict[str, Tensor]:
    """Tensors of another original checkpoint by its keys without wrappers; none for None.

    Raises:
        ValueError: the file cannot be read.
    """
    if base is None:
        return {}
    tensors = read_tensors(base)
    return {name: tensors[key] for name, key in plain_keys(tensors).items()}


def compvis_state_dict(
    source: ExportSource, use_ema: bool = True, base: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors of a pipeline by the original's keys, on the CPU, contiguous, not sharing memory.

    Raises:
        ValueError: as in `save_compvis`.
    """
    pipeline = source.pipeline
    scheduler = pipeline.scheduler
    if not isinstance(scheduler, DDPMExtScheduler):
        raise ValueError(
            f"The scheduler is a {type(scheduler).__name__}; only a DDPMExtScheduler has the original's tables: use "
            "pipeline.scheduler = DDPMExtScheduler.from_config(pipeline.scheduler.config)."
        )
    if pipeline.config.get("use_positional_encodings"):
        raise ValueError("use_positional_encodings cannot be exported: the original's classes do not provide them.")
    _check_variance(scheduler)
    params = _params(source)
    raw, ema, metadata = _weight_sets(source, params)
    state = {UNET_PREFIXES[0] + name: tensor for name, tensor in raw.items()}
    if use_ema:
        state[EMA_DECAY_KEY] = torch.tensor(metadata.decay, dtype=torch.float32)
        state[EMA_NUM_UPDATES_KEY] = torch.tensor(metadata.num_updates, dtype=torch.int)
        state |= {buffer: ema[key] for buffer, key in ema_buffer_names(params).items()}
    state |= {name: getattr(scheduler, name) for name in SAVED_TABLES}
    state |= stage_tensors(pipeline, source.facts, base or _own_base(source))
    logvar = source.facts.get(FIXED_LOGVAR) if pipeline.logvar is None else pipeline.logvar
    if logvar is not None:
        state["logvar"] = make_logvar(len(scheduler.schedule), torch.as_tensor(logvar))
    return _on_cpu(state)


def _own_base(source: ExportSource) -> dict[str, Tensor]:
    """Conditioning stages of the checkpoint that a pipeline was loaded from, float32; none for one from a folder."""
    if source.weights is None:
        return {}
    stages = source.weights[0].conditioners
    return {
        prefix + name: tensor.float() if tensor.is_floating_point() else tensor
        for prefix, tensors in stages.items()
        for name, tensor in tensors.items()
    }


def _on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def _weight_sets(
    source: ExportSource, params: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor], EmaMetadata]:
    """Raw weights, EMA, its metadata: of the folder, or of the checkpoint if the network is unchanged since."""
    own = export_unet(source.pipeline.unet, params)
    if source.raw is not None:
        return export_unet(source.raw, params), own, source.ema or EmaMetadata(COMPVIS_EMA_DECAY, 0)
    if source.weights is not None:
        contents, rows = source.weights
        if contents.raw and contents.ema and is_unchanged(source.pipeline.unet, rows):
            raw, ema = ({k: tensor.float() for k, tensor in kind.items()} for kind in (contents.raw, contents.ema))
            return raw, ema, contents.ema_metadata
    return own, own, EmaMetadata(COMPVIS_EMA_DECAY, 0)


def _check_variance(scheduler: DDPMExtScheduler) -> None:
    """Refuse per-step reverse variances: the original has a single ``v_posterior``."""
    if not isinstance(scheduler.schedule.v_posterior, float) or scheduler.schedule.v_decoder is not None:
        raise ValueError(
            "v_posterior is a table, which cannot be exported: the original has a single value. Give the pipeline a "
            "scheduler with one (DDPMExtScheduler.from_config(config, v_posterior=1.0, v_decoder=None)), or undo the "
            "fit: ddpm-ext fit-variance FOLDER --undo."
        )


def compvis_config(
    pipeline_or_folder: DDPMExtPipeline | nn.Module | PathLike, use_ema: bool = True, base: PathLike | None = None
) -> dict[str, Any]:
    """The content of the YAML file that belongs to `save_compvis`' checkpoint: of LatentDiffusion, or its base class.

    Betas without a name there (see `has_named_betas`) are not in it, since a YAML file cannot give the class an array:
    the class takes them from the checkpoint.

    Args:
        pipeline_or_folder: as in `save_compvis`.
        use_ema: as in `save_compvis`.
        base: as in `save_compvis`: the class of its text encoder is that of the pipeline's, where none is recorded.

    Raises:
        ValueError: as in `save_compvis`.
    """
    stage = bare_first_stage(pipeline_or_folder)
    if stage is not None:
        return {"model": original_config(*stage).section}
    source = _export_source(pipeline_or_folder)
    pipeline = source.pipeline
    _check_variance(pipeline.scheduler)
    config, size = pipeline.scheduler.config, pipeline.unet.config.sample_size
    fixed = source.facts.get(FIXED_LOGVAR, 0.0)
    params: dict[str, Any] = {
        **_schedule_params(pipeline.scheduler)[0],
        "v_posterior": pipeline.scheduler.schedule.v_posterior,
        "parameterization": TO_COMPVIS_PREDICTION_TYPE[config.prediction_type],
        "clip_denoised": config.clip_sample,
        "learn_logvar": pipeline.logvar is not None,
        "logvar_init": float(fixed) if isinstance(fixed, int | float) else 0.0,
        "use_ema": use_ema,
        "conditioning_key": pipeline.config.get("conditioning_key"),
        **({} if size is None else {"image_size": size}),
        "channels": pipeline.unet.config.out_channels,
        "unet_config": {"target": UNET_TARGET, "params": _params(source)},
    }
    other = read_base(base)
    if not has_stages(pipeline, source.facts, other):
        return {"model": {"target": DDPM_TARGET, "params": params}}
    target, own = subclass(source.facts) or (LATENT_TARGET, {})
    return {"model": {"target": target, "params": params | own | stage_params(pipeline, source.facts, other)}}


def has_named_betas(pipeline_or_folder: DDPMExtPipeline | PathLike) -> bool:
    """Whether a ``beta_schedule`` of the original gives the pipeline's betas; else only the checkpoint has them."""
    if bare_first_stage(pipeline_or_folder) is not None:
        return True  # it has none
    return _schedule_params(_export_source(pipeline_or_folder).pipeline.scheduler)[1]


def _schedule_params(scheduler: DDPMExtScheduler) -> tuple[dict[str, Any], bool]:
    """The original's parameters of the schedule, and whether they give its betas; else they give the same length."""
    config, betas = scheduler.config, scheduler.schedule.betas
    inside = np.clip(betas[[0, -1]], 1e-8, 1 - 1e-8).tolist()
    names = [(config.beta_schedule, config.beta_start, config.beta_end, config.cosine_s)]
    names += [("scaled_linear", *inside, 0.008), ("linear", *inside, 0.008), ("squaredcos_cap_v2", *inside, 0.008)]
    names += [("sqrt", *np.square(inside).tolist(), 0.008)]
    named = [each for each in names if each[0] in TO_COMPVIS_BETA_SCHEDULE]
    same = (each for each in named if np.allclose(make_betas(each[0], len(betas), *each[1:]), betas, 1e-6, atol=0))
    match = next(same, None)
    name, start, end, cosine_s = match or named[0]
    return {
        "timesteps": len(betas),
        "beta_schedule": TO_COMPVIS_BETA_SCHEDULE[name],
        "linear_start": start,
        "linear_end": end,
        "cosine_s": cosine_s,
    }, match is not None


def _with_base(state: dict[str, Tensor], other: Mapping[str, Tensor], base: str) -> dict[str, Tensor]:
    """Add the tensors of another checkpoint, ``base``, that the pipeline does not have."""
    ours = (*UNET_PREFIXES, EMA_PREFIX, "logvar", *SAVED_TABLES)
    for name in state.keys() & other.keys():
        if state[name].shape != other[name].shape:
            raise ValueError(
                f"base {base} belongs to another model: its {name} has shape "
                f"{tuple(other[name].shape)}, this pipeline's {tuple(state[name].shape)}."
            )
    return {**{name: tensor for name, tensor in other.items() if not name.startswith(ours)}, **state}

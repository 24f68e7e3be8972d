"""Original checkpoints out: `save_compvis` writes what the original classes load."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.compvis.reader.archive import read_tensors
from diffusers_ddpm_ext.compvis.state_dict import CLASS_EMBEDDING, TABLES
from diffusers_ddpm_ext.compvis.unet_params import unet_params_of
from diffusers_ddpm_ext.compvis.weights import EMA, PREFIXES, ema_names, export_unet, is_synthetic
from diffusers_ddpm_ext.models.ema import EmaMetadata, load_ema_metadata
from diffusers_ddpm_ext.pipelines.pipeline_ddpm_ext import DDPMExtPipeline
from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler
from diffusers_ddpm_ext.utils.files import write_atomically
from diffusers_ddpm_ext.utils.vocabulary import TO_COMPVIS_BETA_SCHEDULE, TO_COMPVIS_PREDICTION_TYPE

PATH = str | os.PathLike[str]
DDPM = "ldm.models.diffusion.ddpm.DDPM"
UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
RAW_FILES = ("diffusion_pytorch_model.raw.safetensors", "diffusion_pytorch_model.safetensors.index.raw.json")


@dataclass(frozen=True)
class Sides:
    """The two sets of weights of a pipeline.

    Attributes:
        pipeline: with the default ones.
        raw: the network with the raw ones, None where there is one set only.
        ema: of the average, None where nothing is known of it.
        unet_params: of the UNetModel that it came from, None where nothing is known of it.
    """

    pipeline: DDPMExtPipeline
    raw: nn.Module | None
    ema: EmaMetadata | None
    unet_params: Mapping[str, Any] | None = None


def save_compvis(
    pipeline_or_folder: DDPMExtPipeline | PATH, path: PATH, base: PATH | None = None, use_ema: bool = True
) -> None:
    """Write a checkpoint that the original classes load, with ``strict=True`` where its configuration is the same.

    Args:
        pipeline_or_folder: a pipeline, or the folder of one, whose raw weights and count of updates go along.
        path: ``.ckpt``, ``.pt`` or ``.pth``: ``{"state_dict": ...}``, read by ``torch.load(weights_only=True)``. It
            appears whole, or not at all.
        base: the original checkpoint of a LatentDiffusion, whose first stage, conditioning stage and scale factor are
            carried over; without it a LatentDiffusion misses these.
        use_ema: write ``model_ema.*`` too. Of a single set of weights it is a copy of them with count 0.

    Raises:
        ValueError: something has no place in the original's classes, by name.
        OSError: the file cannot be written.
    """
    target = Path(path)
    if target.suffix not in (".ckpt", ".pt", ".pth"):
        raise ValueError(f"path is {target.name}; an original checkpoint's name ends in .ckpt, .pt or .pth.")
    state = state_dict_of(_sides(pipeline_or_folder), use_ema)
    if base is not None:
        state = _with_base(state, base)
    write_atomically(target, lambda file: torch.save({"state_dict": state}, file), make_parents=False, fsync=True)


def _sides(source: DDPMExtPipeline | PATH) -> Sides:
    if isinstance(source, DDPMExtPipeline):
        return Sides(source, None, None, getattr(source, "compvis_params", None))
    folder = Path(source)
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is not the folder of a pipeline: it holds no model_index.json.")
    pipeline = DDPMExtPipeline.from_pretrained(folder)
    raw = None
    if any((folder / "unet" / name).is_file() for name in RAW_FILES):
        raw = type(pipeline.unet).from_pretrained(folder, subfolder="unet", variant="raw")
    return Sides(pipeline, raw, load_ema_metadata(folder), _params_in(folder))


def _params_in(folder: Path) -> Mapping[str, Any] | None:
    """UNetModel's arguments, where the folder is a converted one."""
    try:
        params = json.loads((folder / "conversion.json").read_text(encoding="utf-8"))["facts"]["unet_params"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return params if isinstance(params, dict) else None


def _params(sides: Sides) -> dict[str, Any]:
    """Arguments of the UNetModel that the weights go back to: with its own order of heads, where that is known."""
    params = unet_params_of(sides.pipeline.unet)
    if is_synthetic(sides.pipeline.unet):
        raise ValueError(
            "conv_resample false does not go back: this network came from one that resamples without weights, and the "
            "convolutions that stand for that are no part of it."
        )
    new_order = bool((sides.unet_params or {}).get("use_new_attention_order", False))
    return params | {"use_new_attention_order": new_order}


def state_dict_of(sides: Sides, use_ema: bool = True) -> dict[str, Tensor]:
    """The tensors of a pipeline under the original's names.

    Args:
        sides: the weights.
        use_ema: as in `save_compvis`.

    Returns:
        Name to tensor, on the CPU, contiguous, none sharing memory with another.

    Raises:
        ValueError: as in `save_compvis`.
    """
    pipeline = sides.pipeline
    scheduler = pipeline.scheduler
    if not isinstance(scheduler, DDPMExtScheduler):
        raise ValueError(
            f"The scheduler is a {type(scheduler).__name__}; the original's tables are a DDPMExtScheduler's: "
            "pipeline.scheduler = DDPMExtScheduler.from_config(pipeline.scheduler.config)."
        )
    if pipeline.config.get("use_positional_encodings"):
        raise ValueError("use_positional_encodings does not go back: the original's classes cannot feed them.")
    _check_dial(scheduler)
    params = _params(sides)
    default = export_unet(pipeline.unet, params)
    raw = default if sides.raw is None else export_unet(sides.raw, params)
    state = {PREFIXES[0] + name: tensor for name, tensor in raw.items()}
    if use_ema:
        facts = sides.ema if sides.raw is not None and sides.ema is not None else EmaMetadata(0.9999, 0)
        state[f"{EMA}decay"] = torch.tensor(facts.decay, dtype=torch.float32)
        state[f"{EMA}num_updates"] = torch.tensor(facts.num_updates, dtype=torch.int)
        state |= {source: default[name] for source, name in ema_names(params).items()}
    state |= {name: getattr(scheduler, name) for name in TABLES}
    if pipeline.logvar is not None:
        state["logvar"] = pipeline.logvar
    embedder = getattr(pipeline, "class_embedder", None)
    if embedder is not None:
        state[CLASS_EMBEDDING] = embedder
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def _check_dial(scheduler: DDPMExtScheduler) -> None:
    """The original has one number for the reverse variance of all steps, and no learned ones."""
    if not isinstance(scheduler.schedule.v_posterior, float) or scheduler.schedule.v_decoder is not None:
        raise ValueError(
            "v_posterior is a table, which does not go back: the original has one number. Give the pipeline a "
            "scheduler with one (DDPMExtScheduler.from_config(config, v_posterior=1.0, v_decoder=None)), or undo the "
            "fit: ddpm-ext fit-variance FOLDER --undo."
        )


def configuration_of(pipeline_or_folder: DDPMExtPipeline | PATH) -> dict[str, Any]:
    """The configuration that belongs to what `save_compvis` writes.

    Args:
        pipeline_or_folder: a pipeline, or the folder of one.

    Returns:
        The content of a YAML file of the original's base class.

    Raises:
        ValueError: as in `save_compvis`, or the schedule has no word there.
    """
    sides = _sides(pipeline_or_folder)
    pipeline = sides.pipeline
    _check_dial(pipeline.scheduler)
    config = pipeline.scheduler.config
    params: dict[str, Any] = {
        "timesteps": config.num_train_timesteps,
        "beta_schedule": TO_COMPVIS_BETA_SCHEDULE.get(config.beta_schedule, config.beta_schedule),
        "linear_start": config.beta_start,
        "linear_end": config.beta_end,
        "cosine_s": config.cosine_s,
        "v_posterior": pipeline.scheduler.schedule.v_posterior,
        "parameterization": TO_COMPVIS_PREDICTION_TYPE[config.prediction_type],
        "clip_denoised": config.clip_sample,
        "learn_logvar": pipeline.logvar is not None,
        "conditioning_key": pipeline.config.get("conditioning_key"),
        "image_size": pipeline.unet.config.sample_size,
        "channels": pipeline.unet.config.out_channels,
        "unet_config": {"target": UNET, "params": _params(sides)},
    }
    if config.trained_betas is not None or config.beta_schedule not in TO_COMPVIS_BETA_SCHEDULE:
        params["given_betas"] = [float(beta) for beta in pipeline.scheduler.schedule.betas]
    return {"model": {"target": DDPM, "params": params}}


def _with_base(state: dict[str, Tensor], base: PATH) -> dict[str, Tensor]:
    """Add what another checkpoint holds beside the network."""
    ours = (*PREFIXES, EMA, "logvar", *TABLES)
    other = read_tensors(base)
    for name in state.keys() & other.keys():
        if state[name].shape != other[name].shape:
            raise ValueError(
                f"base {Path(base).name} is of another model: its {name} has shape {tuple(other[name].shape)}, this "
                f"pipeline's {tuple(state[name].shape)}."
            )
    return {**{name: tensor for name, tensor in other.items() if not name.startswith(ours)}, **state}

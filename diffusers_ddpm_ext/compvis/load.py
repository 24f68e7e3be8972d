"""Loading of original checkpoints: `load_compvis`. The inverse is `diffusers_ddpm_ext.compvis.save`.

Defects of the original's loading are fixed: a learned logvar is loaded, the configuration's schedule wins over the
file's (with a warning if they differ), `load_only_unet` works for every class, prefixes in `ignore_keys` may overlap,
and a missing EMA is not left at random weights.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffusers_ddpm_ext.compvis.checkpoint import CompVisCheckpoint
from diffusers_ddpm_ext.compvis.conditioner.kinds import STAGE_PREFIXES
from diffusers_ddpm_ext.compvis.config.ddpm import (
    FIRST_STAGE,
    FIRST_STAGE_AS_CONDITION,
    CompVisConfig,
    read_compvis_config,
)
from diffusers_ddpm_ext.compvis.first_stage.architecture import KINDS, FirstStageConfig, read_first_stage
from diffusers_ddpm_ext.compvis.first_stage.checkpoint_keys import FIRST_STAGE_PREFIX, KnownStages
from diffusers_ddpm_ext.compvis.first_stage.weights import first_stage_keys
from diffusers_ddpm_ext.compvis.load_conditioners import (
    ConditioningStages,
    conditioner_configs,
    prepare_tokenizer,
    with_config_of_tokenizer,
)
from diffusers_ddpm_ext.compvis.load_notes import (
    check_classes,
    foreign_classes,
    foreign_first_stage,
    logvar_notes,
    stage_notes,
)
from diffusers_ddpm_ext.compvis.load_options import LoadOptions, ScheduleSource, WeightChoice, WeightSet
from diffusers_ddpm_ext.compvis.reader.archive import PathLike, read_tensors
from diffusers_ddpm_ext.compvis.report import Report
from diffusers_ddpm_ext.compvis.schema import one_line
from diffusers_ddpm_ext.compvis.state_dict import classify_tensors, describe_schedule_difference
from diffusers_ddpm_ext.compvis.weights import ConvertedTensor
from diffusers_ddpm_ext.compvis.wrapper_names import plain_keys
from diffusers_ddpm_ext.pipelines.pipeline_ddpm_ext import DDPMExtPipeline
from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler

logger = logging.getLogger(__name__)


def load_compvis(
    path: PathLike,
    config: PathLike | Mapping[str, Any],
    *,
    weights: WeightChoice = "auto",
    ignore_keys: Iterable[str] = (),
    load_only_unet: bool = False,
    schedule_from: ScheduleSource = "config",
    tokenizer: Any = None,
    text_heads: int | None = None,
) -> DDPMExtPipeline:
    """Load an original checkpoint as a pipeline. Nothing that a file names is imported or executed.

    Args:
        path: ``.ckpt``, ``.pt``, ``.pth`` or ``.safetensors``, or the index of its shards.
        config: the YAML file that belongs to it, or its content.
        weights: ``raw``, ``ema``, or ``auto``: EMA if the file has it, else raw; the choice is logged.
        ignore_keys: prefixes of keys in the file that are left out. Parts of the network that have no weights because
            of this are re-initialized, with a warning.
        load_only_unet: load the network only, without logvar.
        schedule_from: ``config``, with a warning if the file holds a different schedule, or ``checkpoint``.
        tokenizer: of the text encoder, which no checkpoint has: of Transformers, a folder, or an id on the Hub. It is
            set to pad and cut prompts as the original does. A ``config.json`` of the encoder in its folder, or in
            ``text_encoder`` beside it, tells the number of attention heads.
        text_heads: number of attention heads of a CLIP text encoder, which no checkpoint tells; by default that of the
            ``config.json`` in the folder that ``version`` names, or beside the tokenizer, else width / 64.

    Returns:
        The pipeline; ``.unet`` is the Diffusers network, ``.vae`` the first stage if the file has it, with the scale
        of the latents, ``.text_encoder``, ``.concat_encoder`` and ``.image_encoder`` its conditioning stages, all
        float32, in eval mode. Stages of other classes are left out: pass their output.

    Raises:
        ValueError: an argument is not one of the allowed values, the file cannot be read, or it does not belong to the
            configuration: missing and unexpected keys are listed.
    """
    prefixes = (ignore_keys,) if isinstance(ignore_keys, str) else tuple(ignore_keys)
    options = LoadOptions(weights, prefixes, load_only_unet, schedule_from, text_heads)
    checkpoint = read_compvis_checkpoint(path, config, options, tokenizer)
    for note in checkpoint.notes:
        warnings.warn(note, stacklevel=2)
    for note in checkpoint.conditioning.notes:
        logger.warning("%s: %s", path, note)
    which = choose_weights(checkpoint, weights)
    if weights == "auto":
        other = "" if which == "ema" and checkpoint.weights("raw") else "the only ones in the file; "
        logger.warning('%s: %sthe pipeline has its %s weights (weights="%s").', path, other, which.upper(), which)
    return checkpoint.pipeline(*checkpoint.network(which))


def choose_weights(checkpoint: CompVisCheckpoint, weights: WeightChoice) -> WeightSet:
    """Choose a set of weights of a checkpoint.

    Raises:
        ValueError: the file does not have the requested weights.
    """
    which: WeightSet = ("ema" if checkpoint.weights("ema") else "raw") if weights == "auto" else weights
    if not checkpoint.weights(which):
        available = "EMA" if which == "raw" else "raw"
        raise ValueError(f'weights is "{which}", but the checkpoint has {available} weights only: use weights="auto".')
    return which


def read_compvis_checkpoint(
    path: PathLike, config: PathLike | Mapping[str, Any], options: LoadOptions, tokenizer: Any = None
) -> CompVisCheckpoint:
    """Read a checkpoint and its configuration; see `load_compvis` for arguments and errors."""
    translated = read_compvis_config(config, for_training=False)
    tensors = read_tensors(path)
    first_stage = _first_stage_config(translated, tensors, options)
    conditioners, more_notes = conditioner_configs(translated, tensors, options)
    tokenizer, tokenizer_notes = prepare_tokenizer(tokenizer, conditioners)
    conditioners = with_config_of_tokenizer(conditioners, tokenizer)
    stages = KnownStages(
        class_embedder=(translated.cond_stage or "").rpartition(".")[2] == "ClassEmbedder",
        first_stage=None if first_stage is None else frozenset(first_stage_keys(first_stage)),
        first_stage_as_condition=translated.cond_stage == FIRST_STAGE_AS_CONDITION,
        conditioners=tuple(STAGE_PREFIXES[name] for name in conditioners),
    )
    contents = classify_tensors(
        tensors,
        translated.unet_params,
        ignore_keys=options.ignore_keys,
        load_only_unet=options.load_only_unet,
        stages=stages,
    )
    if translated.samples.scale_by_std and contents.scale_factor is None:
        raise ValueError(
            "scale_by_std is true, but the checkpoint has no scale_factor, which training measures: set scale_by_std "
            "to false and scale_factor to the factor of its latents."
        )
    check_classes(translated, contents.class_embedding)
    scheduler, notes = _make_scheduler(translated.schedule, contents.tables, options.schedule_from)
    steps = len(scheduler.schedule)
    if contents.logvar is not None and contents.logvar.shape != (steps,):
        raise ValueError(
            f"The checkpoint's logvar has {tuple(contents.logvar.shape)} entries, but the configuration's schedule "
            f'has {steps} steps. Use schedule_from="checkpoint", or leave it out with ignore_keys=["logvar"].'
        )
    if not any(row.source == "logvar" for row in contents.left_out) and not options.load_only_unet:
        notes += logvar_notes(contents.logvar, translated.objective)
    if contents.ignored:
        notes.append(f"Re-initialized, because ignore_keys left them out: {', '.join(sorted(contents.ignored))}.")
    foreign = foreign_first_stage(translated)
    if foreign and any(row.source.startswith(FIRST_STAGE_PREFIX) for row in contents.left_out):
        known = ", ".join(KINDS)
        notes.append(f"The first stage is left out: {one_line(foreign)} is not one of CompVis' classes ({known}).")
    if contents.filled:
        notes.append(f"The EMA lacks {len(contents.filled)} frozen tensors; they are copied from the raw weights.")
    remarks = [*more_notes, *tokenizer_notes]
    conditioning = ConditioningStages(conditioners, contents.conditioners, tokenizer, remarks)
    return CompVisCheckpoint(translated, contents, scheduler, first_stage, conditioning, notes)


def _first_stage_config(
    config: CompVisConfig, tensors: Mapping[str, Tensor], options: LoadOptions
) -> FirstStageConfig | None:
    """Arguments of the first stage; None if the file has none, or the options leave it out."""
    ignored = options.ignore_keys
    in_file = any(name.startswith(FIRST_STAGE_PREFIX) and not name.startswith(ignored) for name in plain_keys(tensors))
    if not config.first_stage or options.load_only_unet or not in_file or foreign_first_stage(config):
        return None
    try:
        return read_first_stage(config.first_stage, FIRST_STAGE)
    except ValueError as error:
        message = str(error).removesuffix(".")
        raise ValueError(f"{message}; or leave the first stage out: ignore_keys {FIRST_STAGE_PREFIX}") from None


def _make_scheduler(
    schedule: Mapping[str, Any], tables: Mapping[str, Tensor], schedule_from: ScheduleSource
) -> tuple[DDPMExtScheduler, list[str]]:
    """The scheduler, and notes on it for the user."""
    scheduler = DDPMExtScheduler(**schedule)
    if schedule_from == "checkpoint":
        if "betas" not in tables:
            raise ValueError('schedule_from is "checkpoint", but the checkpoint has no betas: use "config".')
        other = {key: value for key, value in schedule.items() if not key.startswith(("beta", "cosine", "num_train"))}
        if tables["betas"].ndim != 1 or not tables["betas"].is_floating_point():
            raise ValueError(f"The checkpoint's betas have shape {tuple(tables['betas'].shape)}, not one per step.")
        return DDPMExtScheduler(**other | {"trained_betas": tables["betas"].double().tolist()}), []
    difference = describe_schedule_difference(tables, scheduler.schedule)
    if not difference:
        return scheduler, []
    return scheduler, [
        f"The checkpoint's schedule differs from the configuration's, which is used: {difference}. To use the "
        'checkpoint\'s, set schedule_from="checkpoint".'
    ]


def report_compvis(
    checkpoint: CompVisCheckpoint,
    source: PathLike,
    networks: Mapping[WeightSet, tuple[nn.Module, list[ConvertedTensor]]],
) -> Report:
    """Report on the conversion of a checkpoint to networks by set of weights, the default one first."""
    contents, config = checkpoint.contents, checkpoint.config
    first_stage_rows = () if checkpoint.first_stage_config is None else checkpoint.first_stage_config.rows
    facts: dict[str, Any] = {}
    if checkpoint.ema_metadata is not None:
        facts |= {"ema_decay": checkpoint.ema_metadata.decay, "ema_num_updates": checkpoint.ema_metadata.num_updates}
    if checkpoint.learns_logvar and contents.logvar is not None:
        facts["logvar"] = f"learned, mean {float(contents.logvar.mean()):.4f}"
    if contents.class_embedding is not None:
        facts["class_embedder"] = f"{len(contents.class_embedding)} classes"
    if checkpoint.scale_factor is not None:
        facts["scale_factor"] = checkpoint.scale_factor
    facts |= {f"scheduler.{name}": value for name, value in config.schedule.items()}
    if config.concat_through_vae is not None:
        facts["concat_through_vae"] = config.concat_through_vae
    facts |= {"conditioning_key": config.conditioning_key, **checkpoint.facts}
    first_stage = checkpoint.first_stage
    return Report.of_networks(
        "compvis",
        Path(source).name,
        networks,
        stages=({} if first_stage is None else {"first_stage": first_stage[1]}) | checkpoint.conditioning.rows,
        left_out=[*contents.left_out, *checkpoint.conditioning.left_out],
        configuration=[*config.rows, *first_stage_rows, *checkpoint.conditioning.config_rows],
        facts=facts,
        notes=checkpoint.notes
        + checkpoint.conditioning.notes
        + stage_notes(config, contents)
        + foreign_classes(config),
    )

"""Loading of original checkpoints: `load_compvis`. The inverse is :mod:`diffusers_ddpm_ext.compvis.save`.

Defects of the original's loading are fixed: a learned logvar is loaded, the configuration's schedule wins over the
file's (with a warning if they differ), `load_only_unet` works for every class, prefixes in `ignore_keys` may overlap,
and a missing EMA is not left at random weights.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffusers_ddpm_ext.compvis.config.ddpm import CompVisConfig, read_compvis_config
from diffusers_ddpm_ext.compvis.load_options import LoadOptions, ScheduleSource, WeightChoice, WeightSet
from diffusers_ddpm_ext.compvis.reader.archive import PathLike, read_tensors
from diffusers_ddpm_ext.compvis.report import Report
from diffusers_ddpm_ext.compvis.schema import FIXED_LOGVAR, one_line
from diffusers_ddpm_ext.compvis.state_dict import CheckpointContents, classify_tensors, describe_schedule_difference
from diffusers_ddpm_ext.compvis.weights import ConvertedTensor, build_network
from diffusers_ddpm_ext.models.ema import EmaMetadata
from diffusers_ddpm_ext.pipelines.pipeline_ddpm_ext import DDPMExtPipeline
from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompVisCheckpoint:
    """A checkpoint and its configuration, read and checked; no network is built yet.

    Attributes:
        config: translated.
        contents: the tensors by role.
        scheduler: with the requested schedule.
        notes: sentences for the user.
    """

    config: CompVisConfig
    contents: CheckpointContents
    scheduler: DDPMExtScheduler
    notes: list[str]

    def weights(self, which: WeightSet) -> dict[str, Tensor]:
        """One set of weights by UNetModel's keys; empty if the file does not have it."""
        return self.contents.ema if which == "ema" else self.contents.raw

    def network(self, which: WeightSet) -> tuple[nn.Module, list[ConvertedTensor]]:
        """Build the Diffusers network with one set of weights, float32, in eval mode; also one row per tensor."""
        config = self.config
        return build_network(self.weights(which), config.unet_params, config.conditioning_key, self.contents.ignored)

    def pipeline(self, network: nn.Module) -> DDPMExtPipeline:
        """Make a pipeline of a network, with the checkpoint's scheduler, logvar, class embeddings and conditioning."""
        pipeline = DDPMExtPipeline(
            network,
            self.scheduler,
            conditioning_key=self.config.conditioning_key,
            latent_scaling_factor=self.scale_factor if self.config.samples.latent else None,
        )
        pipeline.compvis_facts = self.facts  # for save_compvis
        if self.learns_logvar:
            pipeline.logvar = self.contents.logvar
        if self.contents.class_embedding is not None:
            pipeline.class_embedder = self.contents.class_embedding.float()
        return pipeline

    @property
    def scale_factor(self) -> float | None:
        """Factor of the latents: the file's, which may have been measured, else the configuration's."""
        own = self.contents.scale_factor
        return self.config.samples.scale_factor if own is None else own

    @property
    def learns_logvar(self) -> bool:
        """Whether the file has a logvar that was learned; forks also save one that was not."""
        return self.contents.logvar is not None and self.config.objective["learn_logvar"]

    @property
    def facts(self) -> dict[str, Any]:
        """What going back to an original checkpoint needs, and the pipeline does not have."""
        facts: dict[str, Any] = {"unet_params": dict(self.config.unet_params)}
        if self.contents.logvar is not None and not self.learns_logvar:
            values = self.contents.logvar.float().tolist()
            facts[FIXED_LOGVAR] = values[0] if len(set(values)) == 1 else values
        return facts

    @property
    def ema_metadata(self) -> EmaMetadata | None:
        """Decay and number of updates of the EMA; None if the file has none."""
        return self.contents.ema_metadata if self.contents.ema else None


def load_compvis(
    path: PathLike,
    config: PathLike | Mapping[str, Any],
    *,
    weights: WeightChoice = "auto",
    ignore_keys: Iterable[str] = (),
    load_only_unet: bool = False,
    schedule_from: ScheduleSource = "config",
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

    Returns:
        The pipeline; ``.unet`` is the Diffusers network, float32, in eval mode. First stage and conditioning stage
        are not part of it.

    Raises:
        ValueError: an argument is not one of the allowed values, the file cannot be read, or it does not belong to the
            configuration: missing and unexpected keys are listed.
    """
    prefixes = (ignore_keys,) if isinstance(ignore_keys, str) else tuple(ignore_keys)
    checkpoint = read_compvis_checkpoint(path, config, LoadOptions(weights, prefixes, load_only_unet, schedule_from))
    for note in checkpoint.notes:
        warnings.warn(note, stacklevel=2)
    which = choose_weights(checkpoint, weights)
    if weights == "auto":
        other = "" if which == "ema" and checkpoint.weights("raw") else "the only ones in the file; "
        logger.warning('%s: %sthe pipeline has its %s weights (weights="%s").', path, other, which.upper(), which)
    network, _ = checkpoint.network(which)
    return checkpoint.pipeline(network)


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
    path: PathLike, config: PathLike | Mapping[str, Any], options: LoadOptions
) -> CompVisCheckpoint:
    """Read a checkpoint and its configuration; see `load_compvis` for arguments and errors."""
    translated = read_compvis_config(config, for_training=False)
    contents = classify_tensors(
        read_tensors(path),
        translated.unet_params,
        ignore_keys=options.ignore_keys,
        load_only_unet=options.load_only_unet,
        class_embedder=(translated.cond_stage or "").rpartition(".")[2] == "ClassEmbedder",
    )
    scheduler, notes = _make_scheduler(translated.schedule, contents.tables, options.schedule_from)
    steps = len(scheduler.schedule)
    if contents.logvar is not None and contents.logvar.shape != (steps,):
        raise ValueError(
            f"The checkpoint's logvar has {tuple(contents.logvar.shape)} entries, but the configuration's schedule "
            f'has {steps} steps. Use schedule_from="checkpoint", or leave it out with ignore_keys=["logvar"].'
        )
    if not any(row.source == "logvar" for row in contents.left_out) and not options.load_only_unet:
        notes += _logvar_notes(contents.logvar, translated.objective)
    if contents.ignored:
        notes.append(f"Re-initialized, because ignore_keys left them out: {', '.join(sorted(contents.ignored))}.")
    if contents.filled:
        notes.append(f"The EMA lacks {len(contents.filled)} frozen tensors; they are copied from the raw weights.")
    return CompVisCheckpoint(translated, contents, scheduler, notes)


def _logvar_notes(logvar: Tensor | None, objective: Mapping[str, Any]) -> list[str]:
    """Notes where the file has another logvar than the configuration tells."""
    if objective["learn_logvar"]:
        return [] if logvar is not None else ["The configuration learns a logvar, but the checkpoint has none."]
    if logvar is None or bool((logvar == objective["logvar_init"]).all()):
        return []
    return [
        f"The checkpoint's logvar (mean {float(logvar.float().mean()):.4f}) is not part of the pipeline, since the "
        "configuration does not learn it: if it was learned, set learn_logvar: true."
    ]


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
    facts |= {"conditioning_key": config.conditioning_key, **checkpoint.facts}
    return Report.of_networks(
        "compvis",
        Path(source).name,
        networks,
        left_out=contents.left_out,
        configuration=config.rows,
        facts=facts,
        notes=checkpoint.notes + _foreign_classes(config),
    )


def _foreign_classes(config: CompVisConfig) -> list[str]:
    """Notes on classes that are read as CompVis' classes of the same name."""
    return [
        f"{row.key} {one_line(row.value, 100)} is not a class of CompVis' ldm: it is read as ldm's class of that name."
        for row in config.rows
        if row.key.endswith(".target") and row.fate == "translated" and not str(row.value).startswith("ldm.")
    ]

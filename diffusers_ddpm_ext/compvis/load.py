"""Original checkpoints in: `load_compvis`. The way back is :mod:`diffusers_ddpm_ext.compvis.save`.

What the original does wrong when it loads is put right: a learned logvar is kept, the configuration's schedule wins
over the file's (and a difference is said), `load_only_unet` finds its weights and works for every class, prefixes in
`ignore_keys` may overlap, and an average that a file lacks is not left at random weights.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.compvis.architecture import translate_unet
from diffusers_ddpm_ext.compvis.config.ddpm import CompVisConfig, read_config
from diffusers_ddpm_ext.compvis.reader.archive import read_tensors
from diffusers_ddpm_ext.compvis.report import Report
from diffusers_ddpm_ext.compvis.state_dict import Contents, describe_difference, sort_tensors
from diffusers_ddpm_ext.compvis.weights import Moved, convert_tensors, export_unet
from diffusers_ddpm_ext.models.ema import EmaMetadata
from diffusers_ddpm_ext.pipelines.pipeline_ddpm_ext import DDPMExtPipeline
from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler

logger = logging.getLogger(__name__)

WEIGHTS = ("auto", "raw", "ema")
SCHEDULES = ("config", "checkpoint")
PATH = str | os.PathLike[str]


@dataclass(frozen=True)
class Original:
    """A checkpoint and its configuration, read and understood; no network is built yet.

    Attributes:
        config: translated.
        contents: the tensors, sorted.
        scheduler: with the schedule that was asked for.
        notes: sentences a person should read.
    """

    config: CompVisConfig
    contents: Contents
    scheduler: DDPMExtScheduler
    notes: list[str]

    def has(self, kind: str) -> bool:
        """Whether the file holds ``raw`` or ``ema`` weights."""
        return bool(self.contents.average if kind == "ema" else self.contents.raw)

    def network(self, kind: str) -> tuple[nn.Module, list[Moved]]:
        """Build the Diffusers network with one of the two sets of weights.

        Args:
            kind: ``raw`` or ``ema``.

        Returns:
            The network, float32, in eval mode, and what came from where.
        """
        tensors = self.contents.average if kind == "ema" else self.contents.raw
        return build_network(tensors, self.config.unet_params, self.config.conditioning_key, self.contents.ignored)

    def pipeline(self, network: nn.Module) -> DDPMExtPipeline:
        """Put a pipeline around a network: scheduler, logvar, class embeddings, how conditions are joined."""
        pipeline = DDPMExtPipeline(network, self.scheduler, conditioning_key=self.config.conditioning_key)
        pipeline.compvis_params = dict(self.config.unet_params)  # their order of heads, for the way back
        if self.contents.logvar is not None:
            pipeline.logvar = self.contents.logvar
        if self.contents.class_embedding is not None:
            pipeline.class_embedder = self.contents.class_embedding.float()
        return pipeline

    @property
    def ema_facts(self) -> EmaMetadata | None:
        """Decay and count of the average; None where the file has none."""
        found = self.contents
        if not found.average:
            return None
        return EmaMetadata(0.9999 if found.decay is None else found.decay, found.num_updates or 0)


def load_compvis(
    path: PATH,
    config: PATH | Mapping[str, Any],
    *,
    weights: str = "auto",
    ignore_keys: Iterable[str] = (),
    load_only_unet: bool = False,
    schedule_from: str = "config",
) -> DDPMExtPipeline:
    """Make a pipeline of an original checkpoint. Nothing that a file names is imported or run.

    Args:
        path: ``.ckpt``, ``.pt``, ``.pth`` or ``.safetensors``, or the index of its shards.
        config: the YAML file that belongs to it, or its content.
        weights: ``raw``, ``ema``, or ``auto``: EMA where the file has it, else raw; which one is logged.
        ignore_keys: prefixes of names in the file that are left out. Parts of the network that this leaves without
            weights are initialised afresh, with a warning.
        load_only_unet: take the network and nothing else: no logvar.
        schedule_from: ``config``, whose schedule wins (a file that holds another one is warned of), or ``checkpoint``.

    Returns:
        The pipeline; ``.unet`` is the bare Diffusers network, float32, in eval mode. First stage and conditioning
        stage are no part of it.

    Raises:
        ValueError: an argument is not one of these, the file cannot be read, or it and the configuration do not
            belong together: names that are missing or left over are listed.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}; it must be one of {', '.join(WEIGHTS)}.")
    original = read_original(
        path, config, ignore_keys=ignore_keys, load_only_unet=load_only_unet, schedule_from=schedule_from
    )
    for note in original.notes:
        warnings.warn(note, stacklevel=2)
    kind = choose(original, weights)
    if weights == "auto":
        other = "" if kind == "ema" and original.has("raw") else "the only ones that the file holds; "
        logger.warning('%s: %sthe pipeline has its %s weights (weights="%s").', path, other, kind.upper(), kind)
    network, _ = original.network(kind)
    return original.pipeline(network)


def choose(original: Original, weights: str) -> str:
    """Which set of weights is meant.

    Args:
        original: a checkpoint.
        weights: ``auto``, ``raw`` or ``ema``.

    Returns:
        ``raw`` or ``ema``.

    Raises:
        ValueError: the file does not hold what was asked for.
    """
    kind = ("ema" if original.has("ema") else "raw") if weights == "auto" else weights
    if not original.has(kind):
        there = "EMA" if kind == "raw" else "raw"
        raise ValueError(f'weights is "{kind}", but the checkpoint holds {there} weights only; say weights="auto".')
    return kind


def read_original(
    path: PATH,
    config: PATH | Mapping[str, Any],
    *,
    ignore_keys: Iterable[str] = (),
    load_only_unet: bool = False,
    schedule_from: str = "config",
) -> Original:
    """Read a checkpoint and its configuration; see `load_compvis` for arguments and errors."""
    if schedule_from not in SCHEDULES:
        raise ValueError(f"schedule_from is {schedule_from!r}; it must be one of {', '.join(SCHEDULES)}.")
    translated = read_config(config)
    contents = sort_tensors(
        read_tensors(path),
        translated.unet_params,
        ignore_keys=ignore_keys,
        load_only_unet=load_only_unet,
        class_embedder=(translated.cond_stage or "").rpartition(".")[2] == "ClassEmbedder",
    )
    scheduler, notes = _scheduler(translated.schedule, contents.tables, schedule_from)
    steps = len(scheduler.schedule)
    if contents.logvar is not None and contents.logvar.shape != (steps,):
        raise ValueError(
            f"The checkpoint's logvar has {tuple(contents.logvar.shape)} entries, but the configuration's schedule "
            f'has {steps} steps. Say schedule_from="checkpoint", or leave it out with ignore_keys=["logvar"].'
        )
    if contents.ignored:
        notes.append(f"Initialised afresh, since ignore_keys left them out: {', '.join(sorted(contents.ignored))}.")
    if contents.filled:
        notes.append(f"The average lacks {len(contents.filled)} frozen tensors; the raw weights fill them in.")
    return Original(translated, contents, scheduler, notes)


def _scheduler(
    schedule: Mapping[str, Any], tables: Mapping[str, Tensor], schedule_from: str
) -> tuple[DDPMExtScheduler, list[str]]:
    """The scheduler, and what to know of it."""
    scheduler = DDPMExtScheduler(**schedule)
    if schedule_from == "checkpoint":
        if "betas" not in tables:
            raise ValueError('schedule_from is "checkpoint", but the checkpoint holds no betas; say "config".')
        own = {key: value for key, value in schedule.items() if not key.startswith(("beta", "cosine", "num_train"))}
        return DDPMExtScheduler(**own | {"trained_betas": tables["betas"].double().tolist()}), []
    difference = describe_difference(tables, scheduler.schedule)
    if not difference:
        return scheduler, []
    return scheduler, [
        f"The checkpoint's schedule is not the configuration's, which is used: {difference}. To take the "
        'checkpoint\'s, say schedule_from="checkpoint".'
    ]


def build_network(
    tensors: Mapping[str, Tensor],
    unet_params: Mapping[str, Any],
    conditioning_key: str | None = None,
    afresh: Iterable[str] = (),
    timestep_scale: float = 1.0,
) -> tuple[nn.Module, list[Moved]]:
    """Build a Diffusers network from tensors under UNetModel's own names.

    Args:
        tensors: floating, any dtype.
        unet_params: keyword arguments of UNetModel.
        conditioning_key: how its inputs are joined.
        afresh: names that may be missing and are initialised, always alike.
        timestep_scale: factor on the timestep before the network sees it.

    Returns:
        The network, float32, in eval mode, and one row a tensor.

    Raises:
        ValueError: names are missing or left over, or no Diffusers network can express this one.
    """
    plan = translate_unet(unet_params, conditioning_key=conditioning_key, timestep_scale=timestep_scale)
    if set(afresh) - set(tensors):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            start = export_unet(plan.build(), unet_params)
        tensors = {**{name: start[name] for name in afresh if name in start}, **tensors}
    converted, rows = convert_tensors(tensors, unet_params)
    with torch.device("meta"):
        network = plan.build()
    network.load_state_dict({name: tensor.float() for name, tensor in converted.items()}, strict=True, assign=True)
    return network.eval(), rows


def report_of(original: Original, source: PATH, networks: Mapping[str, tuple[nn.Module, list[Moved]]]) -> Report:
    """What a conversion did.

    Args:
        original: what was read.
        source: the checkpoint.
        networks: by set of weights, the default one first.

    Returns:
        The report.
    """
    default = next(iter(networks))
    network = networks[default][0]
    found = original.contents
    facts: dict[str, Any] = {}
    if original.ema_facts is not None:
        facts |= {"ema_decay": original.ema_facts.decay, "ema_num_updates": original.ema_facts.num_updates}
    if found.logvar is not None:
        facts["logvar"] = f"learned, mean {float(found.logvar.mean()):.4f}"
    if found.class_embedding is not None:
        facts["class_embedder"] = f"{len(found.class_embedding)} classes"
    scale = found.scale_factor if found.scale_factor is not None else original.config.scale_factor
    if scale is not None:
        facts["scale_factor"] = scale
    facts |= {f"scheduler.{name}": value for name, value in original.config.schedule.items()}
    facts["conditioning_key"] = original.config.conditioning_key
    facts["unet_params"] = original.config.unet_params
    return Report(
        family="compvis",
        source=Path(source).name,
        network=type(network).__name__,
        default=default,
        raw_variant=default == "ema" and "raw" in networks,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        tensors={kind: rows for kind, (_, rows) in networks.items()},
        left_out=found.left_out,
        configuration=original.config.rows,
        facts=facts,
        notes=original.notes,
    )

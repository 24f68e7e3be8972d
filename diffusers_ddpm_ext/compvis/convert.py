"""A converted checkpoint as a folder: both sets of weights, what is beside them, and a comparison with its source."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.compvis.config.openai import read_flags
from diffusers_ddpm_ext.compvis.load import build_network, choose, read_original, report_of
from diffusers_ddpm_ext.compvis.reader.archive import read_tensors
from diffusers_ddpm_ext.compvis.report import Report
from diffusers_ddpm_ext.compvis.state_dict import TABLES
from diffusers_ddpm_ext.compvis.weights import bare
from diffusers_ddpm_ext.models.ema import EmaMetadata, load_ema_metadata, save_ema_metadata
from diffusers_ddpm_ext.pipelines.guidance import network_config
from diffusers_ddpm_ext.pipelines.pipeline_ddpm_ext import DDPMExtPipeline
from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler

PATH = str | os.PathLike[str]
RAW = "raw"


@dataclass(frozen=True)
class Converted:
    """A pipeline and what goes with it into its folder.

    Attributes:
        pipeline: with the default weights.
        raw: the raw network beside EMA weights; None where the default ones are all there is.
        ema: of the average, where the default weights are one.
        report: what came from where.
    """

    pipeline: DDPMExtPipeline
    raw: nn.Module | None
    ema: EmaMetadata | None
    report: Report

    def save(self, folder: PATH) -> None:
        """Write the pipeline, the raw weights as ``variant="raw"``, and ``ema.json``.

        Args:
            folder: made if it is missing.
        """
        self.pipeline.save_pretrained(folder)
        if self.raw is not None:
            network: Any = self.raw
            network.save_pretrained(Path(folder, "unet"), variant=RAW)
        if self.ema is not None:
            save_ema_metadata(folder, self.ema)

    def compare(self, folder: PATH) -> list[str]:
        """Say where a folder differs from this.

        Args:
            folder: of a pipeline.

        Returns:
            One phrase a difference; none where all tensors are equal to the bit.
        """
        theirs = DDPMExtPipeline.from_pretrained(folder)
        found = _differences("unet", self.pipeline.unet, theirs.unet)
        if self.raw is not None:
            try:
                raw = type(theirs.unet).from_pretrained(folder, subfolder="unet", variant=RAW)
                found += _differences('unet (variant="raw")', self.raw, raw)
            except OSError:
                found.append('unet has no variant="raw"')
        for name in ("logvar", "class_embedder"):
            found += _difference(name, getattr(self.pipeline, name, None), getattr(theirs, name, None))
        for name in TABLES:
            table = getattr(theirs.scheduler, name, None)
            found += _difference(f"scheduler.{name}", getattr(self.pipeline.scheduler, name), table)
        for name, value in self.pipeline.scheduler.config.items():
            if not name.startswith("_") and name != "trained_betas" and theirs.scheduler.config.get(name) != value:
                found.append(f"scheduler's {name} is {theirs.scheduler.config.get(name)}, not {value}")
        for name in ("conditioning_key", "use_positional_encodings"):
            if (theirs.config.get(name) or None) != (self.pipeline.config.get(name) or None):
                found.append(f"{name} is {theirs.config.get(name)}, not {self.pipeline.config.get(name)}")
        if self.ema is not None and load_ema_metadata(folder) != self.ema:
            found.append(f"ema.json is {load_ema_metadata(folder)}, not {self.ema}")
        return found


def _differences(where: str, ours: nn.Module, theirs: nn.Module) -> list[str]:
    mine, other = ours.state_dict(), theirs.state_dict()
    found = [f"{where} lacks {name}" for name in mine.keys() - other.keys()]
    found += [f"{where} has {name} besides" for name in other.keys() - mine.keys()]
    settings = {name: value for name, value in network_config(ours).items() if not name.startswith("_")}
    given = network_config(theirs)
    found += [
        f"{where}'s {name} is {given.get(name)}, not {value}"
        for name, value in settings.items()
        if _plain(given.get(name)) != _plain(value)
    ]
    for name in mine.keys() & other.keys():
        found += _difference(f"{where} {name}", mine[name], other[name])
    return sorted(found)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _difference(name: str, ours: Tensor | None, theirs: Tensor | None) -> list[str]:
    if ours is None or theirs is None:
        what = "missing" if theirs is None else "there, but not in the source"
        return [] if ours is theirs else [f"{name} is {what}"]
    if ours.shape != theirs.shape:
        return [f"{name} has shape {tuple(theirs.shape)}, not {tuple(ours.shape)}"]
    if torch.equal(ours, theirs.to(ours.dtype)):
        return []
    worst = float((ours.double() - theirs.double()).abs().max())
    return [f"{name} differs by up to {worst:.3g}"]


def convert_compvis(
    path: PATH,
    config: PATH | Mapping[str, Any],
    *,
    weights: str = "auto",
    ignore_keys: Iterable[str] = (),
    load_only_unet: bool = False,
    schedule_from: str = "config",
) -> Converted:
    """Convert a checkpoint of CompVis' classes; arguments and errors as `load_compvis` has them.

    Returns:
        The pipeline with the EMA weights where the file has them, the raw ones beside them, and the report.
    """
    original = read_original(
        path, config, ignore_keys=ignore_keys, load_only_unet=load_only_unet, schedule_from=schedule_from
    )
    kind = choose(original, weights)
    networks = {kind: original.network(kind)}
    if kind == "ema" and original.has("raw"):
        networks["raw"] = original.network("raw")
    return Converted(
        original.pipeline(networks[kind][0]),
        networks["raw"][0] if len(networks) > 1 else None,
        original.ema_facts if kind == "ema" else None,
        report_of(original, path, networks),
    )


def convert_openai(path: PATH, flags: PATH | Mapping[str, Any], ema_path: PATH | None = None) -> Converted:
    """Convert a checkpoint of openai/improved-diffusion or guided-diffusion.

    Args:
        path: a bare ``state_dict``, such as ``model500000.pt`` or ``ema_0.9999_500000.pt``.
        flags: of the model and its diffusion; see `read_flags`.
        ema_path: the averaged weights, which become the default ones, where ``path`` has the raw ones.

    Returns:
        The pipeline and the report.

    Raises:
        ValueError: a flag cannot be expressed, a file cannot be read, or they do not belong together.
    """
    config = read_flags(flags)
    params, networks = dict(config.unet_params), {}
    for kind, place in (("ema", ema_path), ("raw", path)):
        if place is None:
            continue
        tensors = bare(read_tensors(place))
        labels = tensors.get("label_emb.weight")
        if config.class_cond and labels is not None:
            params["num_classes"] = len(labels)
        networks[kind] = build_network(tensors, params, timestep_scale=config.timestep_scale)
    kind = next(iter(networks))
    network, _ = networks[kind]
    pipeline = DDPMExtPipeline(
        network, DDPMExtScheduler(**config.schedule), conditioning_key="adm" if config.class_cond else None
    )
    report = Report(
        family="openai",
        source=Path(path).name,
        network=type(network).__name__,
        default=kind,
        raw_variant=len(networks) > 1,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        tensors={name: rows for name, (_, rows) in networks.items()},
        configuration=config.rows,
        facts={f"scheduler.{name}": value for name, value in config.schedule.items()}
        | {"family": config.family, "timestep_scale": config.timestep_scale, "unet_params": params},
    )
    return Converted(pipeline, networks["raw"][0] if len(networks) > 1 else None, None, report)

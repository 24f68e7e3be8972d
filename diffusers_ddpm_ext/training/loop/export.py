"""How the networks of a run get out of it: to draw with, and into the folder as a pipeline."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DModel
from torch import Tensor

from diffusers_ddpm_ext.losses.logvar import ContinuousLogvar
from diffusers_ddpm_ext.models.ema import EmaMetadata, LitEMA, save_ema_metadata
from diffusers_ddpm_ext.pipelines.pipeline_ddpm_ext import DDPMExtPipeline
from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler
from diffusers_ddpm_ext.utils.dtensor import full_tensor, is_main_process, is_sharded
from diffusers_ddpm_ext.utils.files import os_errors

PIPELINE_FOLDERS = ("unet", "scheduler", "logvar")
RAW = "raw"


@dataclass(frozen=True)
class Networks:
    """A run's networks, whole and free of wrappers. They share the run's memory where it is not spread.

    Attributes:
        default: what the pipeline samples with: the EMA weights, or the raw ones where there is no average.
        raw: the raw weights; None where they are the default.
        facts: decay and updates of the average; None where there is none.
    """

    default: UNet2DModel
    raw: UNet2DModel | None
    facts: EmaMetadata | None = None


@torch.no_grad()
def take_networks(denoiser: UNet2DModel, ema: LitEMA | None) -> Networks | None:
    """Take the networks out of a run, between two steps; all processes enter.

    Args:
        denoiser: with the raw weights, free of wrappers; sharded or not.
        ema: the moving average, if there is one.

    Returns:
        The networks in the first process, on the run's device, or on the CPU where the weights were spread; None in
        the others.
    """
    raw = {name: _whole(tensor) for name, tensor in denoiser.state_dict().items()}
    average = {} if ema is None else {name: _whole(tensor) for name, tensor in ema.shadow.items()}
    if not is_main_process():
        return None
    if ema is None:
        return Networks(_network(denoiser, raw), None)
    average = {name: tensor.to(raw[name].dtype) for name, tensor in average.items()}
    facts = EmaMetadata(ema.decay, ema.num_updates)
    return Networks(_network(denoiser, raw | average), _network(denoiser, raw), facts)


def _whole(tensor: Tensor) -> Tensor:
    """A tensor that was spread, on the CPU of the first process and nowhere else; any other one as it is."""
    if not is_sharded(tensor):
        return tensor.detach()
    whole = full_tensor(tensor)
    return whole.cpu() if is_main_process() else whole.new_empty(0)


def _network(like: UNet2DModel, tensors: dict[str, Tensor]) -> UNet2DModel:
    """A network of the same kind that holds these very tensors."""
    with init_empty_weights(include_buffers=False):
        network: UNet2DModel = type(like).from_config(like.config)
    network.load_state_dict(tensors, assign=True)
    network.eval()
    return network


@torch.no_grad()
def save_pipeline(
    folder: Path,
    networks: Networks,
    scheduler: DDPMExtScheduler,
    logvar: Tensor | None,
    joined: Mapping[str, Any] | None = None,
    logvar_network: ContinuousLogvar | None = None,
) -> None:
    """Put a pipeline into a run's folder, which opens at every moment: each file appears whole, in place of the old.

    The EMA weights are the default files and the raw ones ``variant="raw"``; without EMA the raw ones are the default.

    Args:
        folder: of the run, with ``model_index.json`` at its top.
        networks: from `take_networks`.
        scheduler: of the run.
        logvar: the learned log-variances, (T,), if there are any.
        joined: how conditions reach the network: arguments of the pipeline.
        logvar_network: that the log-variances are taken from, of the continuous kind.

    Raises:
        OSError: the disk is full, or the folder cannot be written; what was there stands.
    """
    pipeline = DDPMExtPipeline(unet=networks.default, scheduler=scheduler, **joined or {})
    pipeline.logvar = None if logvar is None else logvar.detach().float().cpu()
    pipeline.logvar_network = logvar_network
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as name:
        place = Path(name)
        with os_errors():
            pipeline.save_pretrained(place)
            if networks.raw is not None:
                networks.raw.save_pretrained(place / "unet", variant=RAW)
            if networks.facts is not None:
                save_ema_metadata(place, networks.facts)
        _move_in(place, folder)


def _move_in(place: Path, folder: Path) -> None:
    """Move files over their predecessors, ``model_index.json`` last, and drop what the new pipeline does not have."""
    files = sorted(path.relative_to(place) for path in place.rglob("*") if path.is_file())
    for file in sorted(files, key=lambda file: file.name == "model_index.json"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(place / file, folder / file)
    for component in PIPELINE_FOLDERS:
        for old in (folder / component).rglob("*"):
            if old.is_file() and old.relative_to(folder) not in files:
                old.unlink()

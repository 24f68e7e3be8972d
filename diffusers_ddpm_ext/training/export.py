"""How a pipeline gets into the folder of a run."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from diffusers import UNet2DModel
from torch import Tensor

from diffusers_ddpm_ext.ema import LitEMA
from diffusers_ddpm_ext.pipeline import DDPMExtPipeline
from diffusers_ddpm_ext.scheduler import DDPMExtScheduler

PIPELINE_FOLDERS = ("unet", "scheduler", "logvar")
RAW = "raw"


@torch.no_grad()
def save_pipeline(
    folder: Path, denoiser: UNet2DModel, scheduler: DDPMExtScheduler, ema: LitEMA | None, logvar: Tensor | None
) -> None:
    """Put a pipeline into a run's folder, which opens at every moment: each file appears whole, in place of the old.

    The EMA weights are the default files and the raw ones ``variant="raw"``; without EMA the raw ones are the default.

    Args:
        folder: of the run, with ``model_index.json`` at its top.
        denoiser: with the raw weights, free of wrappers.
        scheduler: of the run.
        ema: the moving average, if there is one.
        logvar: the learned log-variances, (T,), if there are any.
    """
    pipeline = DDPMExtPipeline(unet=denoiser, scheduler=scheduler)
    pipeline.logvar = None if logvar is None else logvar.detach().float().cpu()
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as name:
        place = Path(name)
        if ema is None:
            pipeline.save_pretrained(place)
        else:
            with ema.scope(denoiser):
                pipeline.save_pretrained(place)
            denoiser.save_pretrained(place / "unet", variant=RAW)
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

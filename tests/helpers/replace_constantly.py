"""Run by test_replaced_folders as a process: replaces a pipeline's folder without a pause until it is killed."""

from __future__ import annotations

import secrets
import shutil
import sys
from itertools import cycle
from pathlib import Path

import torch

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from diffusers_ddpm_ext.training.loop.export import ExportedNetworks, save_pipeline
from diffusers_ddpm_ext.utils.files import replace_folder
from helpers.tiny import tiny_unet


def make(value: int) -> DDPMExtPipeline:
    """A pipeline whose weights, log-variances and betas all tell one number."""
    network = tiny_unet(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(value)
    pipeline = DDPMExtPipeline(network, DDPMExtScheduler(num_train_timesteps=20, beta_end=0.02 + value * 1e-6))
    pipeline.logvar = torch.full((20,), float(value))
    return pipeline


def main(folder: Path, way: str) -> None:
    """Replace the folder: by ``save_pretrained``, the same with shards, or as a run replaces ``best``."""
    for pipeline in cycle([make(value) for value in range(4)]):
        if way == "best":
            draft = folder.parent / f".writing-{secrets.token_hex(4)}"
            draft.mkdir()
            save_pipeline(
                draft,
                ExportedNetworks(pipeline.unet, pipeline.unet, None, pipeline.logvar, None),
                pipeline.scheduler,
                {},
            )
            replace_folder(draft, folder)
            shutil.rmtree(draft, ignore_errors=True)
        else:
            pipeline.save_pretrained(folder, max_shard_size="20KB" if way == "sharded" else None)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

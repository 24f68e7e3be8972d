"""Training runs small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.training.config.autoencoder_config import AutoencoderConfig
from diffusers_ddpm_ext.training.config.train_config import TrainConfig

TINY: dict[str, Any] = {
    "resolution": 8,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "attention_levels": [1],
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "num_train_timesteps": 50,
    "train_batch_size": 8,
    "max_train_steps": 6,
    "learning_rate": 2e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "logging_steps": 4,
    "validation_steps": 3,
    "validation_max_images": 16,
    "save_images_epochs": None,
    "save_images_steps": None,
    "num_preview_images": 4,
    "ddpm_num_inference_steps": 5,
    "report_to": "none",
}


def tiny_run(folder: Path, **options: Any) -> TrainConfig:
    """The digits' recipe, cut down to a few steps of a small network."""
    return TrainConfig.from_flat(TINY | {"output_dir": str(folder)} | options)


TINY_VAE: dict[str, Any] = {
    "resolution": 8,
    "compression": 2,
    "latent_channels": 2,
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
    "train_batch_size": 8,
    "max_train_steps": 6,
    "lr_warmup_steps": 2,
    "logging_steps": 4,
    "validation_steps": 3,
    "validation_max_images": 20,
    "save_images_epochs": None,
    "save_images_steps": None,
    "num_preview_images": 12,
    "report_to": "none",
}


def tiny_vae_run(folder: Path, **options: Any) -> AutoencoderConfig:
    """A few steps of a small first stage on the digits."""
    return AutoencoderConfig.from_flat(TINY_VAE | {"output_dir": str(folder)} | options)


def tiny_flags(**options: Any) -> list[str]:
    """The same as flags of the command line."""
    flags: list[str] = []
    for name, value in (TINY | options).items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no_{name}")
        elif value is not None:
            flags += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return flags


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, float]]:
    """The rows of a run's metrics."""
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    """The training losses of a run, one per step."""
    return [row["train/loss"] for row in rows(folder) if "train/loss" in row]

"""Configuration of a run that trains a first stage: the options of `ddpm-ext train-vae`, parsed and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, ClassVar

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.config.autoencoder_options import DEFAULT_WIDTHS, TRAIN_VAE, AutoencoderOptions
from diffusers_ddpm_ext.training.config.checks import (
    check_data_options,
    check_dependencies,
    check_output,
    check_resume,
    check_run_length,
)
from diffusers_ddpm_ext.training.config.initial_autoencoder import architecture_of
from diffusers_ddpm_ext.training.config.layers import OptionLayer
from diffusers_ddpm_ext.training.config.option_table import OptionTable
from diffusers_ddpm_ext.training.config.streaming_checks import streaming_defaults
from diffusers_ddpm_ext.training.config.train_config import TrainConfig, parse_run_args
from diffusers_ddpm_ext.utils.lr_lambdas import WITHOUT_WARMUP
from diffusers_ddpm_ext.utils.network_budget import check_network_config

DIGITS: dict[str, Any] = {
    "resolution": (8, 8),
    "compression": 2,
    "latent_channels": 2,
    "train_batch_size": 64,
    "max_train_steps": 2000,
    "num_epochs": None,
    "save_images_epochs": None,
    "save_images_steps": 500,
    "report_to": "none",
    "checkpoints_total_limit": 2,
}
"""Options of a run without a data option, on the digits."""

DESCRIPTION = """Train a first stage on images: an autoencoder whose latents `ddpm-ext train --vae` learns to draw.

Images, checkpoints, resuming, EMA, validation and logging are those of `ddpm-ext train`. The folder holds a Diffusers
AutoencoderKL (or VQModel) whose scaling_factor is 1 / std of the latents of the training images. Without a data option
it trains on the digits that ship with scikit-learn.

The loss has no discriminator (GAN). For latents much smaller than these, where blur matters, train with Diffusers'
examples/research_projects/autoencoderkl/train_autoencoderkl.py, whose output --vae takes, too."""
EXAMPLES = """first commands:
  ddpm-ext train-vae                                        the digits, in a minute
  ddpm-ext train-vae --train_data_dir photos --dry_run      the plan of a run on your own folder
  ddpm-ext train-vae --train_data_dir photos --output_dir runs/photos-vae
  ddpm-ext train --vae runs/photos-vae --train_data_dir photos ...   then a diffusion model of its latents
  accelerate launch -m diffusers_ddpm_ext train-vae ...     the same, on all configured devices

Every run writes its options to config.yaml in its folder, a file for --config. A switch --x takes true or false, and
--no_x is --x false. Lists are separated by spaces: --block_out_channels 32 64 128."""


@dataclass(frozen=True)
class AutoencoderConfig(TrainConfig):
    """Every option of a run that trains a first stage, by section.

    The sections that only a diffusion model has keep their defaults: they are neither read nor written. Otherwise as
    `TrainConfig`.
    """

    table: ClassVar[OptionTable] = TRAIN_VAE
    folder_suffix: ClassVar[str] = "-vae"
    autoencoder: AutoencoderOptions = field(default_factory=AutoencoderOptions)

    @classmethod
    def digits_layer(cls) -> OptionLayer:
        """The options of a run on the digits."""
        return OptionLayer("the digits", DIGITS)

    @classmethod
    def derived_defaults(cls, flat: Mapping[str, Any], explicit: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults that depend on other options, for options that are not set explicitly."""
        path = flat["ckpt_path"]
        derived: dict[str, Any] = {} if path is None else architecture_of(path, explicit)
        if path is None and flat["block_out_channels"] is None:
            derived["block_out_channels"] = DEFAULT_WIDTHS[: _levels(flat["compression"])]
        if "lr_warmup_steps" not in explicit and flat["lr_scheduler"] in WITHOUT_WARMUP:
            derived["lr_warmup_steps"] = 0
        return derived | streaming_defaults(flat, explicit)

    @classmethod
    def check(cls, flat: Mapping[str, Any], typed: set[str]) -> None:
        """Check all options against each other; a ConfigError for the first contradiction."""
        check_dependencies(flat, typed, DEPENDENCIES)
        _check_perceptual(flat, typed)
        check_data_options(flat)
        _check_autoencoder(flat)
        check_run_length(flat)
        check_resume(flat, typed)
        check_output(flat)

    @property
    def perceptual_model(self) -> str | None:
        """Backbone of the perceptual distance; None without one."""
        return self.autoencoder.perceptual_model


DEPENDENCIES: dict[str, tuple[str, Any]] = {
    "torch_compile_mode": ("torch_compile", True),
    "num_vq_embeddings": ("first_stage_type", "vq"),
    "commitment_weight": ("first_stage_type", "vq"),
    "kl_weight": ("first_stage_type", "kl"),
    "random_crop_scale": ("random_crop", "before"),
    "ema_decay": ("use_ema", True),
    "ema_use_num_updates": ("use_ema", True),
    "ema_every": ("use_ema", True),
    "ema_dtype": ("use_ema", True),
    "offload_ema": ("use_ema", True),
    "shuffle_buffer": ("streaming", True),
}


def _levels(compression: int) -> int:
    return compression.bit_length()


def _check_perceptual(flat: Mapping[str, Any], typed: Set[str]) -> None:
    weight = flat["perceptual_weight"]
    if flat["perceptual_model"] is None and "perceptual_weight" in typed:
        raise ConfigError(f"--perceptual_weight {weight:g} has no effect without --perceptual_model: add that")
    if flat["perceptual_model"] is not None and weight == 0:
        raise ConfigError(
            f"--perceptual_weight {weight:g} leaves --perceptual_model without effect: use a weight above 0"
        )


def _check_autoencoder(flat: Mapping[str, Any]) -> None:
    widths, levels, factor = flat["block_out_channels"], _levels(flat["compression"]), flat["compression"]
    if len(widths) != levels:
        raise ConfigError(
            f"--block_out_channels has {len(widths)} widths, and --compression {factor} needs {levels}, one more than"
            " halvings: give as many, or leave one of the two out"
        )
    groups = flat["norm_num_groups"]
    for width in widths:
        if width % groups:
            raise ConfigError(
                f"--norm_num_groups {groups} does not divide the width {width}: use {math.gcd(*widths, groups)}"
            )
    check_network_config({"block_out_channels": widths, "layers_per_block": flat["layers_per_block"]}, "the options")
    for size in flat["resolution"]:
        if size % factor:
            up = -(-size // factor) * factor
            raise ConfigError(
                f"--resolution {size} is not divisible by --compression {factor}: use a multiple of it ({up}), or a"
                " smaller compression"
            )


def parse_train_vae_args(argv: Sequence[str]) -> AutoencoderConfig:
    """Parse the arguments of `ddpm-ext train-vae`, without importing torch or diffusers; as `parse_train_args`."""
    return parse_run_args(AutoencoderConfig, argv, DESCRIPTION, EXAMPLES)

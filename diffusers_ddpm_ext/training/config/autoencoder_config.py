"""Configuration of a run that trains a first stage: the options of `ddpm-ext train-vae`, parsed and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.config.checks import (
    check_data_options,
    check_dependencies,
    check_output,
    check_resume,
    check_run_length,
)
from diffusers_ddpm_ext.training.config.layers import OptionLayer
from diffusers_ddpm_ext.training.config.option_table import OptionTable, changed
from diffusers_ddpm_ext.training.config.options import SECTIONS
from diffusers_ddpm_ext.training.config.train_config import TrainConfig, parse_run_args
from diffusers_ddpm_ext.utils.lr_lambdas import WITHOUT_WARMUP
from diffusers_ddpm_ext.utils.network_budget import check_network_config
from diffusers_ddpm_ext.utils.option import option, options_of

DEFAULT_WIDTHS = (24, 48, 96, 192, 384, 384)
"""Of the levels, from the pixels down; a run takes as many as its compression needs."""


@dataclass(frozen=True)
class AutoencoderOptions:
    """The first stage and its loss. There is no discriminator; see below."""

    first_stage_type: Literal["kl", "vq"] = option(
        "kl", "Diffusers' AutoencoderKL, whose latents have a little noise, or VQModel, whose latents are codes."
    )
    compression: Literal[2, 4, 8, 16, 32] = option(
        4, "Pixels per latent along each side: the images are halved 1 to 5 times."
    )
    latent_channels: int = option(4, "Channels of the latents.", low=1, high=1024)
    block_out_channels: tuple[int, ...] | None = option(
        None,
        "Width of each level, one more than halvings. More is better and slower; 128 256 512 512 is Stable"
        " Diffusion's at compression 8.",
        low=1,
        high=65_536,
        unset="24 48 96 192 384 384, as many as there are levels",
    )
    layers_per_block: int = option(
        1, "Residual blocks per level of the encoder; the decoder has one more.", low=1, high=64
    )
    norm_num_groups: int = option(8, "Groups of the group normalization. Must divide every width.", low=1, high=65_536)
    mid_block_attention: bool = option(False, "Self-attention between encoder and latents, and latents and decoder.")
    num_vq_embeddings: int = option(1024, "Number of codes of vq.", low=2, high=1_000_000)
    reconstruction_loss: Literal["l1", "l2"] = option(
        "l1",
        "Distance between image and reconstruction. l1, the original's, is sharper; l2 gains a little PSNR.",
        answers={"mse": "use l2", "mae": "use l1"},
    )
    kl_weight: float = option(
        1e-6,
        "Weight of the KL divergence of kl's posterior from a standard normal, in nats per image, against the"
        " reconstruction loss summed over the image's values.",
        low=0,
    )
    commitment_weight: float = option(
        0.25, "Weight of vq's commitment loss, of the encoder's output to its code; the codebook's own has 1.", low=0
    )
    perceptual_model: str | None = option(
        None, "Backbone of a perceptual distance: folder or Hub id of a `transformers` vision model.", path=True
    )
    perceptual_weight: float = option(1.0, "Weight of the perceptual distance; the reconstruction loss has 1.", low=0)


LEFT_OUT = (
    "class_column", "concat_column", "context_column", "conditioning_dropout", "validation_bpd",
    "validation_bpd_steps", "ddpm_num_inference_steps", "preview_guidance_scale",
)  # fmt: skip
"""Options of shared sections that only a diffusion model has."""
SHARED = ("data", "optim", "ema", "loop", "validation", "checkpoint", "monitoring", "output")
VAE_SECTIONS: dict[str, type] = {"autoencoder": AutoencoderOptions} | {name: SECTIONS[name] for name in SHARED}


def _vae_table() -> OptionTable:
    declared = [each for section, cls in VAE_SECTIONS.items() for each in options_of(cls, section).values()]
    options = {each.name: each for each in declared if each.name not in LEFT_OUT}
    defaults: dict[str, Any] = {
        "learning_rate": 1e-3,
        "lr_warmup_steps": 100,
        "adam_beta1": 0.9,
        "ema_decay": 0.999,
        "num_epochs": 20,
    }
    options |= {name: changed(options[name], default) for name, default in defaults.items()}
    texts: dict[str, dict[str, str]] = {
        "output_dir": {
            "help": "Folder of the run and of the trained first stage, for --vae.",
            "unset": "a new one: runs/digits-vae, runs/digits-vae-2, ...",
        },
        "monitor": {"unset": "val/psnr_ema, or val/psnr without EMA"},
        "use_ema": {"help": "Track the EMA. Without it the saved first stage has the raw weights."},
        "adam_weight_decay": {"help": "Weight decay of the network."},
        "save_images_epochs": {"help": "Draw images above their reconstructions every N epochs."},
        "num_preview_images": {"help": "Images that are reconstructed in a preview."},
        "save_model_epochs": {"help": "Save the first stage every N epochs, and at the end."},
    }
    return OptionTable(
        "train-vae",
        VAE_SECTIONS,
        options | {name: changed(options[name], options[name].default, **text) for name, text in texts.items()},
    )


TRAIN_VAE = _vae_table()
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
        derived: dict[str, Any] = {}
        if flat["block_out_channels"] is None:
            derived["block_out_channels"] = DEFAULT_WIDTHS[: _levels(flat["compression"])]
        if "lr_warmup_steps" not in explicit and flat["lr_scheduler"] in WITHOUT_WARMUP:
            derived["lr_warmup_steps"] = 0
        return derived

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
    "num_vq_embeddings": ("first_stage_type", "vq"),
    "commitment_weight": ("first_stage_type", "vq"),
    "kl_weight": ("first_stage_type", "kl"),
    "ema_decay": ("use_ema", True),
    "ema_use_num_updates": ("use_ema", True),
    "ema_every": ("use_ema", True),
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

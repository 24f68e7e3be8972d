"""`ddpm-ext train-vae`: train a first stage for latent diffusion on images."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers_ddpm_ext.cli.train import run_training_command
from diffusers_ddpm_ext.training.config.autoencoder_config import parse_train_vae_args


def train_vae_command(argv: Sequence[str]) -> str:
    """Parse the command line and train a first stage; as `train_command`.

    Args:
        argv: the arguments after the command.
    """
    return run_training_command(argv, parse_train_vae_args)

"""The first stage of a run: loaded, checked against the options, and placed on the run's device."""

from __future__ import annotations

from dataclasses import replace

import torch

from diffusers_ddpm_ext.errors import ConfigError, as_config_error
from diffusers_ddpm_ext.models.first_stage import FirstStage, load_first_stage
from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.training.config.train_config import TrainConfig
from diffusers_ddpm_ext.training.data.latents import LatentEncoder


def build_latent_encoder(config: TrainConfig, device: torch.device) -> LatentEncoder | None:
    """The frozen first stage of a run, before its scale is known; None for a run on pixels.

    Raises:
        ConfigError: it cannot be loaded, or an option does not fit it.
    """
    options = config.latents
    if options.vae is None:
        return None
    try:
        autoencoder = load_first_stage(options.vae, options.vae_subfolder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--vae: {' '.join(str(error).split())}") from None
    with as_config_error("--vae"):
        stage = FirstStage(autoencoder.to(device))
    with as_config_error("--resolution"):
        stage.latent_size(*config.data.resolution)
    if options.latent_mode and not stage.is_stochastic:
        raise ConfigError(
            f"--latent_mode has no effect: {type(stage.autoencoder).__name__} has no posterior to sample; leave it out"
        )
    return LatentEncoder(stage, config.loop.seed, options.latent_mode, options.concat_through_vae)


def data_options(options: DataOptions, encoder: LatentEncoder | None) -> DataOptions:
    """The options of the data, with the channels of the first stage.

    Raises:
        ConfigError: ``channels`` requests others.
    """
    if encoder is None:
        return options
    own = encoder.stage.pixel_channels
    if options.channels not in (None, own):
        raise ConfigError(f"--channels {options.channels}: the first stage encodes {own}: leave --channels out")
    return replace(options, channels=own)

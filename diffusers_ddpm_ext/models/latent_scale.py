"""The scale of an autoencoder's latents in its configuration: one rule for Diffusers' autoencoders.

    z    latents as the autoencoder has them: a sample of the posterior (KL), before quantization (VQ), or its output
    x    latents as the diffusion model has them
    m, s shift and scale, one per channel or one for all:  x = (z - m) / s,  z = s x + m

``m`` is ``latents_mean`` of the configuration, else ``shift_factor``, else 0. ``s`` is ``latents_std /
scaling_factor``, or ``1 / scaling_factor``. These are the formulas of Diffusers' pipelines for SDXL, Stable Diffusion
3 and Flux, and CompVis' ``scale_factor`` is ``1 / s``.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, VQModel
from torch import Tensor, nn

from diffusers_ddpm_ext.utils.checks import checked_number, describe
from diffusers_ddpm_ext.utils.wrappers import network_class

KINDS = {AutoencoderKL: "kl", VQModel: "vq", AutoencoderTiny: "tiny", AutoencoderDC: "dc"}
CLASS_NAMES = "AutoencoderKL, VQModel, AutoencoderTiny or AutoencoderDC"
SLOTS = ("vae", "vqvae")
"""Names of the component in pipelines."""
BLANK_SIZE = 1024
"""Side of the blank image that shows the compression factor."""
SCALE_KEYS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


def kind_of(autoencoder: Any) -> str:
    """kl, vq, tiny or dc."""
    found: type = network_class(autoencoder) if isinstance(autoencoder, nn.Module) else type(autoencoder)
    if found in KINDS:
        return KINDS[found]
    raise ValueError(f"The first stage is {found.__name__}; it must be an {CLASS_NAMES}.")


def latent_rule(autoencoder: Any) -> tuple[list[float], list[float]]:
    """m and 1 / s of an autoencoder's configuration, in double precision.

    Args:
        autoencoder: without wrappers.

    Returns:
        Two lists, each of one number or of one per channel.

    Raises:
        ValueError: see `FirstStage`.
    """
    config = autoencoder.config
    channels = latent_channels(autoencoder)
    factor = _checked_positive("scaling_factor", config.get("scaling_factor", 1.0))
    mean, std = (_per_channel(config, key, channels) for key in ("latents_mean", "latents_std"))
    shift = config.get("shift_factor")
    shift = 0.0 if shift is None else checked_number("shift_factor of the autoencoder", shift, "a number")
    if mean is not None and std is None:
        raise ValueError(
            "The autoencoder's configuration has latents_mean without latents_std; write both, or neither."
        )
    if mean is not None and shift:
        raise ValueError(
            f"The autoencoder's configuration has a shift_factor ({shift}) beside latents_mean; both are what is "
            "subtracted from the latents: keep one."
        )
    scales = [1.0] if std is None else [_checked_positive("latents_std", value) for value in std]
    return [shift] if mean is None else mean, [factor / value for value in scales]


def latent_channels(autoencoder: Any) -> int:
    """Channels C of an autoencoder's latents."""
    width = autoencoder.config.get("vq_embed_dim")
    return int(autoencoder.config.latent_channels if width is None else width)


def compression_factor(autoencoder: Any) -> int:
    """Pixels per latent, along the height as along the width: from encoding a blank image.

    Only shapes are computed, in a copy without weights: it costs no memory, and works where weights are offloaded.

    Args:
        autoencoder: without wrappers.

    Raises:
        ValueError: the sides are divided differently, or the decoder does not undo it.
    """
    cls: Any = network_class(autoencoder)
    arguments = {name: autoencoder.config[name] for name in signature(cls).parameters if name in autoencoder.config}
    with torch.device("meta"), torch.no_grad():
        copied = cls(**arguments)
        blank = torch.zeros(1, autoencoder.config.in_channels, BLANK_SIZE, BLANK_SIZE)
        height, width = copied.encoder(blank).shape[-2:]
        decoded = copied.decode(torch.zeros(1, latent_channels(autoencoder), height, width)).sample
    if decoded.shape != blank.shape or height != width or BLANK_SIZE % height:
        raise ValueError(
            f"The autoencoder encodes a blank image of {BLANK_SIZE}x{BLANK_SIZE} pixels as {height}x{width} latents "
            f"and decodes these as {decoded.shape[-2]}x{decoded.shape[-1]} pixels; a first stage must divide both "
            "sides by the same whole number, and undo it."
        )
    return BLANK_SIZE // int(height)


def _per_channel(config: Any, key: str, channels: int) -> list[float] | None:
    values = config.get(key)
    if values is None:
        return None
    if not isinstance(values, list | tuple) or len(values) != channels:
        raise ValueError(
            f"{key} of the autoencoder is {describe(values)}; it must be a list of {channels} numbers, one per "
            "channel of the latents."
        )
    return [checked_number(f"{key} of the autoencoder", value, "a list of numbers") for value in values]


def _checked_positive(key: str, value: Any) -> float:
    return checked_number(f"{key} of the autoencoder", value, "a positive number", lambda v: 0 < v < float("inf"))


def per_channel_tensor(values: list[float]) -> Tensor:
    """One number, or one per channel, as (1, 1 or C, 1, 1), float32, on the CPU."""
    return torch.tensor(values, dtype=torch.float64).float().view(1, -1, 1, 1)

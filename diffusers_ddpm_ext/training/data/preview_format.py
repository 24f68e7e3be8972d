"""How previews show the channels of a data set: chosen ones, or the principal components of its images."""

from __future__ import annotations

from dataclasses import replace

import torch

from diffusers_ddpm_ext.errors import as_config_error
from diffusers_ddpm_ext.plotting.channels import is_picture, principal_components
from diffusers_ddpm_ext.training.data.dataset import ImageData
from diffusers_ddpm_ext.utils.pixel_format import PixelFormat

IMAGES_FOR_COMPONENTS = 64
"""Images whose principal components are shown."""


def with_preview(data: ImageData, preview_channels: tuple[int, ...] | None) -> PixelFormat:
    """The format of the data, with the channels or the principal components that previews show.

    Raises:
        ConfigError: there is no such channel.
    """
    with as_config_error("--preview_channels"):
        pixels = replace(data.pixel_format, preview_channels=preview_channels)
        pixels.check_channels(data.channels)
    if preview_channels is not None or data.channels == 2 or is_picture(data.channels, pixels):
        return pixels
    images = data.train
    chosen = torch.linspace(0, len(images) - 1, min(IMAGES_FOR_COMPONENTS, len(images))).long()
    return replace(pixels, preview_components=principal_components(images.pixels(chosen)))

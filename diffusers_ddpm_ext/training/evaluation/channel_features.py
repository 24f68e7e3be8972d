"""Features of images of any number of channels by models of gray or color images: of the chosen channels."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from diffusers_ddpm_ext.metrics.features import DIGITS, PIXELS, FeatureExtractor, fingerprint
from diffusers_ddpm_ext.plotting.channels import channel_view
from diffusers_ddpm_ext.utils.pixel_format import PixelFormat


def of_chosen_channels(extractor: FeatureExtractor, channels: int, pixels: PixelFormat) -> FeatureExtractor:
    """The extractor for images whose channels are no colors: it gets ``preview_channels``, and says so.

    Without chosen channels, and for the pixels themselves, it is unchanged: a vision model then refuses the images.

    Args:
        extractor: of features.
        channels: C of the images.
        pixels: of the images.
    """
    if extractor.name in (PIXELS, DIGITS) or channels in (1, 3) or pixels.preview_channels is None:
        return extractor
    view, function = channel_view(channels, pixels), extractor.function

    def of_channels(image: Tensor) -> Tensor:
        return function(torch.from_numpy(view(image.cpu().numpy())).to(image.device))

    return replace(
        extractor,
        preparation=f"{view.caption}; {extractor.preparation}",
        fingerprint=fingerprint(extractor.fingerprint, view.caption),
        function=of_channels,
    )

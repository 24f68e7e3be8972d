"""SpatialRescaler: pictures, such as segmentation maps, made as small as latents, to concatenate to them."""

from __future__ import annotations

import torch

# Diffusers looks for the name ModelMixin in the module that defines a network before it loads one.
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from diffusers_ddpm_ext.utils.checks import check_one_of, checked_flag, checked_integer, checked_number
from diffusers_ddpm_ext.utils.network_budget import MAX_LEVELS, MAX_WIDTH

__all__ = ["METHODS", "ModelMixin", "SpatialRescaler"]

METHODS = ("nearest", "bilinear", "bicubic", "area")
"""Interpolations of pictures; those of `torch.nn.functional.interpolate`."""


class SpatialRescaler(ModelMixin, ConfigMixin):
    """CompVis' ``SpatialRescaler``: interpolates pictures a few times, and mixes their channels by a 1x1 convolution.

    Args:
        n_stages: number of interpolations.
        method: one of `METHODS`.
        multiplier: by which each interpolation multiplies height and width.
        in_channels: of the pictures, e.g. one per class of a segmentation map.
        out_channels: of the result; None: there is no convolution, and the channels stay as they are.
        bias: whether the convolution has one.

    Raises:
        ValueError: an argument is not one of the allowed values.
    """

    @register_to_config
    def __init__(
        self,
        n_stages: int = 1,
        method: str = "bilinear",
        multiplier: float = 0.5,
        in_channels: int = 3,
        out_channels: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        checked_integer("n_stages", n_stages, f"a whole number from 0 to {MAX_LEVELS}", 0, MAX_LEVELS)
        check_one_of("method", method, METHODS)
        checked_number("multiplier", multiplier, "a number above 0, up to 16", lambda value: 0 < value <= 16)
        channels = [("in_channels", in_channels)] + ([] if out_channels is None else [("out_channels", out_channels)])
        for name, value in channels:
            checked_integer(name, value, f"a whole number from 1 to {MAX_WIDTH:,}", 1, MAX_WIDTH)
        checked_flag("bias", bias)
        if out_channels is not None:
            self.channel_mapper = nn.Conv2d(in_channels, out_channels, 1, bias=bias)
        else:  # Diffusers neither saves a network without tensors, nor knows its precision
            self.register_buffer("placeholder", torch.zeros(1))

    @property
    def channels(self) -> int:
        """Channels of the result."""
        out_channels = self.config.out_channels
        return int(self.config.in_channels if out_channels is None else out_channels)

    def forward(self, pictures: Tensor) -> Tensor:
        """Rescale pictures.

        Args:
            pictures: (B, in_channels, H, W), floating.

        Returns:
            (B, out_channels, h, w), in the rescaler's precision.

        Raises:
            ValueError: the pictures have another shape or type, or are too small.
        """
        config = self.config
        shape = tuple(getattr(pictures, "shape", ()))
        if len(shape) != 4 or shape[1] != config.in_channels or not pictures.is_floating_point():
            what = f"{pictures.dtype} of shape {shape}" if isinstance(pictures, Tensor) else type(pictures).__name__
            raise ValueError(
                f"The pictures are {what}; this rescaler takes floating ones of shape "
                f"(B, {config.in_channels}, height, width)."
            )
        pictures = pictures.to(self.dtype)
        for _ in range(config.n_stages):
            if min(int(side * config.multiplier) for side in pictures.shape[2:]) < 1:
                raise ValueError(
                    f"The pictures have {shape[2]}x{shape[3]} pixels, of which {config.n_stages} interpolations by "
                    f"{config.multiplier} leave none: give larger ones."
                )
            pictures = functional.interpolate(pictures, scale_factor=config.multiplier, mode=config.method)
        return self.channel_mapper(pictures) if config.out_channels is not None else pictures

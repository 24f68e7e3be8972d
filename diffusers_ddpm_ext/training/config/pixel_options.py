"""Options of what is done to the pixels of every image; part of the section ``data``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffusers_ddpm_ext.utils.option import option


@dataclass(frozen=True)
class PixelOptions:
    """Size, channels and values of the images."""

    resolution: tuple[int, int] = option(
        (64, 64), "Size of the images in pixels: one number, or height and width.", low=1, high=16_384
    )
    center_crop: bool = option(False, "Crop the center of each resized image instead of a random position.")
    random_flip: bool = option(False, "Flip each image horizontally with probability 0.5.")
    channels: Literal[1, 3, 4] | None = option(
        None, "Channels of the images: 1 gray, 3 color, 4 with transparency.", unset="those of the data", none="none"
    )

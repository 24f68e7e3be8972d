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
    channels: int | None = option(
        None,
        "Channels of the images: gray (1), color (3) and color with transparency (4) are converted to each other;"
        " images of any other number must have it.",
        low=1,
        high=4096,
        unset="those of the data",
        none="none",
    )
    data_range: tuple[float, float] | None = option(
        None,
        "The values of the data that become -1 and 1 in the model. No value may be outside.",
        unset="all values of an integer dtype; 0 1 for floats, which must be inside",
        metavar="LOW HIGH",
    )
    array_key: str | None = option(None, "Name of the array with the image in .npz files.", unset="the only one")
    array_layout: Literal["channels_last", "channels_first"] | None = option(
        None,
        "Axes of arrays with three axes, in files that do not say it: (height, width, channels) or (channels, height,"
        " width).",
        unset="channels_last, if that is the shortest axis; otherwise it must be said",
    )

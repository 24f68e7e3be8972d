"""Options of what is done to the pixels of every image; part of the section ``data``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffusers_ddpm_ext.utils.option import option

ResizeMode = Literal["crop", "stretch", "pad"]
ResizeFilter = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]


@dataclass(frozen=True)
class PixelOptions:
    """Size, channels and values of the images."""

    resolution: tuple[int, int] = option(
        (64, 64), "Size of the images in pixels: one number, or height and width.", low=1, high=16_384
    )
    resize: ResizeMode = option(
        "crop",
        "How an image of other proportions gets the size. crop: resized to cover it, then cropped; stretch: its"
        " proportions change; pad: resized to fit inside, with a border of --background.",
    )
    resize_filter: ResizeFilter = option(
        "bilinear", "Resampling filter, Pillow's. All but nearest are antialiased; bicubic and lanczos are sharper."
    )
    center_crop: bool = option(False, "Crop the center of each resized image instead of a random position.")
    random_crop: Literal["before", "after"] | None = option(
        None,
        "What is cropped at random. after: the resized image; before: the original, of which a part of random size"
        " (--random_crop_scale) and position is cut out and then resized, so that objects appear in different sizes.",
        unset="after, unless --center_crop, or --resize stretch or pad",
        answers={"none": "use --center_crop, or --resize stretch or pad"},
    )
    random_crop_scale: tuple[float, float] = option(
        (0.8, 1.0),
        "Smallest and largest side of the part of --random_crop before, as fractions of the largest part that fits."
        " ADM's are 0.8 1, CompVis' 0.5 1.",
        above=0,
        high=1,
        metavar="LOW HIGH",
    )
    random_flip: bool = option(False, "Flip each image horizontally with probability 0.5.")
    vertical_flip: bool = option(False, "Flip each image upside down with probability 0.5.")
    rotate90: bool = option(
        False,
        "Turn each square image by 0, 90, 180 or 270 degrees at random; with a flip these are all 8 symmetries, for"
        " microscopy or satellite images.",
    )
    background: str | None = option(
        None,
        "Color behind transparency where that is removed, and of the border of --resize pad: a name, or hexadecimal as"
        " '#ff8800'.",
        unset="white behind transparency; its border is the same, and that of opaque images black",
        metavar="COLOR",
    )
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
    preview_channels: tuple[int, ...] | None = option(
        None,
        "Channels that grids of images show, by number from 0: one in gray, or three as red, green and blue.",
        low=0,
        unset="all of 1, 3 or 4 channels, the first of 2, else three principal components of the images",
        metavar="I",
    )

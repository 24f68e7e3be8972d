"""Decoding of an image file to pixels: turned upright, converted to the channels, and resized."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.data.array_images import (
    AS_WRITTEN,
    ArrayReading,
    Range,
    UnreadableImage,
    UnsupportedImage,
    outside_range,
    range_of,
)
from diffusers_ddpm_ext.training.data.image_files import Payload
from diffusers_ddpm_ext.training.data.raw_image import MODE_OF_CHANNELS, RawImage, read_image
from diffusers_ddpm_ext.training.data.resizing import (
    COVERING,
    Resizing,
    Size,
    Surface,
    fit,
    limits_of,
    resized_size,
    size_of,
)

CHANNEL_NAMES = {1: "grayscale", 3: "color", 4: "color with transparency"}
LUMA = np.array([0.299, 0.587, 0.114])
"""Of red, green and blue in gray, as in Pillow (ITU-R 601-2)."""


@dataclass(frozen=True)
class Preprocessing:
    """What is done to every image once.

    Attributes:
        size: height and width that the images will have.
        channels: of the images; None keeps those of the file.
        center_crop: cut the center out of an image that covers the size; otherwise it is kept, to be cropped at random
            places later.
        resizing: how an image of another size becomes one of this size, or covers it.
        keeps_size: leave the size to each use of the image, which resizes another part of it each time.
        reading: how arrays are read.
    """

    size: Size
    channels: int | None = None
    center_crop: bool = False
    resizing: Resizing = COVERING
    keeps_size: bool = False
    reading: ArrayReading = AS_WRITTEN


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image.

    Attributes:
        pixels: (C, h, w), of the requested size or to be cropped to it.
        enlarged: whether it was smaller.
        low: the smallest value before it was resized; of 8 bits 0, unless a range is checked.
        high: the largest one; of 8 bits 255, unless a range is checked.
        suffix: of a file that holds such pixels.
        is_animated: whether the file has more images, which are not used.
    """

    pixels: np.ndarray
    enlarged: bool
    low: float = 0
    high: float = 255
    suffix: str = ".png"
    is_animated: bool = False

    @property
    def kind(self) -> tuple[int, str]:
        """Number of channels, and dtype."""
        return int(self.pixels.shape[0]), self.pixels.dtype.name


def decode_image(payload: Payload, preprocessing: Preprocessing) -> DecodedImage:
    """Decode and preprocess an image, passed as its file, the file's bytes, or an array.

    Of an animation the first frame is used.

    Raises:
        UnreadableImage: the image cannot be decoded, or is a strip that could not be cropped.
        UnsupportedImage: it needs an option, a package or a conversion, or its values are outside the range.
    """
    data_range = preprocessing.reading.data_range
    raw = read_image(payload, preprocessing.reading)
    low, high = _extremes(raw, data_range)
    limits = data_range or limits_of(raw.dtype, None)
    converted = _convert(raw, preprocessing.channels, preprocessing.resizing, limits)
    surface = Surface(limits, converted.has_alpha, raw.has_alpha and not converted.has_alpha)
    return DecodedImage(*_fit(converted, preprocessing, surface), low, high, raw.suffix, raw.is_animated)


def _fit(image: RawImage, preprocessing: Preprocessing, surface: Surface) -> tuple[np.ndarray, bool]:
    """Resize an image, unless that is left to its uses: its pixels (C, h, w), and whether it was smaller."""
    own, size, resizing = size_of(image.picture), preprocessing.size, preprocessing.resizing
    try:
        target = resized_size(own, size, resizing.mode)
        if preprocessing.keeps_size:
            values = image.values
        else:
            values = fit(image.picture, size, resizing, preprocessing.center_crop, surface)
    except ConfigError:
        raise
    except ValueError as error:
        raise UnreadableImage(str(error)) from None
    # A copy, because Pillow's own array is read-only, which torch warns about.
    return np.array(values.transpose(2, 0, 1), order="C"), target[0] > own[0] or target[1] > own[1]


def _extremes(raw: RawImage, data_range: Range | None) -> tuple[float, float]:
    """The smallest and the largest value of an image, inside the range."""
    if raw.dtype == np.uint8 and data_range is None:
        return 0.0, 255.0
    values = raw.values
    low, high = float(values.min()), float(values.max())
    if data_range is not None:
        ends = range_of(values.dtype, data_range)
        if low < ends[0] or high > ends[1]:
            raise UnsupportedImage(outside_range(low, high, data_range))
    return low, high


def _convert(raw: RawImage, channels: int | None, resizing: Resizing, limits: Range) -> RawImage:
    """Return the image with this number of channels; dropped transparency becomes the background.

    Raises:
        UnsupportedImage: the channels of an array are no colors that could be converted.
    """
    own = raw.num_channels
    if channels in (None, own):
        return raw
    if channels not in MODE_OF_CHANNELS or own not in MODE_OF_CHANNELS or (own == 4 and not raw.has_alpha):
        raise UnsupportedImage(
            f"it has {own} channels, which --channels {channels} (or a first stage of as many) does not change: only"
            " gray (1), color (3) and color with transparency (4, in PNG, TIFF and other formats that say so) are"
            " converted to each other"
        )
    if isinstance(raw.picture, np.ndarray):
        pixels = _convert_array(raw.picture, channels, resizing, limits)
        return replace(raw, picture=pixels, has_alpha=channels == 4)
    image = raw.picture
    if raw.has_alpha:
        background = Image.new("RGBA", image.size, resizing.flat_color)
        background.alpha_composite(image)
        image = background.convert("RGB")
    return replace(raw, picture=image.convert(MODE_OF_CHANNELS[channels]), has_alpha=channels == 4)


def _convert_array(pixels: np.ndarray, channels: int, resizing: Resizing, limits: Range) -> np.ndarray:
    """An array (H, W, 1, 3 or 4) with other channels, where the last of four is transparency."""
    low, high = limits
    values = pixels.astype(np.float64)
    if values.shape[2] == 4:
        opacity = (values[..., 3:] - low) / (high - low)
        background = low + np.array(resizing.flat_color) / 255 * (high - low)
        values = values[..., :3] * opacity + background * (1 - opacity)
    if channels == 1:
        values = values @ LUMA[:, None]
    elif values.shape[2] == 1:
        values = values.repeat(3, axis=2)
    if channels == 4:
        values = np.concatenate([values, np.full_like(values[..., :1], high)], axis=2)
    return (values.round() if pixels.dtype.kind in "iu" else values).astype(pixels.dtype)

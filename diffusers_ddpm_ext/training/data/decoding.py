"""Decoding of an image file to pixels: turned upright, converted to the channels, and resized."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.training.data.bit_depth import (
    LEVELS_8_BIT,
    LEVELS_16_BIT,
    is_16_bit_gray,
    read_16_bit_gray,
    values_wider_than_8_bits,
)
from diffusers_ddpm_ext.training.data.image_files import Payload, open_image
from diffusers_ddpm_ext.training.data.resizing import (
    COVERING,
    Picture,
    Resizing,
    Size,
    Surface,
    fit,
    resized_size,
    size_of,
)

CHANNEL_NAMES = {1: "grayscale", 3: "color", 4: "color with transparency"}
MODE_OF_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
ANIMATED_FORMATS = ("GIF", "PNG", "WEBP", "AVIF", "FLI", "TIFF")
"""Formats whose further frames or pages are images of their own; those of an MPO are parts of the same photograph."""


class UnreadableImage(Exception):
    """An image that cannot be decoded. The text is the reason, without the image's name."""


@dataclass(frozen=True)
class Preprocessing:
    """What is done to every image once.

    Attributes:
        size: height and width that the images will have.
        channels: 1, 3 or 4; None keeps those of the file.
        center_crop: cut the center out of an image that covers the size; otherwise it is kept, to be cropped at random
            places later.
        resizing: how an image of another size becomes one of this size, or covers it.
        keeps_size: leave the size to each use of the image, which resizes another part of it each time.
    """

    size: Size
    channels: int | None = None
    center_crop: bool = False
    resizing: Resizing = COVERING
    keeps_size: bool = False


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image: pixels (C, h, w), uint8 or uint16, of the requested size or to be cropped to it.

    ``enlarged``: whether it was smaller. ``is_animated``: whether the file has more images, which are not used.
    """

    pixels: np.ndarray
    enlarged: bool
    is_animated: bool = False

    @property
    def kind(self) -> tuple[int, int]:
        """Number of channels, and number of values that a pixel can have: 256 or 65536."""
        return int(self.pixels.shape[0]), levels_of(self.pixels)


def levels_of(pixels: np.ndarray | Tensor) -> int:
    """Number of values that a pixel of this dtype can have: 256 or 65536."""
    return LEVELS_8_BIT if pixels.itemsize == 1 else LEVELS_16_BIT


def decode_image(payload: Payload, preprocessing: Preprocessing) -> DecodedImage:
    """Decode and preprocess an image, passed as its file or the file's bytes.

    Of an animation the first frame is used.

    Raises:
        UnreadableImage: the image cannot be decoded, or is a strip that could not be cropped.
        ConfigError: its values are wider than 8 bits and it is not one channel of 16 bits.
    """
    if payload is None:
        raise UnreadableImage("it is empty")
    try:
        with open_image(payload) as (image, content):
            is_16_bit = is_16_bit_gray(image, content)
            unsupported = None if is_16_bit else values_wider_than_8_bits(image, content)
            if unsupported is None:
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                if is_16_bit:
                    picture, surface = _repeat_channel(read_16_bit_gray(image), preprocessing.channels)
                else:
                    picture, surface = _convert(image, preprocessing)
                is_animated = _is_animated(image)
    except UnidentifiedImageError:
        raise UnreadableImage("not an image that Pillow knows") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError, ...
        lines = str(error).strip().splitlines()
        raise UnreadableImage(printable(lines[0], 300) if lines else type(error).__name__) from error
    if unsupported is not None:
        raise ConfigError(
            f"{unsupported} are not supported yet (truncating them to 8 bits would lose most of it): convert it to"
            " 8 bits per channel, or to one channel of 16 bits (PNG, TIFF, PGM)."
        )
    return _fit(picture, preprocessing, surface, is_animated)


def _is_animated(image: Image.Image) -> bool:
    """Whether the file of a decoded image has more than one."""
    with suppress(Exception):  # a damaged second frame, which is not used
        return image.format in ANIMATED_FORMATS and bool(getattr(image, "is_animated", False))
    return False


def _repeat_channel(gray: np.ndarray, channels: int | None) -> tuple[np.ndarray, Surface]:
    """Values (h, w) of 16 bits as an array (h, w, C): as color with three channels, and opaque with a fourth."""
    if channels not in (3, 4):
        return gray[..., None], Surface()
    color = np.dstack([gray] * 3)
    return (
        (color, Surface())
        if channels == 3
        else (np.dstack([color, np.full_like(gray, 65535)]), Surface(has_alpha=True))
    )


def _natural_channels(image: Image.Image) -> int:
    """Channels of a decoded image: a palette is color, grayscale with alpha has transparency."""
    if image.mode in ("1", "L"):
        return 1
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        return 4
    if image.mode == "P" and image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
        return 4
    return 3


def _convert(image: Image.Image, preprocessing: Preprocessing) -> tuple[Image.Image, Surface]:
    """Return the image with the channels that are requested; dropped transparency becomes the background."""
    natural = _natural_channels(image)
    target = natural if preprocessing.channels is None else preprocessing.channels
    if natural == 4 and target != 4:
        foreground = image.convert("RGBA")
        image = Image.new("RGBA", foreground.size, preprocessing.resizing.flat_color)
        image.alpha_composite(foreground)
    if target == 1 and image.mode not in ("1", "L"):
        image = image.convert("RGB")  # a direct conversion of palettes and CMYK to gray would ignore their colors
    surface = Surface(has_alpha=target == 4, was_transparent=natural == 4 and target != 4)
    return image.convert(MODE_OF_CHANNELS[target]), surface


def _fit(picture: Picture, preprocessing: Preprocessing, surface: Surface, is_animated: bool) -> DecodedImage:
    """Resize an image, unless that is left to its uses."""
    own, size, resizing = size_of(picture), preprocessing.size, preprocessing.resizing
    try:
        target = resized_size(own, size, resizing.mode)
        if preprocessing.keeps_size:
            values = np.atleast_3d(np.asarray(picture))
        else:
            values = fit(picture, size, resizing, preprocessing.center_crop, surface)
    except ConfigError:
        raise
    except ValueError as error:
        raise UnreadableImage(str(error)) from None
    # A copy, because Pillow's own array is read-only, which torch warns about.
    pixels = np.array(values.transpose(2, 0, 1), order="C")
    return DecodedImage(pixels, target[0] > own[0] or target[1] > own[1], is_animated)

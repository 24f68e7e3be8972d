"""Decoding of an image file to pixels: turned upright, converted to the channels, resized and cropped."""

from __future__ import annotations

from dataclasses import dataclass, replace

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

Size = tuple[int, int]  # height, width in pixels
CHANNEL_NAMES = {1: "grayscale", 3: "color", 4: "color with transparency"}
MODE_OF_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
MAX_STRIP, MIN_STRIP_PIXELS = 100, 2**20
"""A resized image covers the size; a long strip may have so many times its pixels before it is cropped."""


class UnreadableImage(Exception):
    """An image that cannot be decoded. The text is the reason, without the image's name."""


@dataclass(frozen=True)
class Preprocessing:
    """What is done to every image once."""

    size: Size
    channels: int | None = None  # 1, 3 or 4; None keeps those of the file
    center_crop: bool = False  # otherwise the uncropped image is kept, to be cropped at random places later


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image: pixels (C, h, w), uint8 or uint16, h and w at least the requested size."""

    pixels: np.ndarray
    enlarged: bool

    @property
    def kind(self) -> tuple[int, int]:
        """Number of channels, and number of values that a pixel can have: 256 or 65536."""
        return int(self.pixels.shape[0]), levels_of(self.pixels)


def levels_of(pixels: np.ndarray | Tensor) -> int:
    """Number of values that a pixel of this dtype can have: 256 or 65536."""
    return LEVELS_8_BIT if pixels.itemsize == 1 else LEVELS_16_BIT


def decode_image(payload: Payload, preprocessing: Preprocessing) -> DecodedImage:
    """Decode and preprocess an image, passed as its file or the file's bytes.

    The short side is resized with antialiasing (bilinear), so that the image just covers the requested size. Of an
    animation the first frame is used.

    Raises:
        UnreadableImage: the image cannot be decoded.
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
                if is_16_bit:  # Pillow resizes 16 bits well only as floats, which hold them exactly
                    converted = Image.fromarray(read_16_bit_gray(image).astype(np.float32))
                else:
                    converted = _convert(image, preprocessing.channels)
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
    decoded = _resize(converted, preprocessing)
    if is_16_bit and preprocessing.channels in (3, 4):
        return replace(decoded, pixels=_repeat_channel(decoded.pixels, preprocessing.channels))
    return decoded


def _repeat_channel(pixels: np.ndarray, channels: int) -> np.ndarray:
    """One channel of 16 bits as color, opaque if there is a fourth channel."""
    color = pixels.repeat(3, axis=0)
    return color if channels == 3 else np.concatenate([color, np.full_like(pixels, 65535)])


def _natural_channels(image: Image.Image) -> int:
    """Channels of a decoded image: a palette is color, grayscale with alpha has transparency."""
    if image.mode in ("1", "L"):
        return 1
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        return 4
    if image.mode == "P" and image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
        return 4
    return 3


def _convert(image: Image.Image, channels: int | None) -> Image.Image:
    """Return the image with this number of channels; dropped transparency becomes white."""
    natural = _natural_channels(image)
    target = natural if channels is None else channels
    if natural == 4 and target != 4:
        foreground = image.convert("RGBA")
        image = Image.new("RGBA", foreground.size, "white")
        image.alpha_composite(foreground)
    if target == 1 and image.mode not in ("1", "L"):
        image = image.convert("RGB")  # a direct conversion of palettes and CMYK to gray would ignore their colors
    return image.convert(MODE_OF_CHANNELS[target])


def _resize(image: Image.Image, preprocessing: Preprocessing) -> DecodedImage:
    """Resize so that the image just covers the size, and crop its center if requested."""
    height, width = preprocessing.size
    enlarged = image.height < height or image.width < width
    if height * image.width >= width * image.height:
        scaled = (max(width, image.width * height // image.height), height)
    else:
        scaled = (width, max(height, image.height * width // image.width))
    if scaled[0] * scaled[1] > max(MAX_STRIP * height * width, MIN_STRIP_PIXELS):
        raise UnreadableImage(
            f"{image.width:,} x {image.height:,} pixels are a strip, which would be resized to {scaled[0]:,} x"
            f" {scaled[1]:,}: crop it"
        )
    if image.size != scaled:
        image = image.resize(scaled, Image.Resampling.BILINEAR)
    if preprocessing.center_crop:
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    values = np.asarray(image)
    if image.mode == "F":
        values = values.round().clip(0, 65535).astype(np.uint16)
    # A copy, because Pillow's own array is read-only, which torch warns about.
    return DecodedImage(np.array(np.atleast_3d(values).transpose(2, 0, 1), order="C"), enlarged)

"""How a file becomes pixels: decoded once before the run, then kept in memory or decoded again.

Every image is decoded at the start, so that a broken one is named there and not in the middle of a night. What was
decoded stays in memory, resized, with the depth of its files (``PackedImages``); where there is too much of it, it is
decoded again whenever it is asked for (``LazyImages``).
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.data.bit_depth import DEEP, SHALLOW, deep_values, is_deep_grey, wide_values

Size = tuple[int, int]  # height, width in pixels
CHANNEL_NAMES = {1: "grey", 3: "colour", 4: "colour with transparency"}
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class BadImage(Exception):
    """An image that cannot be decoded. The text is the reason, without its name."""


@dataclass(frozen=True)
class Preparation:
    """What is done to every image once.

    Attributes:
        size: height and width that the images are resized and cropped to, in pixels.
        channels: 1, 3 or 4; None keeps those of the file.
        center_crop: crop now. Otherwise the whole resized image is kept, to be cropped in random places later.
    """

    size: Size
    channels: int | None = None
    center_crop: bool = False


@dataclass(frozen=True)
class Picture:
    """One decoded image: pixels (C, h, w), uint8 or uint16, with h and w at least the size asked for."""

    pixels: np.ndarray
    enlarged: bool

    @property
    def levels(self) -> int:
        """Values that a pixel can take: 256 or 65536."""
        return levels_of(self.pixels)

    @property
    def channels(self) -> int:
        """Number of channels."""
        return int(self.pixels.shape[0])


def levels_of(pixels: np.ndarray | Tensor) -> int:
    """Values that a pixel of this type can take: 256 or 65536."""
    return SHALLOW if pixels.itemsize == 1 else DEEP


def read_picture(payload: bytes | Path | None, preparation: Preparation) -> Picture:
    """Decode, turn upright, convert and resize one image.

    The short side is resized with antialiasing (bilinear), so that the image just covers the size asked for. Of an
    animation the first frame is taken.

    Raises:
        BadImage: the image cannot be decoded.
        ConfigError: its values are wider than 8 bits, and not one channel of 16.
    """
    if payload is None:
        raise BadImage("it is empty")
    try:
        with Image.open(io.BytesIO(payload) if isinstance(payload, bytes) else payload) as image:
            deep = is_deep_grey(image, payload)
            wide = None if deep else wide_values(image, payload)
            if wide is None:
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                # Of 16 bits Pillow resizes only floats well; they hold them exactly.
                whole = Image.fromarray(deep_values(image).astype(np.float32)) if deep else None
                plain = _convert(image, preparation.channels) if whole is None else whole
    except UnidentifiedImageError:
        raise BadImage("not an image that Pillow knows") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError, ...
        lines = str(error).strip().splitlines()
        raise BadImage(lines[0] if lines else type(error).__name__) from error
    if wide is not None:
        raise ConfigError(
            f"{wide} are not supported yet (cutting them to 8 bits would lose most of it): convert it to 8 bits a"
            " channel, or to one channel of 16 bits (PNG, TIFF, PGM)."
        )
    picture = _fit(plain, preparation)
    return picture if plain.mode != "F" else replace(picture, pixels=_deep_channels(picture, preparation.channels))


def _deep_channels(picture: Picture, channels: int | None) -> np.ndarray:
    """One channel of 16 bits, in so many: all alike, and opaque."""
    if channels in (None, 1):
        return picture.pixels
    colour = picture.pixels.repeat(3, axis=0)
    return colour if channels == 3 else np.concatenate([colour, np.full_like(picture.pixels, 65535)])


def _natural_channels(image: Image.Image) -> int:
    """Count the channels of a decoded image: a palette is colour, grey with alpha has transparency."""
    if image.mode in ("1", "L"):
        return 1
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        return 4
    if image.mode == "P" and image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
        return 4
    return 3


def _convert(image: Image.Image, channels: int | None) -> Image.Image:
    """Return the image with so many channels; what is transparent turns white where transparency goes."""
    natural = _natural_channels(image)
    wanted = natural if channels is None else channels
    if natural == 4 and wanted != 4:
        upper = image.convert("RGBA")
        image = Image.new("RGBA", upper.size, "white")
        image.alpha_composite(upper)
    if wanted == 1 and image.mode not in ("1", "L"):
        image = image.convert("RGB")  # palettes and CMYK have no direct way to grey that looks at their colours
    return image.convert(PIL_MODES[wanted])


def _fit(image: Image.Image, preparation: Preparation) -> Picture:
    """Resize so that the image just covers the size, and crop its middle where that is asked for."""
    height, width = preparation.size
    enlarged = image.height < height or image.width < width
    if height * image.width >= width * image.height:
        scaled = (max(width, image.width * height // image.height), height)
    else:
        scaled = (width, max(height, image.height * width // image.width))
    if image.size != scaled:
        image = image.resize(scaled, Image.Resampling.BILINEAR)
    if preparation.center_crop:
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    values = np.asarray(image)
    if image.mode == "F":
        values = values.round().clip(0, 65535).astype(np.uint16)
    # A copy, because Pillow's own array cannot be written to, and torch warns of that.
    return Picture(np.array(np.atleast_3d(values).transpose(2, 0, 1), order="C"), enlarged)

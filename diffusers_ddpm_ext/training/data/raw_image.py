"""Reading of an image in its own size, depth and channels: turned upright, nothing else changed. Loads no torch."""

from __future__ import annotations

import ctypes
import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from diffusers_ddpm_ext.errors import printable
from diffusers_ddpm_ext.training.data.array_images import (
    AS_WRITTEN,
    ArrayLayout,
    ArrayReading,
    UnreadableImage,
    UnsupportedImage,
    array_of_lists,
    as_image,
    check_finite,
    is_array_file,
    read_array_image,
)
from diffusers_ddpm_ext.training.data.array_readers import (
    CODECS,
    ORIENTATION_TAG,
    TIFF_MAGIC,
    is_plain_tiff,
    read_deep_color,
    read_tiff,
    turn_upright,
)
from diffusers_ddpm_ext.training.data.bit_depth import is_16_bit_gray, read_16_bit_gray, values_wider_than_8_bits
from diffusers_ddpm_ext.training.data.image_files import (
    ListCell,
    Payload,
    RemoteFile,
    check_decoded_bytes,
    open_image,
    open_image_file,
)

# What they print about a file is in the exception, too, or another reader reads it.
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)
with suppress(AttributeError, OSError):  # a Pillow that has libtiff in itself
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)
MODE_OF_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
TURNED = range(2, 9)
"""EXIF's orientations of images that are not upright in the file."""
ANIMATED_FORMATS = ("GIF", "PNG", "WEBP", "AVIF", "FLI", "TIFF")
"""Formats whose further frames or pages are images of their own; those of an MPO are parts of the same photograph."""


@dataclass(frozen=True)
class RawImage:
    """An image as its file has it.

    Attributes:
        picture: an image of 8 bits, with Pillow's mode L, RGB or RGBA; or an array (H, W, C).
        mode: Pillow's mode of the file; for an array, its dtype and channels, as in ``float32 x 5``.
        suffix: of a file that holds such pixels: ``.png``, ``.npy``, ``.npz`` or ``.tif``.
        has_alpha: whether the last channel is transparency.
        is_turned: whether the file has it in another orientation.
        is_animated: whether it is the first of several frames.
    """

    picture: Image.Image | np.ndarray
    mode: str
    suffix: str = ".png"
    has_alpha: bool = False
    is_turned: bool = False
    is_animated: bool = False

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the pixels."""
        return self.picture.dtype if isinstance(self.picture, np.ndarray) else np.dtype(np.uint8)

    @property
    def num_channels(self) -> int:
        """Channels of the image."""
        picture = self.picture
        return int(picture.shape[2]) if isinstance(picture, np.ndarray) else len(picture.getbands())

    @property
    def values(self) -> np.ndarray:
        """The pixels, (H, W, C); a copy of those that Pillow holds."""
        return np.atleast_3d(np.asarray(self.picture))


def read_image(payload: Payload, reading: ArrayReading = AS_WRITTEN) -> RawImage:
    """Read an image, passed as its file, the file's bytes, or an array.

    Raises:
        UnreadableImage: it cannot be decoded, or a value is NaN or infinite.
        UnsupportedImage: it needs an option, a package or a conversion.
    """
    if payload is None:
        raise UnreadableImage("it is empty")
    try:
        if isinstance(payload, ListCell):
            payload = array_of_lists(payload.values)
        if isinstance(payload, np.ndarray):
            return _from_array(payload, ".npy", reading)
        if isinstance(payload, RemoteFile):
            payload = payload.read()
        start = _start(payload)
        if is_array_file(start):
            array = read_array_image(payload, reading.key)
            return _from_array(array, ".npy" if start[:1] == b"\x93" else ".npz", reading)
        return _from_picture(payload, start, reading)
    except UnidentifiedImageError:
        raise UnreadableImage("not an image that Pillow knows") from None
    except (UnreadableImage, UnsupportedImage):
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError, ...
        lines = str(error).strip().splitlines()
        raise UnreadableImage(printable(lines[0].rstrip("."), 300) if lines else type(error).__name__) from error


def _start(payload: bytes | Path) -> bytes:
    """The first bytes of a file."""
    if isinstance(payload, bytes):
        return payload[:8]
    with open_image_file(payload) as file:
        return file.read(8)


def _from_array(array: np.ndarray, suffix: str, reading: ArrayReading, **facts: bool) -> RawImage:
    pixels = as_image(array, reading)
    check_finite(pixels)
    mode = f"{pixels.dtype} x {pixels.shape[2]}"
    if pixels.dtype == np.uint8 and pixels.shape[2] in (1, 3):  # resized as the same image in another format is
        return RawImage(Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels), mode, suffix, **facts)
    return RawImage(pixels, mode, suffix, **facts)


def _from_picture(payload: bytes | Path, start: bytes, reading: ArrayReading) -> RawImage:
    """Read an image file: by Pillow if it keeps all of it, otherwise by another reader."""
    try:
        with open_image(payload) as (image, content):
            if image.format != "TIFF" or is_plain_tiff(image):
                return _decode(image, content, reading)
    except UnidentifiedImageError:
        if not start.startswith(TIFF_MAGIC):
            raise
    array, facts = read_tiff(payload, check_decoded_bytes)
    layout: ArrayLayout | None = "channels_last" if facts.pop("is_layout_known") else reading.layout
    orientation = facts.pop("orientation")
    raw = _from_array(array, ".tif", replace(reading, layout=layout), **facts)
    return _upright(raw, orientation)


def _upright(raw: RawImage, orientation: int) -> RawImage:
    """An array turned by EXIF's orientation, with gray and transparency as color."""
    pixels = turn_upright(raw.values, orientation)
    if raw.has_alpha and pixels.shape[2] == 2:
        pixels = pixels[..., [0, 0, 0, 1]]
    mode = f"{pixels.dtype} x {pixels.shape[2]}"
    return RawImage(pixels, mode, raw.suffix, raw.has_alpha, orientation in TURNED, raw.is_animated)


def _decode(image: Image.Image, content: bytes | Path, reading: ArrayReading) -> RawImage:
    """Decode an opened image of Pillow's."""
    mode = image.mode
    is_16_bit = is_16_bit_gray(image, content)
    is_float = image.mode == "F"  # 32 bits in every format, which Pillow keeps
    wide = None if is_16_bit or is_float else values_wider_than_8_bits(image, content)
    if wide is not None and (wide != "16-bit values" or image.format not in CODECS):
        raise UnsupportedImage(
            f"{wide} in {image.format} files are not read: convert it to PNG or TIFF with 16 bits per channel, or to"
            " .npy"
        )
    if wide is not None:
        pixels, orientation = read_deep_color(content, str(image.format)), _orientation(image)
        if "transparency" in image.info:  # one transparent color: ignored in color of 8 bits, too
            pixels = pixels[..., :3]
        raw = _from_array(pixels, ".png", ArrayReading(layout="channels_last"), has_alpha=pixels.shape[2] in (2, 4))
        return _upright(raw, orientation)
    image.load()
    is_turned = _orientation(image) in TURNED
    ImageOps.exif_transpose(image, in_place=True)
    if is_float:
        return _from_array(np.array(image), ".npy", reading, is_turned=is_turned)
    if is_16_bit:
        pixels = read_16_bit_gray(image)[..., None]
        suffix = ".tif" if image.format == "TIFF" else ".png"
        return RawImage(pixels, mode, suffix, is_turned=is_turned, is_animated=_is_animated(image))
    own_mode = MODE_OF_CHANNELS[natural_channels(image)]
    # Pillow copies an image that has the mode; one of several frames it loses when it looks for the next one.
    is_kept = image.mode == own_mode and image.format not in ANIMATED_FORMATS
    picture = image if is_kept else image.convert(own_mode)
    return RawImage(picture, mode, ".png", picture.mode == "RGBA", is_turned, _is_animated(image))


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation of an image, which may have to be decoded for it; 1 is upright."""
    with suppress(Exception):  # damaged metadata: the image is read as it is
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    return 1


def _is_animated(image: Image.Image) -> bool:
    """Whether the file of a decoded image has more than one."""
    with suppress(Exception):  # a damaged second frame, which is not used
        return image.format in ANIMATED_FORMATS and bool(getattr(image, "is_animated", False))
    return False


def natural_channels(image: Image.Image) -> int:
    """Channels of a decoded image: a palette is color, grayscale with alpha has transparency."""
    if image.mode in ("1", "L"):
        return 1
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        return 4
    if image.mode == "P" and image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
        return 4
    return 3

"""Bit depth of image files: which images with more than 8 bits per channel can be read without loss.

Pillow opens 48-bit color as RGB and silently truncates it to 8 bits per channel, so an image's mode does not show its
depth. It returns a single 16-bit channel unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LEVELS_8_BIT, LEVELS_16_BIT = 256, 65536  # values that a pixel can have
RAW_MODE_16_BIT_GRAY = re.compile(r"I;16[BLNR]?")
PHOTOMETRIC_TAG = 262  # of TIFF 6.0; value 0: 0 is white


def is_16_bit_gray(image: Image.Image, payload: bytes | Path) -> bool:
    """Whether an opened, not yet decoded image has one channel of 16 bits that Pillow decodes without loss."""
    if image.mode not in ("I", "I;16", "I;16B", "I;16L"):
        return False
    if image.format == "JPEG2000":
        return _depth_in_header(image.format, payload) == 16
    raw_modes = list(_raw_modes(image))
    return (
        image.format in ("PNG", "TIFF", "PPM")
        and bool(raw_modes)
        and all(map(RAW_MODE_16_BIT_GRAY.fullmatch, raw_modes))
    )


def read_16_bit_gray(image: Image.Image) -> NDArray[np.uint16]:
    """Values of a 16-bit grayscale image, (height, width): 0 is black, 65535 white."""
    values = np.asarray(image).astype(np.uint16)
    tags = getattr(image, "tag_v2", {})
    return 65535 - values if tags.get(PHOTOMETRIC_TAG) == 0 else values


def values_wider_than_8_bits(image: Image.Image, payload: bytes | Path) -> str | None:
    """Describe the values wider than 8 bits of an opened, not yet decoded image; None if it has none."""
    if image.mode == "F":
        return "float values"
    if image.mode.startswith("I"):
        return "16-bit or 32-bit values"
    if any(re.search(r";(16[BLNS]|32)", raw_mode) for raw_mode in _raw_modes(image)):
        return "16-bit values"
    for tile in getattr(image, "tile", ()):
        top = tile[3][-1] if isinstance(tile[3], tuple) else tile[3]
        if tile[0].startswith("ppm") and isinstance(top, int) and top > 255:
            return f"values up to {top}"
    bits = _depth_in_header(image.format, payload)
    return f"{bits}-bit values" if bits > 8 else None


def _raw_modes(image: Image.Image) -> Iterator[str]:
    """Pillow's names for the layout of the values in the file, which a tile lists next to its compression."""
    for tile in getattr(image, "tile", ()):
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        yield from (argument for argument in arguments if isinstance(argument, str) and ";" in argument)


def _depth_in_header(image_format: str | None, payload: bytes | Path) -> int:
    """Bits per channel of the two formats whose depth Pillow does not report; 8 for all others."""
    if image_format not in ("JPEG2000", "AVIF"):
        return 8
    data = payload if isinstance(payload, bytes) else payload.read_bytes()
    if image_format == "JPEG2000":
        start = data.find(b"\xff\x4f\xff\x51")  # start of codestream, then its SIZ segment with the depth, Ssiz
        return (data[start + 42] & 0x7F) + 1 if 0 <= start < len(data) - 42 else 8
    start = data.find(b"av1C")  # AV1's configuration box: the third byte holds the flags of 10 and 12 bits
    flags = data[start + 6] if 0 <= start < len(data) - 6 else 0
    return 8 if not flags & 0x40 else 12 if flags & 0x20 else 10

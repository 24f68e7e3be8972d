"""How many bits a channel an image file holds, and which of those with more than 8 can be read whole.

Pillow opens 48-bit colour as RGB and cuts it to 8 bits a channel without a word, so the mode of an image does not
tell. One channel of 16 bits it hands over as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SHALLOW, DEEP = 256, 65536  # values that a pixel of 8 and of 16 bits can take
GREY_WORD = re.compile(r"I;16[BLNR]?")
PHOTOMETRIC = 262  # TIFF 6.0's tag; 0 says that 0 is white


def is_deep_grey(image: Image.Image, payload: bytes | Path) -> bool:
    """Whether an opened, not yet decoded image is one channel of 16 bits that Pillow can hand over whole.

    Args:
        image: of which only the header has been read.
        payload: its file, or the bytes of it.
    """
    if image.mode not in ("I", "I;16", "I;16B", "I;16L"):
        return False
    if image.format == "JPEG2000":
        return _depth_in_header(image.format, payload) == 16
    words = list(_tile_words(image))
    return image.format in ("PNG", "TIFF", "PPM") and bool(words) and all(map(GREY_WORD.fullmatch, words))


def deep_values(image: Image.Image) -> NDArray[np.uint16]:
    """The values of such an image, (height, width): 0 is black, 65535 white."""
    values = np.asarray(image).astype(np.uint16)
    tags = getattr(image, "tag_v2", {})
    return 65535 - values if tags.get(PHOTOMETRIC) == 0 else values


def wide_values(image: Image.Image, payload: bytes | Path) -> str | None:
    """Say which values wider than 8 bits an opened, not yet decoded image holds; None where it holds none.

    Args:
        image: of which only the header has been read.
        payload: its file, or the bytes of it.
    """
    if image.mode == "F":
        return "float values"
    if image.mode.startswith("I"):
        return "16-bit or 32-bit values"
    if any(re.search(r";(16[BLNS]|32)", word) for word in _tile_words(image)):
        return "16-bit values"
    for tile in getattr(image, "tile", ()):
        top = tile[3][-1] if isinstance(tile[3], tuple) else tile[3]
        if tile[0].startswith("ppm") and isinstance(top, int) and top > 255:
            return f"values up to {top}"
    bits = _depth_in_header(image.format, payload)
    return f"{bits}-bit values" if bits > 8 else None


def _tile_words(image: Image.Image) -> Iterator[str]:
    """How Pillow calls the layout of an image's values in the file; compressions stand beside it."""
    for tile in getattr(image, "tile", ()):
        told = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        yield from (word for word in told if isinstance(word, str) and ";" in word)


def _depth_in_header(kind: str | None, payload: bytes | Path) -> int:
    """Read the bits a channel of the two formats whose depth Pillow keeps to itself; 8 for all others."""
    if kind not in ("JPEG2000", "AVIF"):
        return 8
    head = payload if isinstance(payload, bytes) else payload.read_bytes()
    if kind == "JPEG2000":
        start = head.find(b"\xff\x4f\xff\x51")  # start of codestream, then its SIZ segment with the depth, Ssiz
        return (head[start + 42] & 0x7F) + 1 if 0 <= start < len(head) - 42 else 8
    start = head.find(b"av1C")  # AV1's configuration box: the third byte holds the flags of 10 and 12 bits
    flags = head[start + 6] if 0 <= start < len(head) - 6 else 0
    return 8 if not flags & 0x40 else 12 if flags & 0x20 else 10

"""Readers of what Pillow truncates: TIFF of any depth and number of bands, and color of 16 bits.

Pillow keeps 8 bits of each color, and of a TIFF with more bands than its modes have, the first ones. Those files are
read by `tifffile` and `imagecodecs`, which are optional.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusers_ddpm_ext.training.data.array_images import UnreadableImage, UnsupportedImage
from diffusers_ddpm_ext.training.data.image_files import open_image_file, turn_of

INSTALL = "pip install diffusers-ddpm-ext[arrays]"
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
TIFF_TAGS = {"bits": 258, "photometric": 262, "samples": 277, "sample_format": 339, "description": 270}
ORIENTATION_TAG = 274
UNSIGNED = 1
WRITERS_OF_STACKS = ("{", "ImageJ=", "<?xml")
"""How the description of a TIFF begins whose pages are axes of one array: tifffile's, ImageJ's, OME's."""
CODECS = {"PNG": "png_decode", "JPEG2000": "jpeg2k_decode"}
"""Decoders of color of 16 bits, of imagecodecs."""
CheckSize = Callable[[int, int], None]
"""Refuses an image by the bytes of its pixels and those of its file."""


def import_reader(name: str, what: str) -> Any:
    """Import an optional package; an UnsupportedImage with its install line if it is missing."""
    try:
        return import_module(name)
    except ImportError:
        raise UnsupportedImage(f"{what} need `{name}`: {INSTALL}") from None


def is_plain_tiff(image: Image.Image) -> bool:
    """Whether Pillow reads all of an opened TIFF: unsigned values of up to 8 bits, or 16 in gray, in every band."""
    tags = getattr(image, "tag_v2", {})
    formats, bits = _numbers(tags, "sample_format"), _numbers(tags, "bits")
    samples = _numbers(tags, "samples")
    if {*formats} - {UNSIGNED} or max(bits, default=1) > (16 if len(bits) == 1 else 8):
        return False
    if len(bits) == 1 and bits[0] > 8 and not image.mode.startswith("I;16"):
        return False
    bands = len(image.getbands())
    if samples and samples[0] != (1 if image.mode == "P" else 2 if image.mode == "PA" else bands):
        return False
    return getattr(image, "n_frames", 1) == 1 or not str(tags.get(TIFF_TAGS["description"], "")).startswith(
        WRITERS_OF_STACKS
    )


def _numbers(tags: Any, name: str) -> tuple[int, ...]:
    value = tags.get(TIFF_TAGS[name], ())
    return tuple(value) if isinstance(value, tuple) else (value,)


def read_tiff(payload: bytes | Path, check_size: CheckSize) -> tuple[np.ndarray, dict[str, Any]]:
    """Read a TIFF of any depth: an array of its pixels, and facts about it.

    Returns:
        The array: (H, W) or (H, W, C) where the file says which axis has the channels, otherwise as it was written.
        The facts are arguments of `RawImage`.

    Raises:
        UnsupportedImage: `tifffile` or `imagecodecs` is not installed, or its colors are neither gray nor RGB.
        UnreadableImage: it has too many axes.
    """
    tifffile = import_reader("tifffile", "TIFF files of other than 8 bits, or of more bands,")
    import_reader("imagecodecs", "TIFF files of other than 8 bits, or of more bands,")
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it logs what is wrong with a file before it raises
    content = payload if isinstance(payload, bytes) else _read(payload)
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        if not len(file.pages) or not file.series:
            raise UnreadableImage("it holds no image")
        series, page = file.series[0], file.pages[0]
        photometric = getattr(page.photometric, "name", str(page.photometric))
        if photometric not in ("MINISBLACK", "MINISWHITE", "RGB"):
            raise UnsupportedImage(f"TIFF files with colors of type {photometric} are not read: convert it to RGB")
        alpha = [getattr(extra, "name", str(extra)) for extra in page.extrasamples]
        if "ASSOCALPHA" in alpha:
            raise UnsupportedImage("TIFF files with premultiplied alpha are not read: save it with unassociated alpha")
        check_size(series.nbytes, len(content))
        with turn_of(series.nbytes):
            array, axes = series.asarray(maxworkers=1), series.axes
        orientation = page.tags.get(ORIENTATION_TAG)
    if photometric == "MINISWHITE" and array.dtype.kind == "u":
        array = np.iinfo(array.dtype).max - array
    array, is_layout_known, is_animated = _arrange(array, axes)
    return array, {
        "is_layout_known": is_layout_known,
        "is_animated": is_animated,
        "has_alpha": alpha == ["UNASSALPHA"] and array.ndim == 3 and array.shape[2] in (2, 4),
        "orientation": int(orientation.value) if orientation is not None else 1,
    }


def _arrange(array: np.ndarray, axes: str) -> tuple[np.ndarray, bool, bool]:
    """Put the axis of the channels last, take the first image along time and depth; whether each was known and done.

    ``axes`` has a letter for each axis: Y, X, S (samples) and C (channels), and Q where its meaning was not written.
    """
    is_animated = False
    for letter in [letter for letter in axes if letter not in "YXSCQ"]:
        place = axes.index(letter)
        is_animated |= array.shape[place] > 1
        array, axes = array.take(0, place), axes[:place] + axes[place + 1 :]
    channels = [place for place, letter in enumerate(axes) if letter in "SC"]
    if len(channels) > 1:
        raise UnreadableImage(f"its shape {array.shape} has two axes of channels")
    if channels and "Q" not in axes:
        array = np.moveaxis(array, channels[0], -1)
    return array, "Q" not in axes, is_animated


def read_deep_color(payload: bytes | Path, image_format: str) -> np.ndarray:
    """Read color of 16 bits, (H, W, C), uint16; ``image_format`` is one of `CODECS`.

    Raises:
        UnsupportedImage: `imagecodecs` is not installed.
    """
    codecs = import_reader("imagecodecs", f"{image_format} files of 16 bits per color")
    content = payload if isinstance(payload, bytes) else _read(payload)
    pixels: np.ndarray = getattr(codecs, CODECS[image_format])(content)
    return pixels


def _read(path: Path) -> bytes:
    with open_image_file(path) as file:
        return file.read()


def turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn an image (H, W, C) upright; ``orientation`` is EXIF's, 1 to 8, and any other number changes nothing."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels

"""Sheets of images: a batch of arrays in, one image file out. Needs Pillow alone."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from diffusers_ddpm_ext.utils.files import write_atomically

GAP = 4  # pixels between images
TILE = 96  # side, in pixels, that small images are enlarged to, about


def image_grid(
    images: ArrayLike, columns: int | None = None, enlarge: int | None = None, gap: int = GAP
) -> Image.Image:
    """Put images side by side, row by row, enlarged so that a person can see single pixels.

    Args:
        images: (N, C, H, W) in [-1, 1]; values outside are clipped. One channel is grey, three are RGB, four RGBA;
            with any other number the channels stand side by side in grey.
        columns: images a row; None makes the sheet about as wide as high.
        enlarge: side of the square that a pixel becomes (nearest neighbour); None enlarges small images.
        gap: width of the white lines between images, in pixels of the sheet.

    Returns:
        The sheet. What a last row lacks is white.

    Raises:
        ValueError: the array has another shape or no image, or a number is below its smallest value.
    """
    levels = _levels(images)
    if columns is None:
        columns = max(1, round(math.sqrt(len(levels) * levels.shape[1] / levels.shape[2])))
    if enlarge is None:
        enlarge = max(1, round(TILE / max(levels.shape[1:3])))
    if columns < 1 or enlarge < 1 or gap < 0:
        raise ValueError(f"columns={columns} and enlarge={enlarge} must be at least 1, gap={gap} at least 0.")
    columns = min(columns, len(levels))
    tiles = levels.repeat(enlarge, axis=1).repeat(enlarge, axis=2)
    count, height, width, depth = tiles.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, depth), 255, dtype=np.uint8)
    for place, tile in enumerate(tiles):
        top, left = place // columns * (height + gap), place % columns * (width + gap)
        sheet[top : top + height, left : left + width] = tile
    return Image.fromarray(sheet[..., 0] if depth == 1 else sheet)


def save_grid(images: ArrayLike, path: str | os.PathLike[str], **options: Any) -> Path:
    """Write the sheet of :func:`image_grid` to a file, which is there whole or not at all.

    Args:
        images: as for :func:`image_grid`.
        path: file to write; its extension says the format.
        **options: further arguments of :func:`image_grid`.

    Returns:
        The path.
    """
    sheet = image_grid(images, **options)
    kind = Image.registered_extensions().get(Path(path).suffix.lower(), "PNG")
    if sheet.mode == "RGBA" and kind == "JPEG":
        sheet = sheet.convert("RGB")
    return write_atomically(path, lambda file: sheet.save(file, kind))


def _levels(images: ArrayLike) -> NDArray[np.uint8]:
    """Turn (N, C, H, W) in [-1, 1] into (N, H, W, 1 | 3 | 4) in 0 .. 255."""
    values = np.asarray(images, dtype=np.float32)
    if values.ndim != 4 or 0 in values.shape:
        raise ValueError(f"images has shape {values.shape}; it must be (N, C, H, W) with at least one image.")
    levels = ((values.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8).transpose(0, 2, 3, 1)
    if levels.shape[3] not in (1, 3, 4):
        count, height, width, channels = levels.shape
        levels = levels.transpose(0, 1, 3, 2).reshape(count, height, channels * width, 1)
    return levels

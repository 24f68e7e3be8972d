"""Sheets of images: a batch of arrays in, one image file out. Only needs Pillow."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from diffusers_ddpm_ext.errors import printable
from diffusers_ddpm_ext.utils.files import write_atomically

GAP = 4  # pixels between images
TILE = 96  # approximate side, in pixels, of enlarged small images
CAPTION_HEIGHT = 14


def image_grid(
    images: ArrayLike,
    columns: int | None = None,
    enlarge: int | None = None,
    gap: int = GAP,
    captions: Sequence[str] | None = None,
) -> Image.Image:
    """Arrange images in a grid, row by row, enlarged so that single pixels are visible.

    Args:
        images: (N, C, H, W) in [-1, 1]; values outside are clipped. One channel is gray, three are RGB, four RGBA;
            with any other number the channels are placed side by side in gray.
        columns: images per row; None makes the sheet approximately square.
        enlarge: integer factor (nearest neighbor); None enlarges small images.
        gap: white pixels between images.
        captions: a text under each image, such as the name of its class; cut off at the image's width.

    Returns:
        The sheet. Missing images of the last row are white.

    Raises:
        ValueError: the array has another shape or no image, or an argument is out of its range.
    """
    levels = _levels(images)
    automatic = _layout(len(levels), *levels.shape[1:3])
    columns = automatic[0] if columns is None else columns
    enlarge = automatic[1] if enlarge is None else enlarge
    if columns < 1 or enlarge < 1 or gap < 0:
        raise ValueError(f"columns={columns} and enlarge={enlarge} must be at least 1, gap={gap} at least 0.")
    columns = min(columns, len(levels))
    tiles = levels.repeat(enlarge, axis=1).repeat(enlarge, axis=2)
    if captions is not None:
        if len(captions) != len(tiles):
            raise ValueError(f"captions has {len(captions)} texts for {len(tiles)} images; give one per image.")
        strips = [_caption(text, tiles.shape[2], tiles.shape[3]) for text in captions]
        tiles = np.concatenate([tiles, np.stack(strips)], axis=1)
    count, height, width, depth = tiles.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, depth), 255, dtype=np.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = tile
    return Image.fromarray(sheet[..., 0] if depth == 1 else sheet)


def _layout(count: int, height: int, width: int) -> tuple[int, int]:
    """Columns of an approximately square sheet, and the factor that makes single pixels visible."""
    return max(1, round(math.sqrt(count * height / width))), max(1, round(TILE / max(height, width)))


def grid_size(count: int, height: int, width: int, has_captions: bool = False) -> tuple[int, int]:
    """Height and width, in pixels, of the sheet that :func:`image_grid` makes by default."""
    columns, enlarge = _layout(count, height, width)
    columns = min(columns, count)
    tile_height = height * enlarge + (CAPTION_HEIGHT if has_captions else 0)
    return -(-count // columns) * (tile_height + GAP) - GAP, columns * (width * enlarge + GAP) - GAP


def save_grid(images: ArrayLike, path: str | os.PathLike[str], **options: Any) -> Path:
    """Write the sheet of :func:`image_grid` to a file, atomically; its suffix is the format.

    ``options`` are further arguments of :func:`image_grid`.
    """
    sheet = image_grid(images, **options)
    image_format = Image.registered_extensions().get(Path(path).suffix.lower(), "PNG")
    if sheet.mode == "RGBA" and image_format == "JPEG":
        sheet = sheet.convert("RGB")
    return write_atomically(path, lambda file: sheet.save(file, image_format))


def _caption(text: str, width: int, depth: int) -> NDArray[np.uint8]:
    """A strip of text, black on white: (CAPTION_HEIGHT, width, depth)."""
    strip = Image.new("L", (width, CAPTION_HEIGHT), 255)
    font, text = ImageFont.load_default(), printable(text)
    if isinstance(font, ImageFont.ImageFont):  # Pillow without FreeType: a font of Latin letters alone
        text = text.encode("latin-1", "replace").decode("latin-1")
    ImageDraw.Draw(strip).text((1, 1), text, fill=0, font=font)
    pixels = np.asarray(strip)[..., None].repeat(depth, axis=2)
    if depth == 4:
        pixels[..., 3] = 255
    return pixels


def _levels(images: ArrayLike) -> NDArray[np.uint8]:
    """Convert (N, C, H, W) in [-1, 1] to (N, H, W, 1 | 3 | 4) in 0 .. 255."""
    values = np.asarray(images, dtype=np.float32)
    if values.ndim != 4 or 0 in values.shape:
        raise ValueError(f"images has shape {values.shape}; it must be (N, C, H, W) with at least one image.")
    levels = ((values.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8).transpose(0, 2, 3, 1)
    if levels.shape[3] not in (1, 3, 4):
        count, height, width, channels = levels.shape
        levels = levels.transpose(0, 1, 3, 2).reshape(count, height, channels * width, 1)
    return levels

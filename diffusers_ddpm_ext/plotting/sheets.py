"""Sheets of images: a batch of arrays in, one image file out. Only needs Pillow."""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from diffusers_ddpm_ext.errors import printable
from diffusers_ddpm_ext.plotting.channels import channel_view
from diffusers_ddpm_ext.utils.files import write_atomically
from diffusers_ddpm_ext.utils.pixel_format import PixelFormat

GAP = 4  # pixels between images
TILE = 96  # approximate side, in pixels, of enlarged small images
CAPTION_HEIGHT, LINE_HEIGHT = 14, 12  # of a caption of one line, and of each further line
MAX_CAPTION_LINES = 3


def image_grid(
    images: ArrayLike,
    columns: int | None = None,
    enlarge: int | None = None,
    gap: int = GAP,
    captions: Sequence[str] | None = None,
    pixels: PixelFormat | None = None,
) -> Image.Image:
    """Arrange images in a grid, row by row, enlarged so that single pixels are visible.

    Args:
        images: (N, C, H, W) in [-1, 1]; values outside are clipped. One channel is gray, three are RGB, four RGBA; of
            any other number the first is drawn, unless ``pixels`` says which.
        columns: images per row; None makes the sheet approximately square.
        enlarge: integer factor (nearest neighbor); None enlarges small images.
        gap: white pixels between images.
        captions: a text under each image, such as its prompt or the name of its class; wrapped at the image's width
            into up to three lines, and cut after them.
        pixels: of the images; its channels or components for previews are drawn.

    Returns:
        The sheet. Missing images of the last row are white. A line at the bottom says which channels are drawn, where
        they are not all.

    Raises:
        ValueError: the array has another shape or no image, or an argument is out of its range.
    """
    values = np.asarray(images, dtype=np.float32)
    if values.ndim != 4 or 0 in values.shape:
        raise ValueError(f"images has shape {values.shape}; it must be (N, C, H, W) with at least one image.")
    view = channel_view(values.shape[1], pixels)
    levels = _levels(view(values))
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
        width, depth = tiles.shape[2:]
        wrapped = {text: _wrap(text, width) for text in captions}
        height = _caption_height(wrapped.values())
        strips = {text: _caption(lines, height, width, depth) for text, lines in wrapped.items()}
        tiles = np.concatenate([tiles, np.stack([strips[text] for text in captions])], axis=1)
    count, height, width, depth = tiles.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, depth), 255, dtype=np.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = tile
    if view.caption:
        lines = _wrap(view.caption, sheet.shape[1], None)
        sheet = np.concatenate([sheet, _caption(lines, _caption_height([lines]), sheet.shape[1], depth)])
    return Image.fromarray(sheet[..., 0] if depth == 1 else sheet)


def _layout(count: int, height: int, width: int) -> tuple[int, int]:
    """Columns of an approximately square sheet, and the factor that makes single pixels visible."""
    return max(1, round(math.sqrt(count * height / width))), max(1, round(TILE / max(height, width)))


def grid_size(count: int, height: int, width: int, captions: Sequence[str] = (), note: str = "") -> tuple[int, int]:
    """Height and width, in pixels, of the sheet that `image_grid` makes by default.

    Args:
        count: number of images.
        height: of an image.
        width: of an image.
        captions: the texts that occur under the images.
        note: the line at the bottom.
    """
    columns, enlarge = _layout(count, height, width)
    columns = min(columns, count)
    strip = _caption_height(_wrap(text, width * enlarge) for text in captions) if captions else 0
    tile_height = height * enlarge + strip
    sheet_width = columns * (width * enlarge + GAP) - GAP
    bottom = _caption_height([_wrap(note, sheet_width, None)]) if note else 0
    return -(-count // columns) * (tile_height + GAP) - GAP + bottom, sheet_width


def save_grid(images: ArrayLike, path: str | os.PathLike[str], **options: Any) -> Path:
    """Write the sheet of `image_grid` to a file, atomically; its suffix is the format.

    ``options`` are further arguments of `image_grid`.
    """
    sheet = image_grid(images, **options)
    image_format = Image.registered_extensions().get(Path(path).suffix.lower(), "PNG")
    if sheet.mode == "RGBA" and image_format == "JPEG":
        sheet = sheet.convert("RGB")
    return write_atomically(path, lambda file: sheet.save(file, image_format))


def _wrap(text: str, width: int, max_lines: int | None = MAX_CAPTION_LINES) -> list[str]:
    """A text from outside as lines that fit a width in pixels; the last one ends in "..." where it is cut.

    Pillow's own font has no letters but those of ASCII: accents are left out, and other scripts are question marks.
    """
    letters = (c for c in unicodedata.normalize("NFKD", printable(text)) if not unicodedata.combining(c))
    font, text = ImageFont.load_default(), "".join(letters).encode("ascii", "replace").decode("ascii")

    def fits(line: str) -> bool:
        return font.getlength(line) <= width - 2

    lines: list[str] = []
    rest = text
    while rest and (max_lines is None or len(lines) < max_lines):
        end = len(rest)
        if not fits(rest):
            end = next((end for end in range(2, len(rest)) if not fits(rest[:end])), len(rest)) - 1
            space = rest.rfind(" ", 1, end + 1)
            end = end if space < 0 else space
        lines.append(rest[:end])
        rest = rest[end:].lstrip(" ")
    if rest:
        last = lines[-1]
        while last and not fits(f"{last}..."):
            last = last[:-1]
        lines[-1] = f"{last}..."
    return lines


def _caption_height(wrapped: Iterable[list[str]]) -> int:
    """Height of the strips under images, in pixels, for the longest of their captions."""
    return CAPTION_HEIGHT + LINE_HEIGHT * (max(1, *map(len, wrapped)) - 1)


def _caption(lines: list[str], height: int, width: int, depth: int) -> NDArray[np.uint8]:
    """A strip of text, black on white: (height, width, depth)."""
    strip = Image.new("L", (width, height), 255)
    for number, line in enumerate(lines):
        ImageDraw.Draw(strip).text((1, 1 + number * LINE_HEIGHT), line, fill=0, font=ImageFont.load_default())
    pixels = np.asarray(strip)[..., None].repeat(depth, axis=2)
    if depth == 4:
        pixels[..., 3] = 255
    return pixels


def _levels(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Convert (N, 1 | 3 | 4, H, W) in [-1, 1] to (N, H, W, C) in 0 .. 255."""
    return ((images.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8).transpose(0, 2, 3, 1)

"""Columns of an image folder's metadata.csv and metadata.jsonl, as Hugging Face's ImageFolder reads them.

Each file describes images of its own folder and of those below, by their path from there in the column ``file_name``.
Windows' backslashes, a leading ``./`` and accents in either normal form of Unicode lead to the same image.
"""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.training.data.image_files import ARRAY_EXTENSIONS, FolderFiles, find_files
from diffusers_ddpm_ext.utils.input_files import file_name, iter_json_rows, read_csv_rows

METADATA_FILES = ("metadata.csv", "metadata.jsonl")
FILE_NAME = "file_name"
MAX_CSV_BYTES = 2**28


@dataclass(frozen=True, slots=True)
class Cell:
    """A value of a metadata column, and the folder that paths in it start from."""

    value: Any
    folder: Path


def find_images(root: Path) -> FolderFiles:
    """Find the images of a folder; arrays that another column of its metadata names (embeddings, say) are none.

    Raises:
        ConfigError: there are arrays, and a metadata file cannot be read.
    """
    found = find_files(root, METADATA_FILES)
    if not found.metadata:
        return found
    arrays = {name for name in found.images if posixpath.splitext(name)[1].lower() in ARRAY_EXTENSIONS}
    if not arrays:
        return found
    mentioned = set()
    for file in found.metadata:
        path = root / file
        rows: Iterable[dict[str, Any]] = (
            read_csv_rows(path, max_bytes=MAX_CSV_BYTES)
            if path.suffix == ".csv"
            else iter_json_rows(path, skip_partial=False)
        )
        cells = (value for row in rows for column, value in row.items() if column != FILE_NAME)
        mentioned |= {os.path.normpath(path.parent / value) for value in cells if isinstance(value, str)}
    attached = {name for name in arrays if os.path.normpath(root / name) in mentioned}
    return replace(found, images=[name for name in found.images if name not in attached])


def require_metadata(label: str, files: Sequence[str]) -> None:
    """Refuse a folder of images, which ``label`` names, without a metadata file."""
    if not files:
        raise ConfigError(
            f"{label} has no {' or '.join(METADATA_FILES)}: add one with a column {FILE_NAME}, or use "
            "--class_column folder for classes by folder, --caption_column txt for captions in text files"
        )


def read_metadata_column(root: Path, files: Sequence[str], images: Sequence[str], column: str) -> dict[str, Cell]:
    """Read a column of all metadata files of a folder.

    Args:
        root: the folder.
        files: its metadata files, paths inside it.
        images: its images, paths inside it.
        column: name of the column.

    Returns:
        The cells by image; images without a row, or without a value in it, are missing.

    Raises:
        ConfigError: a file cannot be read, has no such column, or two rows describe one image.
    """
    index = _ImageIndex(images)
    cells: dict[str, Cell] = {}
    row_of: dict[str, str] = {}
    for file in _one_per_folder(root, files):
        path = root / file
        folder = posixpath.dirname(file)
        for number, row in enumerate(_rows(path, column), 1):
            place = f"{file_name(path)}, row {number:,}"
            image = index.find(folder, row.get(FILE_NAME), place)
            if image is None:
                continue
            if image in row_of:
                raise ConfigError(
                    f"{place} describes {printable(image)}, as {row_of[image]} does: keep one of the rows"
                )
            row_of[image] = place
            if row.get(column) is not None:
                cells[image] = Cell(row[column], root / folder)
    return cells


def _one_per_folder(root: Path, files: Sequence[str]) -> Sequence[str]:
    """The metadata files; two in one folder could contradict each other."""
    by_folder: dict[str, str] = {}
    for file in files:
        other = by_folder.setdefault(posixpath.dirname(file), file)
        if other != file:
            raise ConfigError(f"{file_name(root / other)} and {file_name(root / file)} are in one folder: keep one")
    return files


def _rows(path: Path, column: str) -> Iterable[dict[str, Any]]:
    """The rows of a file, which have a name of an image; at least one of them has the column."""
    if path.suffix == ".csv":
        rows: list[dict[str, Any]] = list(read_csv_rows(path, max_bytes=MAX_CSV_BYTES))
        columns = list(rows[0]) if rows else []
    else:
        wanted, names = (FILE_NAME, column), dict[str, None]()
        rows = []
        for row in iter_json_rows(path, skip_partial=False):
            names |= dict.fromkeys(row)
            rows.append({name: row[name] for name in wanted if name in row})
        columns = list(names)
    if not rows or FILE_NAME not in columns:
        hint = f": its columns are {_listed(columns)}" if columns else ""
        raise ConfigError(f"{file_name(path)} needs one row per image, with a column {FILE_NAME}{hint}")
    if column not in columns:
        raise ConfigError(f"column {printable(column, 60)!r} is not in {file_name(path)}: it has {_listed(columns)}")
    return rows


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(printable(name, 60) for name in columns[:20]) + (", ..." if len(columns) > 20 else "")


class _ImageIndex:
    """Images by the names that metadata may have for them."""

    def __init__(self, images: Sequence[str]) -> None:
        self._images = set(images)
        self._normalized: dict[str, str | None] = {}
        for image in images:
            key = unicodedata.normalize("NFC", image)
            self._normalized[key] = None if key in self._normalized else image  # None: two images have that name

    def find(self, folder: str, name: Any, place: str) -> str | None:
        """The image of a row; None where there is no such file.

        Raises:
            ConfigError: ``name`` is not the name of a file below the folder; ``place`` names the row.
        """
        if not isinstance(name, str) or not name.strip():
            raise ConfigError(f"{place} has no {FILE_NAME}")
        for spelling in (name, name.replace("\\", "/")):
            inside = posixpath.normpath(spelling)
            if posixpath.isabs(inside) or inside == ".." or inside.startswith("../") or "://" in spelling:
                raise ConfigError(
                    f"{place} has the {FILE_NAME} {printable(name, 200)}: it must be a path below that folder"
                )
            path = posixpath.join(folder, inside)
            if path in self._images:
                return path
            normalized = self._normalized.get(unicodedata.normalize("NFC", path))
            if normalized is not None:
                return normalized
        return None

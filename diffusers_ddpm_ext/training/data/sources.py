"""Sources of images and of the columns that condition them: a folder, a dataset, scikit-learn's digits.

Nothing is decoded here. A source knows the names and order of its images, how to read their bytes, and its columns:

    the digits   `digit`
    a folder     `folder`, the name of an image's folder; or a column of metadata.csv or metadata.jsonl in it, whose
                 column file_name identifies the image (the format of Hugging Face's ImageFolder)
    a dataset    its columns

Folders are not read by `datasets`' ImageFolder: that treats a subfolder called `test` or `validation` as a split, and
silently leaves out its images and those next to it.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.config.checks import check_image_folder

FOLDER_COLUMN = "folder"
METADATA_FILES = ("metadata.csv", "metadata.jsonl")
FILE_NAME = "file_name"
# Formats that Pillow opens but cannot decode by itself, or that are mostly not images.
EXCLUDED_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


@dataclass(frozen=True)
class FolderSource:
    """The images of a folder and its subfolders.

    Their names are paths inside the folder with forward slashes, sorted: the file system's order has no effect.
    """

    option: str
    folder: Path
    names: Sequence[str]

    def payload(self, index: int) -> Path:
        """Return the path of an image."""
        return self.folder / self.names[index]

    def read_column(self, column: str) -> dict[str, Any]:
        """Return the values of a metadata column, or the folders of the images, by name of the image."""
        if column == FOLDER_COLUMN:
            return {name: Path(name).parent.name for name in self.names}
        rows = self._metadata()
        if rows and column not in rows[0]:
            raise ConfigError(f"column {column!r} is not in {self.option}: its metadata has {', '.join(rows[0])}")
        values = {str(row.get(FILE_NAME)): row.get(column) for row in rows}
        lacking = [name for name in self.names if values.get(name) in (None, "")]
        if lacking:
            raise ConfigError(f"column {column!r} of {self.option} has no value for {lacking[0]!r}")
        return {name: self._resolve(values[name]) for name in self.names}

    def _resolve(self, value: Any) -> Any:
        """The full path of a file in the folder; any other value unchanged."""
        return self.folder / value if isinstance(value, str) and (self.folder / value).is_file() else value

    def _metadata(self) -> list[dict[str, Any]]:
        for name in METADATA_FILES:
            path = self.folder / name
            if path.is_file():
                return _read_metadata(path)
        raise ConfigError(
            f"{self.option} has no {' or '.join(METADATA_FILES)}: add one with a column {FILE_NAME}, or use "
            f"--class_column {FOLDER_COLUMN} for classes by folder"
        )


@dataclass(frozen=True)
class DatasetSource:
    """The images in one column of a `datasets.Dataset`, undecoded in ``rows``; ``table`` has all columns."""

    option: str
    rows: Sequence[dict[str, Any]]
    image_column: str
    names: Sequence[str]
    table: Any

    def payload(self, index: int) -> bytes | Path | None:
        """Return the bytes of an image, or the path of its file."""
        return payload_of_cell(self.rows[index][self.image_column])

    def read_column(self, column: str) -> dict[str, Any]:
        """Return the values of a column, images undecoded, by name of the row."""
        if column not in self.table.column_names:
            known = ", ".join(self.table.column_names)
            raise ConfigError(f"column {column!r} is not in {self.option}: its columns are {known}")
        table = self.table.select_columns([column])
        if type(table.features[column]).__name__ == "Image":
            table = table.cast_column(column, type(table.features[column])(decode=False))
        return dict(zip(self.names, [row[column] for row in table], strict=True))


@dataclass(frozen=True)
class DigitSource:
    """scikit-learn's digits, with the levels from `digit_levels`, as image files of 256 levels."""

    levels: Tensor
    names: Sequence[str]
    option: str = "the digits"

    def payload(self, index: int) -> bytes:
        """Return a digit as PNG."""
        image = Image.fromarray((self.levels[index, 0].numpy() * (255 / 16)).round().astype(np.uint8))
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()

    def read_column(self, column: str) -> dict[str, Any]:
        """Return which digit each image is, by name of the image."""
        if column != "digit":
            raise ConfigError(f"--class_column {column}: the digits have one column, digit")
        from sklearn.datasets import load_digits

        return {name: int(label) for name, label in zip(self.names, load_digits().target, strict=True)}


Source = FolderSource | DatasetSource | DigitSource


def payload_of_cell(cell: Any) -> bytes | Path | None:
    """Return the bytes or the path of an image in a column: `datasets`' undecoded image, or a path."""
    if isinstance(cell, Mapping):
        data, path = cell.get("bytes"), cell.get("path")
        return data if isinstance(data, bytes) else None if path is None else Path(str(path))
    return Path(cell) if isinstance(cell, str | Path) else None


def scan_folder(option: str, folder: str) -> FolderSource:
    """Find the images of a folder: every format that Pillow decodes, extensions in any case, no hidden files.

    Raises:
        ConfigError: the folder, which ``option`` names, does not exist or has no image.
    """
    root = check_image_folder(option, folder)
    label = f"{option} {folder!r}"
    Image.init()
    formats = set(Image.OPEN) - EXCLUDED_FORMATS
    extensions = {extension for extension, name in Image.registered_extensions().items() if name in formats}
    files = list(_walk(root))
    names = sorted(name for name in files if Path(name).suffix.lower() in extensions)
    if not names:
        others = f"none of its {len(files)} files is one" if files else "it is empty"
        raise ConfigError(f"{label} has no image ({others}): files that Pillow reads, .png, .jpg, .webp and others.")
    return FolderSource(label, root, names)


def _walk(root: Path) -> Iterator[str]:
    """Yield the files below a folder, following each link to a folder once."""
    visited = set()
    for parent, folders, files in os.walk(root, followlinks=True):
        real_path = os.path.realpath(parent)
        if real_path in visited:
            folders.clear()
            continue
        visited.add(real_path)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        yield from (Path(parent, name).relative_to(root).as_posix() for name in files if not name.startswith("."))


def _read_metadata(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                rows: list[dict[str, Any]] = list(csv.DictReader(file))
            else:
                rows = [json.loads(line) for line in file if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not rows or not all(isinstance(row, dict) and FILE_NAME in row for row in rows):
        raise ConfigError(f"{path} needs one row per image, with a column {FILE_NAME}")
    return rows


def open_dataset_split(
    name: str,
    split: str,
    config_name: str | None = None,
    image_column: str | None = None,
    cache_dir: str | None = None,
) -> DatasetSource:
    """Open one split of a dataset on the Hub, or of a local path (a script-free dataset, or `save_to_disk`'s folder).

    Args:
        name: Hub id or path.
        split: of the dataset.
        config_name: configuration, if the dataset has several.
        image_column: column of the images; None selects the only image column.
        cache_dir: folder for downloads.

    Raises:
        ConfigError: `datasets` is not installed, cannot open the dataset, or there is no such split or column.
    """
    try:
        import datasets
    except ImportError:
        raise ConfigError("--dataset_name needs `datasets`: pip install diffusers-ddpm-ext[hub-datasets]") from None
    label = f"--dataset_name {name!r}"
    try:
        if any(Path(name, marker).is_file() for marker in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(name)
            splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
            if split not in splits:
                raise ValueError(f"it has only the splits {', '.join(splits)}")
            table = splits[split]
        else:
            table = datasets.load_dataset(name, config_name, split=split, cache_dir=cache_dir)
    except Exception as error:  # `datasets` raises any exception of its readers and the network
        raise ConfigError(f"{label}, split {split!r}, cannot be opened: {_one_line(error)}") from error
    column = _image_column(label, table.features, datasets.Image, image_column)
    try:
        rows = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except Exception as error:
        raise ConfigError(f"--image_column {column!r} of {label} has no images: {_one_line(error)}") from error
    if len(rows) == 0:
        raise ConfigError(f"{label}, split {split!r}, has no rows.")
    return DatasetSource(label, rows, column, [f"row {index}" for index in range(len(rows))], table)


def _image_column(label: str, features: dict[str, object], image_type: type, requested: str | None) -> str:
    """Return the requested column, or the only one of images."""
    columns = ", ".join(features)
    if requested is not None:
        if requested not in features:
            raise ConfigError(f"--image_column {requested!r}: {label} has the columns {columns}.")
        return requested
    names = [name for name, feature in features.items() if isinstance(feature, image_type)]
    if len(names) != 1:
        number = f"{len(names)} image columns ({', '.join(names)})" if names else "no image column"
        raise ConfigError(f"{label} has {number}: choose one by --image_column; its columns are {columns}.")
    return names[0]


def digit_levels() -> Tensor:
    """Return the 1,797 handwritten digits of scikit-learn: (1797, 1, 8, 8), uint8, values 0 (paper) to 16 (ink).

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError("the digits need scikit-learn: pip install diffusers-ddpm-ext[train]") from None
    return torch.from_numpy(load_digits().images.astype(np.uint8)).unsqueeze(1)


def _one_line(error: BaseException) -> str:
    """First lines of an error and of its cause."""
    lines = [str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__]
    if error.__cause__ is not None and str(error.__cause__).strip():
        lines.append(str(error.__cause__).strip().splitlines()[0])
    return ": ".join(lines)

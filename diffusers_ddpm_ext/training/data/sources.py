"""Sources of images and of the columns that condition them: a folder, a dataset, scikit-learn's digits.

Nothing is decoded here. A source knows the names and order of its images, how to read their bytes, and its columns:

    the digits   `digit`
    a folder     `folder`, the name of an image's folder; or a column of metadata.csv or metadata.jsonl in it, whose
                 column file_name identifies the image (`metadata`); of captions also `txt`, the text file beside it
    a dataset    its columns

Folders are not read by `datasets`' ImageFolder: that treats a subfolder called `test` or `validation` as a split, and
silently leaves out its images and those next to it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.training.config.checks import check_image_folder
from diffusers_ddpm_ext.training.config.condition_checks import TEXT_FILES
from diffusers_ddpm_ext.training.data.caption_text import csv_cells, read_caption_files
from diffusers_ddpm_ext.training.data.class_labels import Column
from diffusers_ddpm_ext.training.data.dataset_files import (
    builder_arguments,
    import_datasets,
    is_saved_dataset,
    saved_split,
)
from diffusers_ddpm_ext.training.data.image_files import ListCell, Payload, RemoteFile, locate
from diffusers_ddpm_ext.training.data.metadata import (
    FILE_NAME,
    Cell,
    find_images,
    read_metadata_column,
    require_metadata,
)
from diffusers_ddpm_ext.training.data.row_names import RowNames, RowValues

FOLDER_COLUMN = "folder"
DIGIT_COLUMN = "digit"


@dataclass(frozen=True)
class FolderSource:
    """The images of a folder and its subfolders.

    Their names are paths inside the folder with forward slashes, sorted: the file system's order has no effect.

    Attributes:
        option: the option and the folder, for messages.
        folder: its path.
        names: of the images.
        metadata: files with further columns, paths inside the folder.
        other_images: images of types that are not read, by extension: their number.
        other_files: all files that are neither images nor metadata, by extension: their number.
    """

    option: str
    folder: Path
    names: Sequence[str]
    metadata: Sequence[str] = ()
    other_images: Mapping[str, int] = field(default_factory=dict)
    other_files: Mapping[str, int] = field(default_factory=dict)

    def payload(self, index: int) -> Path:
        """Return the path of an image."""
        return self.folder / self.names[index]

    def read_labels(self, column: str) -> Column:
        """Return the values of a metadata column, or the names of the images' folders, by name of the image."""
        if column != FOLDER_COLUMN:
            return Column({name: cell.value for name, cell in self._cells(column).items()})
        return Column(self._folders("class", "--class_column"), holds_names=True)

    def read_captions(self, column: str) -> Mapping[str, Any]:
        """Return the captions of the images, texts or lists of texts, by name of the image.

        Args:
            column: of the metadata; or `txt` for text files beside the images, `folder` for the names of folders.
        """
        if column == TEXT_FILES:
            return read_caption_files(f"--caption_column {TEXT_FILES} of {self.option}", self.folder, self.names)
        if column == FOLDER_COLUMN:
            return self._folders("caption", "--caption_column")
        if column == FILE_NAME:
            raise ConfigError(
                f"--caption_column {FILE_NAME} has the names of the files: name the column with captions"
            )
        cells = {name: cell.value for name, cell in self._cells(column).items()}
        is_csv = all(file.endswith(".csv") for file in self.metadata)
        return csv_cells(f"--caption_column {printable(column, 60)}", cells) if is_csv else cells

    def _folders(self, what: str, option: str) -> dict[str, str]:
        """Names of the folders that the images are in."""
        folders = {name: name.rpartition("/")[0].rpartition("/")[2] for name in self.names}
        for name, folder in folders.items():
            if not folder:
                raise ConfigError(
                    f"{printable(name)!r} of {self.option} has no {what}, since it is in no subfolder: move it into"
                    f" one, or name a column of metadata.csv by {option}"
                )
        return folders

    def read_files(self, column: str) -> dict[str, Any]:
        """Return the values of a column, with paths as `locate` returns them, by name of the image."""
        return {
            name: locate(cell.value, cell.folder) if isinstance(cell.value, str) else cell.value
            for name, cell in self._cells(column).items()
        }

    def _cells(self, column: str) -> dict[str, Cell]:
        require_metadata(self.option, self.metadata)
        cells = read_metadata_column(self.folder, self.metadata, self.names, column)
        missing = [name for name in self.names if name not in cells or cells[name].value == ""]
        if missing:
            count = "" if len(missing) == 1 else f"; {len(missing):,} of {len(self.names):,} images have none"
            raise ConfigError(
                f"column {printable(column, 60)!r} of {self.option} has no value for {printable(missing[0])!r}{count}"
            )
        return cells


@dataclass(frozen=True)
class DatasetSource:
    """The images in one column of a `datasets.Dataset`, undecoded in ``rows``; ``table`` has all columns.

    ``holds_arrays``: whether the images are arrays or nested lists, in ``rows`` of Arrow.
    """

    option: str
    rows: Any
    image_column: str
    names: Sequence[str]
    table: Any
    holds_arrays: bool = False
    other_images: ClassVar[Mapping[str, int]] = {}

    def payload(self, index: int) -> Payload:
        """Return the bytes of an image, where its file is, or its array."""
        cell = self.rows[index][self.image_column]
        return ListCell(cell) if self.holds_arrays else payload_of_cell(cell)

    def read_labels(self, column: str) -> Column:
        """Return the values of a column by name of the row, with the names of a `ClassLabel`."""
        self._check_column(column)
        feature = self.table.features[column]
        is_scalar = type(feature).__name__ in ("Value", "ClassLabel")
        values = self._read_scalars(column) if is_scalar else self.read_files(column)
        names = getattr(feature, "names", None)
        return Column(values, class_names=names if isinstance(names, list) else None)

    def read_captions(self, column: str) -> Mapping[str, Any]:
        """Return the captions in a column, texts or lists of texts, by name of the row."""
        self._check_column(column)
        if isinstance(getattr(self.table.features[column], "names", None), list):
            raise ConfigError(f"column {column!r} of {self.option} holds classes, not captions: use --class_column")
        return dict(zip(self.names, self.table.with_format(None)[column][:], strict=True))

    def read_files(self, column: str) -> dict[str, Any]:
        """Return the values of a column, images undecoded, by name of the row."""
        self._check_column(column)
        table = self.table.select_columns([column])
        if type(table.features[column]).__name__ == "Image":
            table = table.cast_column(column, type(table.features[column])(decode=False))
        if is_array_feature(table.features[column], ("Array2D", "Array3D")):
            table = table.with_format("numpy", dtype=table.features[column].dtype)
        values = [locate(row[column]) if isinstance(row[column], Path) else row[column] for row in table]
        return dict(zip(self.names, values, strict=True))

    def _read_scalars(self, column: str) -> RowValues:
        """The values of a column of numbers or texts."""
        cells = self.table.select_columns([column]).with_format("arrow")[:].column(column)
        encoded = cells.dictionary_encode(null_encoding="encode").unify_dictionaries()
        codes = np.concatenate([chunk.indices.to_numpy(zero_copy_only=False) for chunk in encoded.chunks])
        return RowValues(encoded.chunk(0).dictionary.to_pylist(), codes)

    def _check_column(self, column: str) -> None:
        if column not in self.table.column_names:
            known = ", ".join(self.table.column_names)
            raise ConfigError(f"column {column!r} is not in {self.option}: its columns are {known}")


@dataclass(frozen=True)
class DigitSource:
    """scikit-learn's digits, with the levels from `digit_levels`, as image files of 256 levels."""

    levels: Tensor
    names: Sequence[str]
    option: str = "the digits"
    other_images: ClassVar[Mapping[str, int]] = {}

    def payload(self, index: int) -> bytes:
        """Return a digit as PNG."""
        image = Image.fromarray((self.levels[index, 0].numpy() * (255 / 16)).round().astype(np.uint8))
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()

    def read_labels(self, column: str) -> Column:
        """Return which digit each image is, by name of the image."""
        if column != DIGIT_COLUMN:
            raise ConfigError(f"--class_column {column}: the digits have one column, {DIGIT_COLUMN}")
        from sklearn.datasets import load_digits

        return Column(dict(zip(self.names, load_digits().target, strict=True)))

    def read_captions(self, column: str) -> Mapping[str, Any]:
        """Refuse a column of captions: the digits have none."""
        raise ConfigError(f"--caption_column {printable(column, 60)}: the digits have no captions; use --class_column")

    def read_files(self, column: str) -> dict[str, Any]:
        """Refuse a column of images or embeddings: the digits have none."""
        raise ConfigError(f"column {column!r} is not in the digits: they have one column, digit")


Source = FolderSource | DatasetSource | DigitSource


class ColumnSource(Protocol):
    """What conditions are read from: the values of a column by name of the image."""

    def read_labels(self, column: str) -> Column: ...
    def read_captions(self, column: str) -> Mapping[str, Any]: ...
    def read_files(self, column: str) -> Mapping[str, Any]: ...


def payload_of_cell(cell: Any) -> Payload:
    """Return the bytes of an image in a column, or where its file is: `datasets`' undecoded image, or a path."""
    if isinstance(cell, Mapping):
        data, path = cell.get("bytes"), cell.get("path")
        return data if isinstance(data, bytes) else None if path is None else locate(str(path))
    if isinstance(cell, str):
        return locate(cell)
    if isinstance(cell, list):
        return ListCell(cell)
    return cell if isinstance(cell, Path | RemoteFile | bytes | np.ndarray) else None


def scan_folder(option: str, folder: str) -> FolderSource:
    """Find the images of a folder: every format that is read, extensions in any case, no hidden files.

    Raises:
        ConfigError: the folder, which ``option`` names, does not exist or has no image.
    """
    root = check_image_folder(option, folder)
    label = f"{option} {folder!r}"
    found = find_images(root)
    if not found.images:
        others = f"none of its {found.count} files is one" if found.count else "it is empty"
        if found.other_images:
            others += f"; {describe_other_images(found.other_images)}: convert them, e.g. to PNG"
        raise ConfigError(
            f"{label} has no image ({others}): .png, .jpg, .webp and others that Pillow reads, .npy, .npz."
        )
    return FolderSource(label, root, found.images, found.metadata, found.other_images, found.other_files)


def describe_other_images(counts: Mapping[str, int]) -> str:
    """Describe images of types that are not read: ``3 .heic and 1 .cr2 not read by Pillow``."""
    *most, last = (f"{count:,} {extension}" for extension, count in sorted(counts.items(), key=lambda each: -each[1]))
    return f"{', '.join(most)} and {last} not read by Pillow" if most else f"{last} not read by Pillow"


def open_dataset_split(
    name: str,
    split: str,
    config_name: str | None = None,
    image_column: str | None = None,
    cache_dir: str | None = None,
) -> DatasetSource:
    """Open one split of a dataset on the Hub, or of a local path (a script-free dataset, or `save_to_disk`'s folder).

    Args:
        name: Hub id, folder, file, or pattern of files.
        split: of the dataset.
        config_name: configuration, if the dataset has several.
        image_column: column of the images; None selects the only image column.
        cache_dir: folder for downloads.

    Raises:
        ConfigError: `datasets` is not installed, cannot open the dataset, or there is no such split or column.
    """
    datasets = import_datasets()
    label = f"--dataset_name {name!r}"
    try:
        if is_saved_dataset(name):
            table = saved_split(name, split)
        else:
            path, files = builder_arguments(name)
            table = datasets.load_dataset(path, config_name, data_files=files, split=split, cache_dir=cache_dir)
    except Exception as error:  # `datasets` raises any exception of its readers and the network
        raise ConfigError(f"{label}, split {split!r}, cannot be opened: {one_line(error)}") from error
    column = image_column_of(label, table.features, datasets.Image, image_column)
    holds_arrays = is_array_feature(table.features[column])
    try:
        rows = table.select_columns([column])
        rows = rows.with_format("arrow") if holds_arrays else rows.cast_column(column, datasets.Image(decode=False))
    except Exception as error:
        raise ConfigError(f"--image_column {column!r} of {label} has no images: {one_line(error)}") from error
    if len(rows) == 0:
        raise ConfigError(f"{label}, split {split!r}, has no rows.")
    return DatasetSource(label, rows, column, RowNames(len(rows)), table, holds_arrays)


def image_column_of(label: str, features: dict[str, object], image_type: type, requested: str | None) -> str:
    """Return the requested column, or the only one of images; without images that of arrays, or of nested lists."""
    columns = ", ".join(features)
    if requested is not None:
        if requested not in features:
            raise ConfigError(f"--image_column {requested!r}: {label} has the columns {columns}.")
        return requested
    names = [name for name, feature in features.items() if isinstance(feature, image_type)]
    for kinds in (("Array2D", "Array3D"), None):
        names = names or [name for name, feature in features.items() if is_array_feature(feature, kinds)]
    if len(names) != 1:
        number = f"{len(names)} image columns ({', '.join(names)})" if names else "no image column"
        raise ConfigError(f"{label} has {number}: choose one by --image_column; its columns are {columns}.")
    return names[0]


def is_array_feature(feature: Any, kinds: Sequence[str] | None = None) -> bool:
    """Whether the values of a column are arrays of two or three axes: `Array2D`, `Array3D`, or lists of lists.

    Args:
        feature: of `datasets`.
        kinds: names of the classes that count; None for all, with lists.
    """
    name = type(feature).__name__
    if name in ("Array2D", "Array3D"):
        return kinds is None or name in kinds
    depth = 0
    while type(feature).__name__ in ("List", "LargeList", "Sequence"):
        feature, depth = feature.feature, depth + 1
    is_number = any(getattr(feature, "dtype", "").startswith(start) for start in ("int", "uint", "float", "bool"))
    return kinds is None and depth in (2, 3) and is_number


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


def one_line(error: BaseException) -> str:
    """First lines of an error and of its cause."""
    lines = [str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__]
    if error.__cause__ is not None and str(error.__cause__).strip():
        lines.append(str(error.__cause__).strip().splitlines()[0])
    return ": ".join(lines)

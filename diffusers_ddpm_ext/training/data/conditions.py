"""What the images of a run are conditioned on: classes, images that go in with them, stored embeddings.

A column is read once for all images. Where it comes from:

    the digits   their labels
    a folder     `folder`, the name of the folder an image lies in; or a column of metadata.csv or metadata.jsonl in
                 it, whose column file_name says which image a row is for (the format of Hugging Face's image folders)
    a dataset    its column
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.models.conditioning import NEEDS
from diffusers_ddpm_ext.training.config.options import DataOptions
from diffusers_ddpm_ext.training.data.decoding import Images, Preparation, read

OF_FOLDER = "folder"
METADATA = ("metadata.csv", "metadata.jsonl")
FILE_NAME = "file_name"
OPTION = {
    "class_labels": "class_column",
    "concat_inputs": "concat_column",
    "encoder_hidden_states": "context_column",
}
Cells = Mapping[str, Any]  # name of an image -> what its column says


@dataclass(frozen=True)
class Columns:
    """Conditions of all images that were read, in their order.

    Attributes:
        labels: (n,), int64, or (n, width), float32; None where there are none.
        class_names: of the classes, where labels are numbers.
        concat: images that are joined to the input; None where there are none.
        contexts: (tokens, width), float32, of each image; None where there are none.
        fingerprint: sha256 over all of it, in hexadecimal.
    """

    labels: Tensor | None
    class_names: Sequence[str]
    concat: Images | None
    contexts: Sequence[np.ndarray] | None
    fingerprint: str

    @property
    def label_width(self) -> int | None:
        """Width of a label that is no class."""
        return None if self.labels is None or not self.labels.is_floating_point() else int(self.labels.shape[1])

    @property
    def context_width(self) -> int | None:
        """Width of a token."""
        return None if self.contexts is None else int(self.contexts[0].shape[1])


class Table(Protocol):
    """Where columns come from."""

    @property
    def option(self) -> str:
        """What named it, for messages."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the images."""

    def cells(self, column: str) -> Cells:
        """Return what a column says of each image; raises ConfigError where there is no such column."""


@dataclass(frozen=True)
class DigitTable:
    """The digits' labels."""

    names: Sequence[str]
    labels: Sequence[int]
    option: str = "the digits"

    def cells(self, column: str) -> Cells:
        """Return the digit of each image."""
        if column != "digit":
            raise ConfigError(f"--class_column {column}: the digits have one column, digit")
        return dict(zip(self.names, self.labels, strict=True))


@dataclass(frozen=True)
class FolderTable:
    """The folders and the metadata file of a folder of images."""

    option: str
    folder: Path
    names: Sequence[str]

    def cells(self, column: str) -> Cells:
        """Return what a column says, or the name of each image's folder."""
        if column == OF_FOLDER:
            return {name: Path(name).parent.name for name in self.names}
        rows = self._rows()
        if rows and column not in rows[0]:
            raise ConfigError(f"column {column!r} is not in {self.option}: its metadata has {', '.join(rows[0])}")
        found = {str(row.get(FILE_NAME)): row.get(column) for row in rows}
        lacking = [name for name in self.names if found.get(name) in (None, "")]
        if lacking:
            raise ConfigError(f"column {column!r} of {self.option} says nothing of {lacking[0]!r}")
        return {name: self._resolve(found[name]) for name in self.names}

    def _resolve(self, cell: Any) -> Any:
        """A path inside the folder as a path; anything else as it is."""
        if isinstance(cell, str) and (self.folder / cell).is_file():
            return self.folder / cell
        return cell

    def _rows(self) -> list[dict[str, Any]]:
        for name in METADATA:
            path = self.folder / name
            if path.is_file():
                return _read_metadata(path)
        raise ConfigError(
            f"{self.option} has no {' or '.join(METADATA)}: add one with a column {FILE_NAME}, or say --class_column "
            f"{OF_FOLDER} for classes by folder"
        )


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
        raise ConfigError(f"{path} needs a row an image, with a column {FILE_NAME}")
    return rows


@dataclass(frozen=True)
class RowTable:
    """Columns of a dataset's split."""

    option: str
    names: Sequence[str]
    rows: Any  # datasets.Dataset

    def cells(self, column: str) -> Cells:
        """Return a column; images in it are not decoded."""
        if column not in self.rows.column_names:
            known = ", ".join(self.rows.column_names)
            raise ConfigError(f"column {column!r} is not in {self.option}: its columns are {known}")
        table = self.rows.select_columns([column])
        if type(table.features[column]).__name__ == "Image":
            table = table.cast_column(column, type(table.features[column])(decode=False))
        cells = [row[column] for row in table]
        return dict(zip(self.names, cells, strict=True))


@dataclass(frozen=True)
class _ColumnSource:
    """Images of a column, for the reader of images."""

    option: str
    names: Sequence[str]
    found: Sequence[Any]

    def payload(self, index: int) -> bytes | Path | None:
        cell = self.found[index]
        if isinstance(cell, Mapping):
            data, path = cell.get("bytes"), cell.get("path")
            return data if isinstance(data, bytes) else None if path is None else Path(str(path))
        return Path(cell) if isinstance(cell, str | Path) else None


def column_names(conditioning_key: str | None, options: DataOptions, *, digits: bool, folder: bool) -> dict[str, str]:
    """Say which columns a run needs.

    Args:
        conditioning_key: of the run.
        options: section ``data``.
        digits: whether the images are the digits.
        folder: whether they come from a folder.

    Returns:
        Condition to column.

    Raises:
        ConfigError: a column is missing, or named in vain.
    """
    needed = NEEDS[conditioning_key]
    chosen: dict[str, str] = {}
    for condition, option in OPTION.items():
        given = getattr(options, option)
        if condition not in needed:
            if given is not None:
                raise ConfigError(
                    f"--{option} {given} has no effect with --conditioning_key {conditioning_key or 'none'}"
                )
            continue
        if given is None and condition == "class_labels":
            given = "digit" if digits else OF_FOLDER if folder else None
        if given is None:
            raise ConfigError(
                f"--conditioning_key {conditioning_key} needs --{option}: the column with its {condition}"
            )
        chosen[condition] = given
    return chosen


def read_columns(
    table: Table,
    kept: Sequence[str],
    wanted: Mapping[str, str],
    preparation: Preparation,
    vocabulary: Sequence[str] | None = None,
) -> Columns | None:
    """Read what the images are conditioned on.

    Args:
        table: where columns come from.
        kept: names of the images that were read, in their order.
        wanted: from `column_names`.
        preparation: of the images, which holds for images that are joined to them, too.
        vocabulary: names of the classes, where another set of images has them already.

    Returns:
        The columns; None where none is wanted.

    Raises:
        ConfigError: a cell cannot be used; the image is named.
    """
    if not wanted:
        return None
    digest = hashlib.sha256()
    labels, names, concat, contexts = None, list(vocabulary or ()), None, None
    for condition, column in wanted.items():
        cells = table.cells(column)
        found = [cells[name] for name in kept]
        if condition == "class_labels":
            labels, names = _labels(column, kept, found, vocabulary)
            digest.update(labels.numpy().tobytes())
        elif condition == "concat_inputs":
            plain = Preparation(preparation.size, None, preparation.center_crop)
            source = _ColumnSource(f"--concat_column {column}", kept, found)
            reading = read(source, plain, skip_bad=False, memory_limit=2**31)
            concat = reading.images
            digest.update(reading.fingerprint.encode())
        else:
            contexts = [_context(column, name, cell) for name, cell in zip(kept, found, strict=True)]
            widths = {context.shape[1] for context in contexts}
            if len(widths) != 1 or len({context.shape[0] for context in contexts}) != 1:
                raise ConfigError(
                    f"--context_column {column}: the embeddings are not all of one shape (tokens, width)"
                )
            for context in contexts:
                digest.update(context.tobytes())
    return Columns(labels, names, concat, contexts, digest.hexdigest())


def _labels(
    column: str, kept: Sequence[str], found: Sequence[Any], vocabulary: Sequence[str] | None
) -> tuple[Tensor, list[str]]:
    """Classes as numbers: numbers as they are, words in their alphabetical order; lists and fractions as vectors."""
    plain = [_number(cell) for cell in found]
    if all(isinstance(cell, int) for cell in plain):
        if min(plain) < 0:
            raise ConfigError(
                f"--class_column {column}: {kept[plain.index(min(plain))]!r} is of the class {min(plain)}"
            )
        return torch.tensor(plain), [str(number) for number in range(max(plain) + 1)]
    if all(isinstance(cell, float | int | list) for cell in plain):
        try:
            table = torch.tensor(plain, dtype=torch.float32)
        except (ValueError, TypeError):
            raise ConfigError(f"--class_column {column}: the vectors are not all of one width") from None
        return table[:, None] if table.ndim == 1 else table, []
    words = [str(cell) for cell in plain]
    names = list(vocabulary) if vocabulary is not None else sorted(set(words))
    place = {name: number for number, name in enumerate(names)}
    for image, word in zip(kept, words, strict=True):
        if word not in place:
            raise ConfigError(
                f"--class_column {column}: {image!r} is of the class {word!r}, which no training image is"
            )
    return torch.tensor([place[word] for word in words]), names


def _number(cell: Any) -> Any:
    """A cell of a text file that is a number, as one."""
    if isinstance(cell, str):
        for kind in (int, float):
            try:
                return kind(cell)
            except ValueError:
                continue
    return list(cell) if isinstance(cell, tuple) else cell


def _context(column: str, name: str, cell: Any) -> np.ndarray:
    told = f"--context_column {column}: {name!r}"
    try:
        table = _stored(Path(cell)) if isinstance(cell, str | Path) else np.asarray(cell, dtype=np.float32)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{told} cannot be read as an embedding: {error}") from None
    table = table[None] if table.ndim == 1 else table
    if table.ndim != 2 or not table.size or not np.isfinite(table).all():
        raise ConfigError(f"{told} is no finite array (tokens, width), but of shape {table.shape}")
    return np.ascontiguousarray(table, dtype=np.float32)


def _stored(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        found: np.ndarray = np.load(path, allow_pickle=False)
        return found
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        tensors = load_file(path)
        if len(tensors) != 1:
            raise ValueError(f"{path.name} must hold one array")
        return next(iter(tensors.values()))
    raise ValueError(f"{path.name} is no .npy or .safetensors file")

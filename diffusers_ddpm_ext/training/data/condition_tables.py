"""What the images of a run are conditioned on: classes, images that go in with them, stored embeddings.

A column is read once for all images. Where it comes from:

    the digits   their labels
    a folder     `folder`, the name of the folder an image lies in; or a column of metadata.csv or metadata.jsonl in
                 it, whose column file_name says which image a row is for (the format of Hugging Face's image folders)
    a dataset    its column
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from diffusers_ddpm_ext.errors import ConfigError

OF_FOLDER = "folder"
METADATA = ("metadata.csv", "metadata.jsonl")
FILE_NAME = "file_name"
Cells = Mapping[str, Any]  # name of an image -> what its column says


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
    """ConditionColumns of a dataset's split."""

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

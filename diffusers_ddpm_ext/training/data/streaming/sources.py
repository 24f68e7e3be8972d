"""Sources of streamed rows that are not parquet files: a folder, a saved table, and what `datasets` iterates over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from diffusers_ddpm_ext.errors import printable
from diffusers_ddpm_ext.training.data.streaming.arrow_cells import cells_of_rows

ROWS_PER_READ = 64
MAX_SHARDS = 1024
"""More shards, as the files of an image folder, are read in this many groups."""


@dataclass(frozen=True)
class FolderRows:
    """Images of a folder, with the values of their conditions; see `rows.CountedSource`.

    Attributes:
        folder: its path.
        names: of the images, sorted.
        columns: values by name of the image, for each column that is read.
        image_column: name of the column that holds the images.
    """

    folder: Any
    names: Sequence[str]
    columns: Mapping[str, Mapping[str, Any]]
    image_column: str
    num_parts: int = 64

    def __len__(self) -> int:
        return len(self.names)

    def cells(self, start: int, stop: int) -> Iterator[Mapping[str, Any]]:
        """Yield paths and values."""
        for name in self.names[start:stop]:
            values = {column: values[name] for column, values in self.columns.items()}
            yield {self.image_column: self.folder / name} | values

    def only(self, column: str) -> FolderRows:
        """The same rows: a path costs nothing."""
        return replace(self, columns={column: self.columns[column]})

    def name(self, number: int) -> str:
        """Path of an image inside the folder."""
        return self.names[number]


@dataclass(frozen=True)
class TableRows:
    """Rows of a `datasets.Dataset`, which is memory-mapped; see `rows.CountedSource`.

    Attributes:
        table: with undecoded columns, in the format of Arrow.
        arrays: columns that hold arrays.
    """

    table: Any
    arrays: Sequence[str] = ()
    num_parts: int = 64

    def __len__(self) -> int:
        return len(self.table)

    def cells(self, start: int, stop: int) -> Iterator[Mapping[str, Any]]:
        """Yield undecoded cells."""
        for first in range(start, stop, ROWS_PER_READ):
            yield from cells_of_rows(self.table[first : min(first + ROWS_PER_READ, stop)], self.arrays)

    def only(self, column: str) -> TableRows:
        """The same rows with one column."""
        arrays = [name for name in self.arrays if name == column]
        return replace(self, table=self.table.select_columns([column]), arrays=arrays)

    def name(self, number: int) -> str:
        """The row's number."""
        return f"row {number}"


@dataclass(frozen=True)
class IterableRows:
    """Shards of a `datasets.IterableDataset`; see `rows.ShardedSource`.

    Attributes:
        table: with undecoded columns.
        files: of the shards, where each shard is a file; else empty.
        arrays: columns that hold arrays.
    """

    table: Any
    files: Sequence[str]
    arrays: Sequence[str] = ()

    @cached_property
    def num_shards(self) -> int:
        """Number of shards, or of groups of many shards."""
        return min(int(self.table.num_shards), MAX_SHARDS)

    def cells(self, shard: int, start: int) -> Iterator[Mapping[str, Any]]:
        """Yield undecoded cells; what is before ``start`` in the shard is read over."""
        table = self.table.shard(num_shards=self.num_shards, index=shard)
        table = table.skip(start) if start else table
        if not self.arrays:
            yield from table
            return
        for row in table.with_format("arrow"):
            yield from cells_of_rows(row, self.arrays)

    def only(self, column: str) -> IterableRows:
        """The same rows with one column."""
        arrays = [name for name in self.arrays if name == column]
        return replace(self, table=self.table.select_columns([column]), arrays=arrays)

    def name(self, shard: int) -> str:
        """The shard's file, or its number."""
        if len(self.files) == self.num_shards:
            return printable(self.files[shard].rsplit("/", 1)[-1], 100)
        return f"shard {shard}"

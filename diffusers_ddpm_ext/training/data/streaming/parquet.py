"""Rows of parquet files, from any row on: only the columns that a run needs, and never a whole file in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np

from diffusers_ddpm_ext.errors import printable
from diffusers_ddpm_ext.training.data.streaming.arrow_cells import cells_of_rows
from diffusers_ddpm_ext.utils.input_files import open_input

MAX_COUNTED_FILES = 256
"""The lengths of more files are not read before the run."""
ROWS_PER_READ = 64
READ_BYTES = 1 << 20
READ_BYTES_REMOTE = 1 << 23
MAX_READERS = 16


def is_remote(file: str) -> bool:
    """Whether a file is a URL."""
    return "://" in file


@contextmanager
def open_parquet(file: str) -> Iterator[Any]:
    """Open a local or remote parquet file for reading in small pieces."""
    import pyarrow.parquet as pq

    if is_remote(file):
        import fsspec

        with fsspec.open(file, "rb") as handle:
            yield pq.ParquetFile(handle, pre_buffer=False, buffer_size=READ_BYTES_REMOTE)
    else:
        with open_input(Path(file)) as handle:
            yield pq.ParquetFile(handle, pre_buffer=False, buffer_size=READ_BYTES)


def read_groups(file: str) -> list[int]:
    """Number of rows of each row group of a file."""
    with open_parquet(file) as parquet:
        return [parquet.metadata.row_group(group).num_rows for group in range(parquet.metadata.num_row_groups)]


@dataclass(frozen=True)
class Columns:
    """Columns that are read, and those among them that hold arrays."""

    names: Sequence[str]
    arrays: Sequence[str] = ()

    def only(self, name: str) -> Columns:
        """One of these columns."""
        return Columns((name,), tuple(each for each in self.arrays if each == name))


def read_cells(
    file: str, columns: Columns, groups: Sequence[int] | None, start: int, stop: int | None = None
) -> Iterator[Mapping[str, Any]]:
    """Yield the cells of the rows ``start`` to ``stop`` of a file.

    Args:
        file: path or URL.
        columns: that are read.
        groups: rows of each row group; None reads them from the file.
        start: the first row.
        stop: the row after the last one; None for all.
    """
    if stop is not None and start >= stop:
        return
    with open_parquet(file) as parquet:
        if groups is None:
            metadata = parquet.metadata
            groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        ends = np.cumsum(groups, dtype=np.int64)
        stop = int(ends[-1]) if stop is None and len(ends) else stop or 0
        first, last = (int(each) for each in np.searchsorted(ends, [start, stop - 1], side="right"))
        row = int(ends[first - 1]) if first else 0
        chosen = list(range(first, min(last + 1, len(groups))))
        batches = parquet.iter_batches(ROWS_PER_READ, chosen, list(columns.names), use_threads=False) if chosen else ()
        for batch in batches:
            low, high = max(start - row, 0), min(stop - row, len(batch))
            row += len(batch)
            if low < high:
                yield from cells_of_rows(batch.slice(low, high - low), columns.arrays)


@dataclass(frozen=True)
class CountedParquet:
    """Rows of parquet files whose lengths are known; see `rows.CountedSource`."""

    files: Sequence[str]
    columns: Columns

    @cached_property
    def groups(self) -> list[list[int]]:
        """Rows of each row group of each file."""
        with ThreadPoolExecutor(MAX_READERS) as pool:
            return list(pool.map(read_groups, self.files))

    @cached_property
    def ends(self) -> list[int]:
        """Number of rows up to the end of each file."""
        return list(accumulate(map(sum, self.groups)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    @property
    def num_parts(self) -> int:
        """Number of row groups with rows: a part that begins inside one reads its beginning for nothing."""
        return sum(rows > 0 for rows in chain.from_iterable(self.groups))

    def cells(self, start: int, stop: int) -> Iterator[Mapping[str, Any]]:
        """Yield the cells of rows, file after file."""
        before = 0
        for file, groups, end in zip(self.files, self.groups, self.ends, strict=True):
            if start < end and before < stop:
                low, high = max(start - before, 0), min(stop, end) - before
                yield from read_cells(file, self.columns, groups, low, high)
            before = end

    def only(self, column: str) -> CountedParquet:
        """The same rows with one column."""
        return replace(self, columns=self.columns.only(column))

    def name(self, number: int) -> str:
        """The row's place in its file."""
        before = 0
        for file, end in zip(self.files, self.ends, strict=True):
            if number < end:
                return f"row {number - before} of {_base_name(file)}"
            before = end
        return f"row {number}"


@dataclass(frozen=True)
class ParquetShards:
    """Rows of many parquet files, each a shard; see `rows.ShardedSource`."""

    files: Sequence[str]
    columns: Columns

    @property
    def num_shards(self) -> int:
        """Number of files."""
        return len(self.files)

    def cells(self, shard: int, start: int) -> Iterator[Mapping[str, Any]]:
        """Yield the cells of the rows of a file."""
        yield from read_cells(self.files[shard], self.columns, None, start)

    def only(self, column: str) -> ParquetShards:
        """The same rows with one column."""
        return replace(self, columns=self.columns.only(column))

    def name(self, shard: int) -> str:
        """Name of the file."""
        return _base_name(self.files[shard])


def _base_name(file: str) -> str:
    return printable(file.rsplit("/", 1)[-1], 100)

"""Rows of a source that is read in order, from any row on.

Nothing is decoded here. A row is its number, which identifies it in its source, and its cells by column.

    files of known lengths     any number of equal parts, of which each begins anywhere (`CountedRows`)
    shards of unknown lengths  as many parts as there are shards (`ShardedRows`)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple, Protocol

MAX_PARTS = 64
SHARD_FACTOR = 1 << 40
"""A row's number is its shard times this, plus its place in the shard; rows of known number are counted through."""


class Row(NamedTuple):
    """A row: the number that identifies it in its source, and its cells by column."""

    number: int
    cells: Mapping[str, Any]


class RowStream(Protocol):
    """Rows of a source, in an order that does not change.

    Attributes:
        num_rows: how many there are; None where only reading them all would tell.
        num_parts: the largest number of parts that are read independently of each other.
        sources: the streams that it consists of; itself alone, unless it is a mixture.
        weights: how often a row of each of them is drawn; empty unless it is a mixture.
    """

    @property
    def num_rows(self) -> int | None: ...
    @property
    def num_parts(self) -> int: ...
    @property
    def sources(self) -> Sequence[RowStream]: ...
    @property
    def weights(self) -> tuple[float, ...]: ...

    def read(self, part: int, parts: int, start: int = 0) -> Iterator[Row]:
        """Yield the rows of one of ``parts`` parts, from its row ``start`` on.

        Where the number of rows is not known, ``parts`` is `num_parts`.
        """

    def without_first(self, count: int) -> RowStream:
        """The same rows without the first ``count``."""

    def only(self, column: str) -> RowStream:
        """The same rows with this column alone, which may be less to read."""

    def name(self, number: int) -> str:
        """Name of a row, by its number, for messages."""


class CountedSource(Protocol):
    """Rows whose number is known, in files or in memory."""

    def __len__(self) -> int: ...
    @property
    def num_parts(self) -> int: ...

    def cells(self, start: int, stop: int) -> Iterator[Mapping[str, Any]]:
        """Yield the cells of the rows ``start`` to ``stop``."""

    def only(self, column: str) -> CountedSource:
        """The same rows with this column alone."""

    def name(self, number: int) -> str:
        """Name of a row."""


@dataclass(frozen=True)
class CountedRows:
    """Rows whose number is known, without the first ones; see `RowStream`."""

    source: CountedSource
    first: int = 0
    weights: tuple[float, ...] = ()

    @property
    def sources(self) -> Sequence[RowStream]:
        """These rows alone."""
        return (self,)

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.source) - self.first

    @property
    def num_parts(self) -> int:
        """Parts that can be read apart without reading much twice."""
        return max(1, min(self.source.num_parts, MAX_PARTS, self.num_rows))

    def read(self, part: int, parts: int, start: int = 0) -> Iterator[Row]:
        """Yield the rows of a part; all parts have the same number of rows, up to one."""
        size, larger = divmod(self.num_rows, parts)  # the first parts have one row more, as in NumPy's array_split
        low, high = (self.first + each * size + min(each, larger) for each in (part, part + 1))
        numbers = range(low + start, high)
        yield from map(Row, numbers, self.source.cells(numbers.start, max(numbers.start, high)))

    def without_first(self, count: int) -> CountedRows:
        """The rows after the first ``count``."""
        return replace(self, first=self.first + count)

    def only(self, column: str) -> CountedRows:
        """The same rows with one column."""
        return replace(self, source=self.source.only(column))

    def name(self, number: int) -> str:
        """Name of a row."""
        return self.source.name(number)


class ShardedSource(Protocol):
    """Shards of unknown lengths."""

    @property
    def num_shards(self) -> int: ...

    def cells(self, shard: int, start: int) -> Iterator[Mapping[str, Any]]:
        """Yield the cells of the rows of a shard, from row ``start`` on."""

    def only(self, column: str) -> ShardedSource:
        """The same rows with this column alone."""

    def name(self, shard: int) -> str:
        """Name of a shard."""


@dataclass(frozen=True)
class ShardedRows:
    """Rows of shards whose lengths are not known; see `RowStream`.

    Attributes:
        source: of the rows.
        begins: shards, and the row at which each begins.
    """

    source: ShardedSource
    begins: Sequence[tuple[int, int]]
    num_rows: None = None
    weights: tuple[float, ...] = ()

    @property
    def sources(self) -> Sequence[RowStream]:
        """These rows alone."""
        return (self,)

    @property
    def num_parts(self) -> int:
        """Number of shards."""
        return len(self.begins)

    def read(self, part: int, parts: int, start: int = 0) -> Iterator[Row]:
        """Yield the rows of a shard."""
        assert parts == self.num_parts
        shard, begin = self.begins[part]
        for place, cells in enumerate(self.source.cells(shard, begin + start), begin + start):
            yield Row(shard * SHARD_FACTOR + place, cells)

    def without_first(self, count: int) -> ShardedRows:
        """The rows after the first ``count``, which are read to find where these end."""
        begins = list(self.begins)
        while begins and count > 0:
            shard, begin = begins[0]
            num_read = sum(1 for _ in islice(self.source.cells(shard, begin), count + 1))
            if num_read > count:
                begins[0] = (shard, begin + count)
                break
            count -= num_read
            begins.pop(0)
        return replace(self, begins=tuple(begins))

    def only(self, column: str) -> ShardedRows:
        """The same rows with one column."""
        return replace(self, source=self.source.only(column))

    def name(self, number: int) -> str:
        """Name of a row: its shard, and its place in it."""
        shard, place = divmod(number, SHARD_FACTOR)
        return f"row {place} of {self.source.name(shard)}"


def first_rows(rows: RowStream, count: int) -> list[Row]:
    """The first rows of a stream, in order; of a mixture those of each source."""
    first: list[Row] = []
    for source in rows.sources:
        parts = 1 if source.num_rows is not None else source.num_parts
        first += islice((row for part in range(parts) for row in source.read(part, parts)), count)
    return first


def spread_rows(rows: RowStream, count: int) -> list[Row]:
    """About ``count`` rows from the beginnings of some parts, evenly spread over all of them."""
    spread: list[Row] = []
    for source in rows.sources:
        parts = source.num_parts
        chosen = sorted({number * parts // min(parts, 8) for number in range(min(parts, 8))})
        each = -(-count // (len(chosen) * len(rows.sources))) if chosen else 0
        spread += (row for part in chosen for row in islice(source.read(part, parts), each))
    return spread

"""Several sources as one stream: each keeps its own lanes, and the weights say which one a sample is from."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.training.data.streaming.opening import OpenedRows
from diffusers_ddpm_ext.training.data.streaming.rows import Row, RowStream


@dataclass(frozen=True)
class SourceRows:
    """The rows of one source of a mixture, with the numbers and columns of the mixture; see `RowStream`.

    Attributes:
        rows: of the source.
        place: of the source among ``count``: row n has the number n * count + place.
        count: of the sources.
        image_column: name of the images' column in the source, and in the mixture.
        class_column: the column whose numbers become ``class_names``; None where its values stay.
        class_names: of the source.
    """

    rows: RowStream
    place: int
    count: int
    image_column: tuple[str, str]
    class_column: str | None = None
    class_names: Sequence[str] = ()
    weights: tuple[float, ...] = ()

    @property
    def sources(self) -> Sequence[RowStream]:
        """These rows alone."""
        return (self,)

    @property
    def num_rows(self) -> int | None:
        """Number of rows, if it is known."""
        return self.rows.num_rows

    @property
    def num_parts(self) -> int:
        """Parts that can be read apart."""
        return self.rows.num_parts

    def read(self, part: int, parts: int, start: int = 0) -> Iterator[Row]:
        """Yield the rows of a part."""
        for row in self.rows.read(part, parts, start):
            yield Row(row.number * self.count + self.place, self._cells(row.cells))

    def _cells(self, cells: Mapping[str, Any]) -> dict[str, Any]:
        """The cells under the mixture's names, classes by name."""
        own, shared = self.image_column
        renamed = {shared if name == own else name: value for name, value in cells.items()}
        label = renamed.get(self.class_column) if self.class_column is not None else None
        if isinstance(label, int) and 0 <= label < len(self.class_names):
            renamed[str(self.class_column)] = self.class_names[label]
        return renamed

    def without_first(self, count: int) -> SourceRows:
        """The rows after the first ``count``."""
        known = self.num_rows
        return replace(self, rows=self.rows.without_first(count if known is None else min(count, known)))

    def only(self, column: str) -> SourceRows:
        """The same rows with one column."""
        return replace(self, rows=self.rows.only(column))

    def name(self, number: int) -> str:
        """Name of a row."""
        return self.rows.name(number // self.count)


@dataclass(frozen=True)
class MixedRows:
    """The rows of several sources; see `RowStream`.

    Attributes:
        sources: with numbers and columns of the mixture.
        weights: how often a row of each is drawn.
        labels: of the sources, for names of rows.
    """

    sources: Sequence[SourceRows]
    weights: tuple[float, ...]
    labels: Sequence[str]

    @property
    def num_rows(self) -> int | None:
        """Number of rows, if it is known; 0 if a source has none."""
        counts = [each.num_rows for each in self.sources]
        if 0 in counts:
            return 0
        return None if None in counts else sum(count or 0 for count in counts)

    @property
    def num_parts(self) -> int:
        """Parts of all sources; 0 if a source has none."""
        counts = [each.num_parts for each in self.sources]
        return 0 if 0 in counts else sum(counts)

    def read(self, part: int, parts: int, start: int = 0) -> Iterator[Row]:
        """Yield the rows of one of all parts, or of the only one: of one source after the other."""
        assert start == 0
        if parts == 1:
            for each in self.sources:
                for own in range(each.num_parts):
                    yield from each.read(own, each.num_parts)
            return
        assert parts == self.num_parts
        for each in self.sources:
            if part < each.num_parts:
                yield from each.read(part, each.num_parts)
                return
            part -= each.num_parts

    def without_first(self, count: int) -> MixedRows:
        """The rows after the first ``count`` of each source."""
        return replace(self, sources=[each.without_first(count) for each in self.sources])

    def only(self, column: str) -> MixedRows:
        """The same rows with one column."""
        return replace(self, sources=[each.only(column) for each in self.sources])

    def name(self, number: int) -> str:
        """Name of a row, and of its source."""
        place = number % len(self.sources)
        return f"{self.sources[place].name(number)} of {self.labels[place]}"


def join_opened(opened: Sequence[OpenedRows], weights: tuple[float, ...]) -> OpenedRows:
    """Several sources as one.

    Args:
        opened: the sources.
        weights: of the sources.

    Raises:
        ConfigError: of one source the classes have names, of another they are numbers.
    """
    first = opened[0]
    names = [each.class_names for each in opened]
    differ = any(each != names[0] for each in names)
    if first.class_column is not None:
        _check_classes(opened)
    rows = [
        SourceRows(
            each.rows,
            place,
            len(opened),
            (each.image_column, first.image_column),
            each.class_column if differ and each.class_names is not None else None,
            each.class_names or (),
        )
        for place, each in enumerate(opened)
    ]
    option = first.option.partition(" ")[0]
    labels = [each.option.partition(" ")[2] for each in opened]
    identities = "\0".join(each.identity for each in opened)
    return OpenedRows(
        MixedRows(rows, weights, labels),
        f"{option} {', '.join(labels[:-1])} and {labels[-1]}",
        first.image_column,
        first.class_column,
        None if differ else first.class_names,
        differ or first.labels_are_names,
        not differ and first.has_integer_labels,
        hashlib.sha256(identities.encode()).hexdigest(),
        sum((Counter(each.other_images) for each in opened), Counter()),
    )


def _check_classes(opened: Sequence[OpenedRows]) -> None:
    """Refuse numbers beside names."""
    kinds = [
        "numbers" if each.class_names is None and each.has_integer_labels else "names or texts" for each in opened
    ]
    for each, kind in zip(opened, kinds, strict=True):
        if kind != kinds[0]:
            raise ConfigError(
                f"--class_column {printable(str(each.class_column), 60)}: the classes of {opened[0].option} are"
                f" {kinds[0]}, those of {each.option} {kind}: give all data sets the same kind"
            )

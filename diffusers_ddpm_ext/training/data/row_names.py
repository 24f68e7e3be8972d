"""Names and values of the rows of a large table, of which Python objects are made only where they are used."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

PREFIX = "row "


class _Names(Sequence[str]):
    """Names by their positions."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the name at a position in [0, len)."""

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self.name(position) for position in range(len(self))[index]]
        return self.name(range(len(self))[index])


@dataclass(frozen=True)
class RowNames(_Names):
    """The names of the rows of a table: ``row 0``, ``row 1``, ..."""

    num_rows: int

    def __len__(self) -> int:
        return self.num_rows

    def name(self, index: int) -> str:
        """Return the name of a row."""
        return f"{PREFIX}{index}"


@dataclass(frozen=True)
class ChosenNames(_Names):
    """Some of the names of a source.

    Attributes:
        names: all of them.
        rows: positions in ``names``, ascending.
    """

    names: Sequence[str]
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """Return the name at a position among the chosen ones."""
        return self.names[int(self.rows[index])]


@dataclass(frozen=True)
class RowValues(Mapping[str, Any]):
    """The values of a column by the names of its rows, each different value once.

    Attributes:
        distinct: the different values, in the order of their first occurrence.
        codes: position in ``distinct`` of the value of each row, (n,).
    """

    distinct: Sequence[Any]
    codes: np.ndarray

    def __len__(self) -> int:
        return len(self.codes)

    def __iter__(self) -> Iterator[str]:
        return iter(RowNames(len(self)))

    def __getitem__(self, name: str) -> Any:
        if not name.startswith(PREFIX):
            raise KeyError(name)
        return self.distinct[self.codes[int(name.removeprefix(PREFIX))]]


def distinct_values(values: Mapping[str, Any], images: Sequence[str]) -> tuple[list[Any], np.ndarray, np.ndarray]:
    """The different values of images; 1, 1.0 and True are different.

    Args:
        values: by name of the image.
        images: their names.

    Returns:
        The values, in the order of their first occurrence; the position in ``images`` of that occurrence, (k,); and
        for each image the position of its value among them, (n,).
    """
    if isinstance(values, RowValues) and isinstance(images, RowNames | ChosenNames):
        codes = values.codes if isinstance(images, RowNames) else values.codes[np.asarray(images.rows)]
        first = np.full(len(values.distinct), -1, np.int64)
        first[codes[::-1]] = np.arange(len(codes) - 1, -1, -1)  # of several assignments the last one counts
        present = np.flatnonzero(first >= 0)
        order = present[np.argsort(first[present])]
        place = np.empty(len(first), np.int32)
        place[order] = np.arange(len(order))
        return [values.distinct[code] for code in order], first[order], place[codes]
    found: dict[Any, int] = {}
    distinct: list[Any] = []
    first_images, all_codes = [], np.empty(len(images), np.int64)
    for position, image in enumerate(images):
        value = values[image]
        key = (type(value), value if value.__hash__ else position)
        try:
            number = found.setdefault(key, len(distinct))
        except TypeError:  # a tuple that holds a list
            number = len(distinct)
        if number == len(distinct):
            distinct.append(value)
            first_images.append(position)
        all_codes[position] = number
    return distinct, np.array(first_images, np.int64), all_codes

"""A suggested flag of `ddpm-ext train`, and the command line of several."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Suggestion:
    """A flag of `ddpm-ext train`, its values, and one sentence why."""

    flag: str
    values: tuple[str, ...]
    reason: str

    @property
    def words(self) -> list[str]:
        """The flag as the words of a command line."""
        return [f"--{self.flag}", *self.values]


@dataclass(frozen=True)
class Origin:
    """Where the images come from: the flags that select them.

    Attributes:
        name: of the folder or dataset.
        flags: that were given, and their values.
    """

    name: str
    flags: Sequence[tuple[str, tuple[str, ...]]]


def plain_number(value: float) -> str:
    """A number for a command line, whose parser takes none with an exponent below zero."""
    return np.format_float_positional(value, trim="-")


def command_line(suggestions: Sequence[Suggestion]) -> str:
    """The suggested command, for a POSIX shell."""
    return shlex.join(["ddpm-ext", "train", *(word for each in suggestions for word in each.words)])

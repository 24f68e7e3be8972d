"""What became of one setting of an original configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Fate = Literal["translated", "without effect", "refused"]


@dataclass(frozen=True)
class Row:
    """One key of a file.

    Attributes:
        key: dotted, as it stands in the file.
        value: as it stands in the file.
        fate: what became of it.
        note: what it is here, or why it is nothing.
    """

    key: str
    value: Any
    fate: Fate
    note: str

"""What a check of `ddpm-ext doctor` finds."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Mark(Enum):
    """How a finding is marked in the output."""

    FINE = " "
    ADVICE = "?"
    WRONG = "!"


@dataclass(frozen=True)
class Finding:
    """Result of one check: its mark, and a line with the remedy."""

    mark: Mark
    text: str

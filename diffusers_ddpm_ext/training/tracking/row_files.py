"""Trimming of a run's ``.jsonl`` files to the rows before the checkpoint from which the run resumes.

A file is trimmed by the steps of its rows, not to a number of bytes: it may have been shortened, edited, deleted, or
left behind when a checkpoint was copied, and a file must never be extended.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from diffusers_ddpm_ext.utils.files import fsync_folder, write_atomically

MAX_ROW_BYTES = 1 << 20
"""A longer line is not a row of a run."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class TrimmedFile:
    """Result of `trim_rows`.

    Attributes:
        training_rows: number of training steps whose rows are left.
        aside: new path of the file as it was, if it had lines that are not rows; None otherwise.
    """

    training_rows: int
    aside: Path | None = None


@dataclass
class StepRuns:
    """Which steps have rows: runs of successive steps, of which the file of an uninterrupted run has one."""

    runs: list[tuple[int, int]] = field(default_factory=list)

    def add(self, step: int) -> None:
        """Add a step, which may have been added before."""
        first, last = self.runs[-1] if self.runs else (step, step)
        if self.runs and first <= step <= last + 1:
            self.runs[-1] = (first, max(step, last))
        else:
            self.runs.append((step, step))

    def count(self) -> int:
        """Number of different steps."""
        total, counted = 0, -1  # steps are 0 or more
        for first, last in sorted(self.runs):
            total += max(0, last - max(first - 1, counted))
            counted = max(counted, last)
        return total


def trim_rows(path: Path, is_kept: Callable[[Row], bool]) -> TrimmedFile:
    """Leave the rows of a ``.jsonl`` file that a run keeps; create the file if it does not exist.

    Lines that are not rows are left out, too; the file with them is then kept under another name. A last line without
    an end, which a killed process leaves, is no such line.

    Raises:
        OSError: the file cannot be read or written; it is unchanged then.
    """
    if not path.exists():
        path.touch()
        return TrimmedFile(0)
    steps = StepRuns()
    aside = None

    def write_kept(target: BinaryIO) -> None:
        nonlocal aside
        damaged = False
        with path.open("rb") as source:
            for line in _lines(source):
                row = _parse_row(line)
                if row is None:
                    damaged = damaged or line.endswith(b"\n")
                elif is_kept(row):
                    target.write(line)
                    if "lr" in row:
                        steps.add(row["step"])
        if damaged:
            aside = _unused_name(path)
            shutil.copyfile(path, aside)

    write_atomically(path, write_kept, fsync=True)
    fsync_folder(path.parent)
    return TrimmedFile(steps.count(), aside)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, each cut into parts of limited length.

    Earlier versions extended a file that was too short with NUL bytes, which are left out.
    """
    while line := file.readline(MAX_ROW_BYTES):
        if line := line.lstrip(b"\0"):
            yield line


def _parse_row(line: bytes) -> Row | None:
    """The row in a complete line; None if it is not a JSON object with a step."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int and row["step"] >= 0 else None


def _unused_name(path: Path) -> Path:
    number, aside = 1, path.with_name(f"aside-{path.name}")
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"aside-{path.stem}-{number}{path.suffix}")
    return aside

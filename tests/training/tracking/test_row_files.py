"""The rows of a run before the step it resumes from, in files that were changed meanwhile."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from diffusers_ddpm_ext.training.tracking.console import ProgressDisplay
from diffusers_ddpm_ext.training.tracking.metrics import MetricsLogger
from diffusers_ddpm_ext.training.tracking.row_files import StepRuns, trim_rows

STEPS, RESUMED = 9, 6


def written(folder: Path, validation: int = RESUMED) -> list[bytes]:
    """Nine training rows, and a validation at the step of the checkpoint and at the last."""
    rows: list[dict[str, float]] = []
    for step in range(1, STEPS + 1):
        rows.append({"step": step, "train/loss": 1 / step, "lr": 1e-3})
        if step in (validation, STEPS):
            rows.append({"step": step, "val/loss": 0.5})
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    (folder / "metrics.jsonl").write_bytes(b"".join(lines))
    return lines


def logger(folder: Path) -> MetricsLogger:
    return MetricsLogger(folder, lambda row, step: None, False, 8, ProgressDisplay(STEPS))


def steps(folder: Path, name: str = "metrics.jsonl") -> list[int]:
    content = (folder / name).read_bytes()
    assert b"\0" not in content
    return [json.loads(line)["step"] for line in content.splitlines()]


CHANGES: dict[str, tuple[Callable[[list[bytes]], bytes | None], list[int]]] = {
    "as written": (b"".join, [1, 2, 3, 4, 5, 6, 6]),
    "deleted": (lambda lines: None, []),
    "empty": (lambda lines: b"", []),
    "cut at a line": (lambda lines: b"".join(lines[:3]), [1, 2, 3]),
    "cut within a line": (lambda lines: b"".join(lines[:4])[:-7], [1, 2, 3]),
    "one byte short": (lambda lines: b"".join(lines[:7])[:-1], [1, 2, 3, 4, 5, 6]),
    "a row removed": (lambda lines: b"".join(lines[:2] + lines[3:]), [1, 2, 4, 5, 6, 6]),
    "longer numbers": (lambda lines: b"".join(lines).replace(b"0.001", b"0.0010000000"), [1, 2, 3, 4, 5, 6, 6]),
    "shorter numbers": (lambda lines: b"".join(lines).replace(b"0.001", b"1"), [1, 2, 3, 4, 5, 6, 6]),
    "NUL bytes of an earlier version": (lambda lines: b"".join(lines[:2]) + b"\0" * 900 + lines[6], [1, 2, 6]),
    "no newlines, 3 MB": (lambda lines: b"".join(lines[:2]) + b"x" * 3_000_000, [1, 2]),
    "not UTF-8": (lambda lines: lines[0] + b"\xff\xfe\n" + lines[1], [1, 2]),
    "rows of other files": (lambda lines: lines[0] + b'[1]\n{"a": 1}\n{"step": "2"}\n{"step": true}\n', [1]),
    "nested 100,000-fold": (lambda lines: lines[0] + b"[" * 100_000 + b"\n" + lines[1], [1, 2]),
    "a number of 5,000 digits": (lambda lines: lines[0] + b'{"step": ' + b"9" * 5000 + b"}\n" + lines[1], [1, 2]),
    "CRLF": (lambda lines: b"".join(lines).replace(b"\n", b"\r\n"), [1, 2, 3, 4, 5, 6, 6]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_only_rows_before_the_checkpoint_are_left(change: str, tmp_path: Path):
    edit, expected = CHANGES[change]
    content = edit(written(tmp_path))
    if content is None:
        (tmp_path / "metrics.jsonl").unlink()
    else:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    logger(tmp_path).trim_files(RESUMED)
    assert steps(tmp_path) == expected


def test_rows_that_are_kept_are_the_same_bytes(tmp_path: Path):
    lines = written(tmp_path)
    logger(tmp_path).trim_files(RESUMED)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(lines[:7])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "timing.jsonl"]


def test_a_validation_that_is_repeated_has_one_row(tmp_path: Path):
    written(tmp_path)
    logger(tmp_path).trim_files(RESUMED, validation_pending=True)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_a_new_run_starts_without_rows(tmp_path: Path):
    written(tmp_path)
    (tmp_path / "timing.jsonl").write_text('{"step": 2}\n')
    logger(tmp_path).trim_files(0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (tmp_path / "timing.jsonl").read_bytes() == b""


def test_timing_has_no_rows_of_steps_that_are_repeated(tmp_path: Path):
    """A killed process leaves an incomplete line: the next row must not be appended to it."""
    (tmp_path / "timing.jsonl").write_text('{"step": 4}\n{"step": 8}\n{"st')
    logger(tmp_path).trim_files(RESUMED)
    assert steps(tmp_path, "timing.jsonl") == [4]


def test_lost_rows_are_a_warning_and_foreign_lines_are_kept_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = written(tmp_path)
    edited = b"my own note\n" + b"".join(lines[:4])
    (tmp_path / "metrics.jsonl").write_bytes(edited)
    (tmp_path / "aside-metrics.jsonl").write_text("of the user")
    logger(tmp_path).trim_files(RESUMED)
    error = capsys.readouterr().err
    assert "has rows of 4 of the 6 steps" in error
    assert "kept as aside-metrics-2.jsonl" in error
    assert (tmp_path / "aside-metrics-2.jsonl").read_bytes() == edited
    assert (tmp_path / "aside-metrics.jsonl").read_text() == "of the user"
    logger(tmp_path).trim_files(4)
    assert "aside" not in capsys.readouterr().err


def test_a_file_that_cannot_be_written_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines = written(tmp_path)

    def fail(row: object) -> bool:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        trim_rows(tmp_path / "metrics.jsonl", fail)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(lines)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_steps_are_counted_in_memory_that_does_not_grow_with_them():
    """An uninterrupted run is one entry; any order, with repeated steps, is counted as by a set."""
    found = StepRuns()
    for step in range(1, 20_001):
        found.add(step)
    assert len(found.runs) == 1
    assert found.count() == 20_000
    draws = random.Random(0)
    for _ in range(200):
        numbers = [draws.randrange(30) for _ in range(draws.randrange(60))]
        found = StepRuns()
        for step in numbers:
            found.add(step)
        assert found.count() == len(set(numbers)), numbers

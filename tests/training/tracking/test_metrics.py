"""Metrics of a run in its files and trackers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from diffusers_ddpm_ext.training.tracking.console import ProgressDisplay
from diffusers_ddpm_ext.training.tracking.metrics import MAX_RECENT_LOSSES, MetricsLogger, Stopwatch
from diffusers_ddpm_ext.training.tracking.step_losses import StepRecord


def test_files_and_tracker(tmp_path: Path):
    """Every step has its row; the tracker gets the mean of a block; seconds stay out of metrics.jsonl."""
    tracked: list[tuple[dict[str, float], int]] = []
    logger = MetricsLogger(tmp_path, lambda row, step: tracked.append((dict(row), step)), False, 8, ProgressDisplay(2))
    logger.trim_files(0)
    logger.log_training([StepRecord(n, 0.1 * n, n, n, n, 0, 0, math.nan) for n in (1, 2)])
    logger.log_validation(2, {"val/loss": 5.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2]
    assert lines[2] == {"step": 2, "val/loss": 5.0}
    assert tracked[0][0]["train/loss"] == 1.5
    assert tracked[0][0]["lr"] == 0.2
    assert tracked == [(tracked[0][0], 2), ({"val/loss": 5.0}, 2)]
    timing = json.loads((tmp_path / "timing.jsonl").read_text())
    assert set(timing) == {"step", "seconds", "images_per_second", "start_step"}
    assert timing["start_step"] == 0
    logger.trim_files(2)
    logger.log_training([StepRecord(3, 0.1, 1, 1, 1, 0, 0, math.nan)])
    assert json.loads((tmp_path / "timing.jsonl").read_text().splitlines()[-1])["start_step"] == 2


def test_the_stopwatch_excludes_pauses(monkeypatch: pytest.MonkeyPatch):
    now = iter([0.0, 2.0, 10.0, 13.0])  # start, a break from 2 to 10, a lap at 13
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    watch = Stopwatch()
    with watch.stopped():
        pass
    assert watch.lap() == 5.0
    assert watch.seconds == 5.0


def test_a_run_without_images_keeps_a_bounded_number_of_losses(tmp_path: Path):
    """The newest ones are kept for a histogram that may never be drawn."""
    logger = MetricsLogger(tmp_path, lambda row, step: None, False, 8, ProgressDisplay(2))
    for _ in range(3):
        logger.log_training([StepRecord(1, 0.1, 0.0, float(n), 0, 0, 0, 1.0) for n in range(MAX_RECENT_LOSSES // 2)])
    assert len(logger.recent_losses) == MAX_RECENT_LOSSES
    assert logger.recent_losses[-1] == MAX_RECENT_LOSSES // 2 - 1

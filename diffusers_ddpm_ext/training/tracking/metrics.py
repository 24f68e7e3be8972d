"""Metrics of a run: one row per step in ``metrics.jsonl``, speed in ``timing.jsonl``, both for trackers too."""

from __future__ import annotations

import errno
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.errors import warn
from diffusers_ddpm_ext.training.tracking.console import ProgressDisplay
from diffusers_ddpm_ext.training.tracking.row_files import trim_rows
from diffusers_ddpm_ext.training.tracking.step_losses import StepRecord
from diffusers_ddpm_ext.training.tracking.trackers import log_images_and_losses
from diffusers_ddpm_ext.utils.files import METRICS
from diffusers_ddpm_ext.utils.run_timing import TIMING

MAX_RECENT_LOSSES = 10_000
"""Losses of single steps in a histogram, at most: a run may never draw the images that it is logged with."""


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of rows with the same names; empty without rows."""
    names = [name for name in rows[-1] if name not in ("step", "lr")] if rows else []
    return {name: sum(row[name] for row in rows) / len(rows) for name in names}


class Stopwatch:
    """Seconds of training, without the pauses for validation, images and files."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Seconds of training since the last lap."""
        now = time.perf_counter()
        lap, self._since = now - self._since, now
        self.seconds += lap
        return lap

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Pause while the body runs."""
        before = time.perf_counter()
        yield
        self._since += time.perf_counter() - before


@dataclass
class MetricsLogger:
    """Logs the metrics of a run to its files, trackers and progress bar; on the main process only.

    Attributes:
        folder: of the run.
        track: logs a row of values at a step to the trackers.
        learned_logvar: whether the run learns log-variances.
        images_per_step: effective batch.
        progress_bar: shows the last loss.
        is_stream: whether the images are a stream, whose samples are counted in place of epochs.
        stopwatch: seconds of training.
        start_step: optimizer steps that were done when this process began.
        pending: bytes by file that could not be written yet.
        tracker_failed: whether a tracker failed; nothing is sent to the trackers any more.
        recent_losses: losses of single steps since the last images, the last ``MAX_RECENT_LOSSES`` of them.
    """

    folder: Path
    track: Callable[[Mapping[str, float], int], None]
    learned_logvar: bool
    images_per_step: int
    progress_bar: ProgressDisplay
    is_stream: bool = False
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    start_step: int = 0
    pending: dict[str, bytes] = field(default_factory=dict)
    tracker_failed: bool = False
    recent_losses: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_RECENT_LOSSES))

    def trim_files(self, step: int, validation_pending: bool = False) -> None:
        """Leave the rows up to the step that a run resumes from, none at step 0, and warn of rows that are lost.

        Args:
            step: optimizer steps done.
            validation_pending: whether the validation of ``step`` is repeated, so that its rows go, too.
        """

        self.start_step = step

        def is_kept(row: Mapping[str, Any]) -> bool:
            return row["step"] < step or (row["step"] == step and ("lr" in row or not validation_pending))

        trimmed = trim_rows(self.folder / METRICS, is_kept)
        trim_rows(self.folder / TIMING, lambda row: row["step"] <= step if step else False)
        if trimmed.aside is not None:
            warn(f"{METRICS} has lines that are not rows of a run: it is kept as {trimmed.aside.name}")
        if trimmed.training_rows < step:
            warn(
                f"{self.folder / METRICS} has rows of {trimmed.training_rows:,} of the {step:,} steps before the"
                " checkpoint: its curves have a gap, the run itself is complete"
            )

    @property
    def metrics_size(self) -> int:
        """Bytes of ``metrics.jsonl``, including rows that could not be written yet."""
        path = self.folder / METRICS
        return (path.stat().st_size if path.is_file() else 0) + len(self.pending.get(METRICS, b""))

    def sync(self) -> None:
        """Flush the rows to the disk, since a checkpoint records how many there are.

        Raises:
            OSError: they cannot be written, and stay in memory.
        """
        self._append(METRICS, [])
        if self.pending[METRICS]:
            raise OSError(errno.ENOSPC, f"{self.folder / METRICS} could not be written; no checkpoint without it")
        with (self.folder / METRICS).open("ab") as file:
            os.fsync(file.fileno())

    def log_training(self, records: list[StepRecord]) -> None:
        """Log the losses of a block of steps, oldest first; trackers and progress bar get their mean."""
        if not records:
            return
        last, seconds = records[-1], self.stopwatch.lap()
        rows = [record.row(self.learned_logvar) for record in records]
        self._append(METRICS, rows)
        speed = len(records) * self.images_per_step / max(seconds, 1e-9)
        timing = {
            "step": last.step,
            "seconds": round(self.stopwatch.seconds, 3),
            "images_per_second": round(speed, 2),
            "start_step": self.start_step,
        }
        seen = {"samples": last.step * self.images_per_step} if self.is_stream else {}
        self._append(TIMING, [timing | seen])
        self.recent_losses += (record.loss_simple for record in records if record.applied)
        mean = _mean([row for row, record in zip(rows, records, strict=True) if record.applied])
        self.log_to_trackers(mean | {"lr": last.learning_rate, "images_per_second": speed} | seen, last.step)
        images = f"{seen['samples']:,} images, " if seen else ""
        loss = f"loss_simple {mean['train/loss_simple']:.4g}, " if mean else ""
        self.progress_bar.show(last.step, f"{images}{loss}lr {last.learning_rate:.2e}, {speed:.0f} images/s")

    def log_validation(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics of a validation after ``step`` optimizer steps."""
        self._append(METRICS, [{"step": step, **values}])
        self.log_to_trackers(values, step)

    def log_to_trackers(self, values: Mapping[str, float], step: int) -> None:
        """Log values to the trackers after ``step`` steps. If one fails, warn once and send nothing more."""
        self._call_trackers(lambda: self.track(values, step))

    def log_images(self, trackers: Sequence[Any], images: Mapping[str, Path], step: int) -> None:
        """Log image files by name, and the losses of single steps as a histogram, to trackers that support them."""
        losses = list(self.recent_losses)
        self.recent_losses.clear()
        if trackers:
            self._call_trackers(lambda: log_images_and_losses(trackers, images, losses, step))

    def _call_trackers(self, call: Callable[[], None]) -> None:
        if self.tracker_failed:
            return
        try:
            call()
        except Exception as error:  # a tracker's library may raise anything; the run must continue
            self.tracker_failed = True
            text = f"{type(error).__name__} {error}; nothing more is sent to the trackers, {METRICS} has all metrics"
            warn(f"--report_to: {text}")

    def _append(self, name: str, rows: list[dict[str, float]]) -> None:
        """Append rows to a file that is opened for this write alone, so that none is lost if the process dies.

        Rows that cannot be written, as on a full disk, are written with the next ones.
        """
        pending = self.pending.get(name, b"") + "".join(json.dumps(row) + "\n" for row in rows).encode()
        self.pending[name] = pending
        try:
            with (self.folder / name).open("ab", buffering=0) as file:
                end = file.tell()
                try:
                    if file.write(pending) != len(pending):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    file.truncate(end)
                    raise
        except OSError as error:
            warn(f"{self.folder / name} could not be written ({error.strerror}); its rows stay in memory")
        else:
            self.pending[name] = b""

"""What a run leaves behind in numbers: one row a step in ``metrics.jsonl``, wall-clock figures in ``timing.jsonl``.

Losses stay on the device until a whole block of steps is read at once, so that a step never waits for its own loss.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from diffusers_ddpm_ext.errors import warn
from diffusers_ddpm_ext.losses.objective import ObjectiveOutput
from diffusers_ddpm_ext.training.tracking.trackers import log_images_and_losses
from diffusers_ddpm_ext.utils.files import METRICS

TIMING = "timing.jsonl"


@dataclass(frozen=True)
class StepRecord:
    """Means over the effective batch of one optimizer step.

    Attributes:
        step: optimizer steps done, the first is 1.
        learning_rate: of the network, in this step.
        loss: what was minimised.
        loss_simple: the distance without any weight.
        loss_vlb: weighted towards the variational bound.
        loss_gamma: the distance under the log-variances, ``mean(loss / exp(logvar) + logvar)``.
        logvar: mean of the table of log-variances.
        grad_norm: 2-norm of the network's gradient before clipping.
        loss_bound: bits per dimension, an estimate of the bound without its prior; None where the loss has no bound.
        applied: whether the step moved the weights; False where it was left out because it was not finite.
    """

    step: int
    learning_rate: float
    loss: float
    loss_simple: float
    loss_vlb: float
    loss_gamma: float
    logvar: float
    grad_norm: float
    loss_bound: float | None = None
    applied: bool = True

    def row(self, learned_logvar: bool) -> dict[str, float]:
        """Name the values as CompVis does.

        Args:
            learned_logvar: whether the run learns log-variances, and so has something to say about them.

        Returns:
            A row for ``metrics.jsonl`` and the trackers.
        """
        if not self.applied:
            return {"step": self.step, "train/skipped": 1, "lr": self.learning_rate}
        row = {
            "step": self.step,
            "train/loss": self.loss,
            "train/loss_simple": self.loss_simple,
            "train/loss_vlb": self.loss_vlb,
        }
        if self.loss_bound is not None:
            row["train/loss_bound"] = self.loss_bound
        if learned_logvar:
            row |= {"train/loss_gamma": self.loss_gamma, "logvar": self.logvar}
        return row | {"train/grad_norm": self.grad_norm, "lr": self.learning_rate}


@dataclass(frozen=True)
class SampleLoss:
    """What one sample of a step was.

    Attributes:
        image: its number in the training set.
        timestep: its step of the chain.
        loss: as it was minimised.
    """

    image: int
    timestep: int
    loss: float


@dataclass(frozen=True)
class StepTrace:
    """One optimizer step as the device knows it: nothing has been read back yet.

    Attributes:
        step: optimizer steps done, this one included.
        learning_rate: of the network, in this step.
        outputs: of the micro-batches.
        images: of the micro-batches, their samples' numbers in the training set, on the CPU.
        timesteps: of the micro-batches, on the CPU.
        norms: 2-norms of the gradients of the network's parameters before clipping, (n,).
        applied: as in `StepRecord`.
    """

    step: int
    learning_rate: float
    outputs: list[ObjectiveOutput]
    images: list[Tensor]
    timesteps: list[Tensor]
    norms: Tensor
    applied: bool = True


@dataclass(frozen=True)
class _Pending:
    step: int
    learning_rate: float
    applied: bool
    means: Tensor  # (7,): the means of a StepRecord
    norms: Tensor
    losses: list[Tensor]  # per sample, one tensor a micro-batch
    images: list[Tensor]
    timesteps: list[Tensor]


class LossMeter:
    """Collects the losses of steps on the device and reads many steps at once."""

    def __init__(self) -> None:
        self._pending: list[_Pending] = []
        self._last_read: list[_Pending] = []

    def __len__(self) -> int:
        """Steps that wait to be read."""
        return len(self._pending)

    def add(self, trace: StepTrace) -> None:
        """Note one optimizer step, without reading anything back from the device.

        Args:
            trace: of the step.
        """
        with torch.no_grad():
            terms = [
                torch.stack([out.loss, out.loss_simple, out.loss_vlb, out.loss_gamma, out.logvar_mean, _bound(out)])
                for out in trace.outputs
            ]
            mean = torch.stack(terms).mean(0)
            norm = torch.linalg.vector_norm(trace.norms).to(mean).reshape(1)
        losses = [out.per_sample_loss.detach() for out in trace.outputs]
        means = torch.cat([mean[:5], norm, mean[5:]])
        self._pending.append(
            _Pending(
                trace.step,
                trace.learning_rate,
                trace.applied,
                means,
                trace.norms,
                losses,
                trace.images,
                trace.timesteps,
            )
        )

    def read(self, mean_over_ranks: Callable[[Tensor], Tensor]) -> list[StepRecord]:
        """Read all waiting steps: the one place where the host waits for the device.

        Args:
            mean_over_ranks: averages a tensor over the processes; every process calls this method at the same step.

        Returns:
            One record a step, oldest first.
        """
        self._last_read, self._pending = self._pending, []
        if not self._last_read:
            return []
        values = mean_over_ranks(torch.stack([pending.means for pending in self._last_read])).tolist()
        return [
            replace(
                StepRecord(p.step, p.learning_rate, *row[:6]),
                loss_bound=None if math.isnan(row[6]) else row[6],
                applied=p.applied,
            )
            for p, row in zip(self._last_read, values, strict=True)
        ]

    def samples(self, step: int) -> list[SampleLoss]:
        """This process's samples of a step.

        Args:
            step: one that waits, or of the block that was read last.
        """
        trace = self._find(step)
        losses, images, timesteps = (
            torch.cat(part).tolist() for part in (trace.losses, trace.images, trace.timesteps)
        )
        return [SampleLoss(*facts) for facts in zip(images, timesteps, losses, strict=True)]

    def norms(self, step: int) -> list[float]:
        """The norms of the gradients of the network's parameters in a step.

        Args:
            step: as in `samples`.
        """
        found: list[float] = self._find(step).norms.tolist()
        return found

    def _find(self, step: int) -> _Pending:
        return next(pending for pending in (*self._pending, *self._last_read) if pending.step == step)


def _bound(output: ObjectiveOutput) -> Tensor:
    return torch.full_like(output.loss, math.nan) if output.loss_bound is None else output.loss_bound.to(output.loss)


def first_nonfinite(records: list[StepRecord], look_at_gradients: bool) -> StepRecord | None:
    """The step at which a run broke.

    Args:
        records: oldest first; those that were not applied are no harm.
        look_at_gradients: whether a gradient counts. Not under a loss scaler, which skips such steps.

    Returns:
        The first record whose loss or gradient is not finite, None if there is none.
    """
    for record in records:
        values = (record.loss, record.loss_simple, *((record.grad_norm,) if look_at_gradients else ()))
        if record.applied and not all(map(math.isfinite, values)):
            return record
    return None


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of rows with the same names; nothing of none."""
    names = [name for name in rows[-1] if name not in ("step", "lr")] if rows else []
    return {name: sum(row[name] for row in rows) / len(rows) for name in names}


class Stopwatch:
    """Seconds of training, without the breaks for validation, pictures and files."""

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
        """Do not count what happens inside."""
        before = time.perf_counter()
        yield
        self._since += time.perf_counter() - before


@dataclass
class MetricsLogger:
    """The numbers of a run on their way to its files, its tracker and its progress bar; in the first process only.

    Attributes:
        folder: of the run.
        track: hands a row to the tracker, with its step.
        learned_logvar: whether the run learns log-variances.
        images_per_step: effective batch.
        progress_bar: shows the last loss.
        stopwatch: counts the seconds.
        waiting: rows by file that could not be written yet.
        tracker_failed: whether the tracker failed, and is not asked any more.
        recent: losses of single steps since the last pictures.
    """

    folder: Path
    track: Callable[[Mapping[str, float], int], None]
    learned_logvar: bool
    images_per_step: int
    progress_bar: tqdm
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    waiting: dict[str, bytes] = field(default_factory=dict)
    tracker_failed: bool = False
    recent: list[float] = field(default_factory=list)

    def open_files(self, size: int = 0) -> None:
        """Begin with empty files, or where a checkpoint was written.

        Args:
            size: bytes of ``metrics.jsonl`` that belong to the past of this run; what follows is dropped.
        """
        with (self.folder / METRICS).open("ab") as file:
            file.truncate(size)
        with (self.folder / TIMING).open("ab") as file:
            file.truncate(None if size else 0)

    @property
    def metrics_size(self) -> int:
        """Bytes of ``metrics.jsonl`` with the rows that could not be written yet."""
        path = self.folder / METRICS
        return (path.stat().st_size if path.is_file() else 0) + len(self.waiting.get(METRICS, b""))

    def sync(self) -> None:
        """Send the rows to the disk: a checkpoint counts on them.

        Raises:
            OSError: it refuses; the rows wait in memory.
        """
        self._append(METRICS, [])
        if self.waiting[METRICS]:
            raise OSError(errno.ENOSPC, f"{self.folder / METRICS} could not be written; no checkpoint without it")
        with (self.folder / METRICS).open("ab") as file:
            os.fsync(file.fileno())

    def log_training(self, records: list[StepRecord]) -> None:
        """Write down the losses of a block of steps.

        Args:
            records: oldest first; the tracker and the bar get their mean.
        """
        if not records:
            return
        last, seconds = records[-1], self.stopwatch.lap()
        rows = [record.row(self.learned_logvar) for record in records]
        self._append(METRICS, rows)
        speed = len(records) * self.images_per_step / max(seconds, 1e-9)
        timing = {"step": last.step, "seconds": round(self.stopwatch.seconds, 3), "images_per_second": round(speed, 2)}
        self._append(TIMING, [timing])
        self.recent += [record.loss_simple for record in records if record.applied]
        mean = _mean([row for row, record in zip(rows, records, strict=True) if record.applied])
        self.log_to_trackers(mean | {"lr": last.learning_rate, "images_per_second": speed}, last.step)
        loss = f"loss {mean['train/loss']:.4g}, " if mean else ""
        self.progress_bar.set_postfix_str(f"{loss}lr {last.learning_rate:.2e}, {speed:.0f} images/s")

    def log_validation(self, step: int, values: Mapping[str, float]) -> None:
        """Write down the result of a validation.

        Args:
            step: optimizer steps done.
            values: by name.
        """
        self._append(METRICS, [{"step": step, **values}])
        self.log_to_trackers(values, step)

    def log_to_trackers(self, values: Mapping[str, float], step: int) -> None:
        """Hand numbers to the tracker. One that fails is named, and left alone from then on.

        Args:
            values: by name.
            step: optimizer steps done.
        """
        self._ask(lambda: self.track(values, step))

    def log_images(self, trackers: Sequence[Any], pictures: Mapping[str, Path], step: int) -> None:
        """Hand pictures, and the losses of single steps as a histogram, to the trackers that take them.

        Args:
            trackers: of Accelerate.
            pictures: by name.
            step: optimizer steps done.
        """
        losses, self.recent = self.recent, []
        if trackers:
            self._ask(lambda: log_images_and_losses(trackers, pictures, losses, step))

    def _ask(self, tracker: Callable[[], None]) -> None:
        if self.tracker_failed:
            return
        try:
            tracker()
        except Exception as error:  # whatever a tracker's library raises, a run of a week does not end for it
            self.tracker_failed = True
            warn(f"--report_to: {type(error).__name__} {error}; the tracker gets no more numbers, {METRICS} has them")

    def _append(self, name: str, rows: list[dict[str, float]]) -> None:
        """Add rows to a file that is opened for them alone, so that a dying process loses none.

        Rows that a full disk refuses wait for the next ones.
        """
        waiting = self.waiting.get(name, b"") + "".join(json.dumps(row) + "\n" for row in rows).encode()
        self.waiting[name] = waiting
        try:
            with (self.folder / name).open("ab", buffering=0) as file:
                end = file.tell()
                try:
                    if file.write(waiting) != len(waiting):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    file.truncate(end)
                    raise
        except OSError as error:
            warn(f"{self.folder / name} could not be written ({error.strerror}); its rows wait in memory")
        else:
            self.waiting[name] = b""

"""What a run leaves behind in numbers: one row a step in ``metrics.jsonl``, wall-clock figures in ``timing.jsonl``.

Losses stay on the device until a whole block of steps is read at once, so that a step never waits for its own loss.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from diffusers_ddpm_ext.objective import ObjectiveOutput

METRICS = "metrics.jsonl"
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
        grad_norm: 2-norm of the network's gradient before clipping; NaN where nothing is clipped.
    """

    step: int
    learning_rate: float
    loss: float
    loss_simple: float
    loss_vlb: float
    loss_gamma: float
    logvar: float
    grad_norm: float

    def row(self, learned_logvar: bool) -> dict[str, float]:
        """Name the values as CompVis does.

        Args:
            learned_logvar: whether the run learns log-variances, and so has something to say about them.

        Returns:
            A row for ``metrics.jsonl`` and the trackers.
        """
        row = {
            "step": self.step,
            "train/loss": self.loss,
            "train/loss_simple": self.loss_simple,
            "train/loss_vlb": self.loss_vlb,
        }
        if learned_logvar:
            row |= {"train/loss_gamma": self.loss_gamma, "logvar": self.logvar}
        if not math.isnan(self.grad_norm):
            row["train/grad_norm"] = self.grad_norm
        return row | {"lr": self.learning_rate}


@dataclass(frozen=True)
class _Pending:
    step: int
    learning_rate: float
    means: Tensor  # (6,): the six means of a StepRecord
    losses: list[Tensor]  # per sample, one tensor a micro-batch
    timesteps: list[Tensor]


class LossMeter:
    """Collects the losses of steps on the device and reads many steps at once."""

    def __init__(self) -> None:
        self._pending: list[_Pending] = []
        self._last_read: list[_Pending] = []

    def __len__(self) -> int:
        """Steps that wait to be read."""
        return len(self._pending)

    def add(
        self,
        step: int,
        learning_rate: float,
        outputs: list[ObjectiveOutput],
        timesteps: list[Tensor],
        grad_norm: Tensor | None,
    ) -> None:
        """Note one optimizer step, without reading anything back from the device.

        Args:
            step: optimizer steps done, this one included.
            learning_rate: of the network, in this step.
            outputs: of the micro-batches.
            timesteps: of the micro-batches, on the CPU.
            grad_norm: of the network before clipping, None where nothing is clipped.
        """
        with torch.no_grad():
            terms = [
                torch.stack([out.loss, out.loss_simple, out.loss_vlb, out.loss_gamma, out.logvar_mean])
                for out in outputs
            ]
            mean = torch.stack(terms).mean(0)
            norm = mean.new_full((1,), math.nan) if grad_norm is None else grad_norm.detach().to(mean).reshape(1)
        losses = [out.per_sample_loss.detach() for out in outputs]
        self._pending.append(_Pending(step, learning_rate, torch.cat([mean, norm]), losses, timesteps))

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
        return [StepRecord(p.step, p.learning_rate, *row) for p, row in zip(self._last_read, values, strict=True)]

    def suspects(self, step: int) -> list[int]:
        """This process's timesteps whose loss was not finite in a step of the block that was read last.

        Args:
            step: as in its record.

        Returns:
            Timesteps, ascending; empty where the loss was finite and only a gradient was not.
        """
        for pending in self._last_read:
            if pending.step == step:
                bad = ~torch.isfinite(torch.cat(pending.losses).cpu())
                return sorted(set(torch.cat(pending.timesteps)[bad].tolist()))
        return []


def first_nonfinite(records: list[StepRecord], look_at_gradients: bool) -> StepRecord | None:
    """The step at which a run broke.

    Args:
        records: oldest first.
        look_at_gradients: whether an infinite gradient counts. Not under a loss scaler, which skips such steps.

    Returns:
        The first record whose loss or gradient is not finite, None if there is none.
    """
    for record in records:
        broken_gradient = look_at_gradients and math.isinf(record.grad_norm)
        if not math.isfinite(record.loss) or not math.isfinite(record.loss_simple) or broken_gradient:
            return record
    return None


def warn(text: str) -> None:
    """Tell a person, above the progress bar, of something that a run survives."""
    tqdm.write(f"warning: {text}", file=sys.stderr)


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
class Records:
    """The numbers of a run on their way to its files, its tracker and its progress bar; in the first process only.

    Attributes:
        folder: of the run.
        track: hands a row to the tracker, with its step.
        learned_logvar: whether the run learns log-variances.
        images_per_step: effective batch.
        bar: shows the last loss.
        watch: counts the seconds.
        waiting: rows by file that could not be written yet.
    """

    folder: Path
    track: Callable[[Mapping[str, float], int], None]
    learned_logvar: bool
    images_per_step: int
    bar: tqdm
    watch: Stopwatch = field(default_factory=Stopwatch)
    waiting: dict[str, bytes] = field(default_factory=dict)

    def start(self, size: int = 0) -> None:
        """Begin with empty files, or where a checkpoint was written.

        Args:
            size: bytes of ``metrics.jsonl`` that belong to the past of this run; what follows is dropped.
        """
        with (self.folder / METRICS).open("ab") as file:
            file.truncate(size)
        with (self.folder / TIMING).open("ab") as file:
            file.truncate(None if size else 0)

    @property
    def size(self) -> int:
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

    def training(self, records: list[StepRecord]) -> None:
        """Write down the losses of a block of steps.

        Args:
            records: oldest first; the tracker and the bar get their mean.
        """
        if not records:
            return
        last, seconds = records[-1], self.watch.lap()
        rows = [record.row(self.learned_logvar) for record in records]
        self._append(METRICS, rows)
        speed = len(records) * self.images_per_step / max(seconds, 1e-9)
        timing = {"step": last.step, "seconds": round(self.watch.seconds, 3), "images_per_second": round(speed, 2)}
        self._append(TIMING, [timing])
        mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[-1] if name not in ("step", "lr")}
        self.track(mean | {"lr": last.learning_rate, "images_per_second": speed}, last.step)
        self.bar.set_postfix_str(f"loss {mean['train/loss']:.4g}, lr {last.learning_rate:.2e}, {speed:.0f} images/s")

    def validation(self, step: int, values: Mapping[str, float]) -> None:
        """Write down the result of a validation.

        Args:
            step: optimizer steps done.
            values: by name.
        """
        self._append(METRICS, [{"step": step, **values}])
        self.track(values, step)

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

"""Losses of optimizer steps, kept on the device until a block of steps is read at once.

A step therefore never waits for its own loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

GRAD_NORM = "grad_norm"


class StepOutput(Protocol):
    """Losses of a micro-batch, on the device.

    Attributes:
        loss: scalar to minimize.
        per_sample_loss: (B,), its part of each sample.
    """

    @property
    def loss(self) -> Tensor:
        """See the class."""

    @property
    def per_sample_loss(self) -> Tensor:
        """See the class."""

    def scalars(self) -> dict[str, Tensor]:
        """The scalars to log, by name; ``loss`` and ``loss_simple`` are among them."""


@dataclass(frozen=True)
class StepRecord:
    """Means over the effective batch of one optimizer step.

    Attributes:
        step: optimizer steps done, the first is 1.
        learning_rate: of the network, in this step.
        loss: the minimized loss.
        loss_simple: the unweighted distance.
        loss_vlb: the distance under the weights of the variational bound; None where nothing is denoised.
        loss_gamma: the distance under the log-variances, ``mean(loss / exp(logvar) + logvar)``.
        logvar: mean of the table of log-variances.
        grad_norm: 2-norm of the network's gradient before clipping.
        loss_bound: bits per dimension, an estimate of the bound without its prior; None where the loss has no bound.
        applied: whether the step updated the weights; False if it was skipped because it was not finite.
        terms: further terms of the loss, by name.
    """

    step: int
    learning_rate: float
    loss: float
    loss_simple: float
    loss_vlb: float | None
    loss_gamma: float
    logvar: float
    grad_norm: float
    loss_bound: float | None = None
    applied: bool = True
    terms: Mapping[str, float] = field(default_factory=dict)

    def row(self, learned_logvar: bool) -> dict[str, float]:
        """A row for ``metrics.jsonl`` and trackers, under CompVis' names, with log-variances if learned."""
        if not self.applied:
            return {"step": self.step, "train/skipped": 1, "lr": self.learning_rate}
        row = {"step": self.step, "train/loss": self.loss, "train/loss_simple": self.loss_simple}
        row |= {f"train/{name}": value for name, value in self.terms.items()}
        if self.loss_vlb is not None:
            row["train/loss_vlb"] = self.loss_vlb
        if self.loss_bound is not None:
            row["train/loss_bound"] = self.loss_bound
        if learned_logvar:
            row |= {"train/loss_gamma": self.loss_gamma, "logvar": self.logvar}
        return row | {"train/grad_norm": self.grad_norm, "lr": self.learning_rate}


@dataclass(frozen=True)
class SampleLoss:
    """The loss of one sample of a step.

    Attributes:
        image: its index in the training set.
        timestep: of the sample.
        loss: the minimized loss.
    """

    image: int
    timestep: int
    loss: float


@dataclass(frozen=True)
class StepTrace:
    """One optimizer step on the device; nothing has been read back yet.

    Attributes:
        step: optimizer steps done, this one included.
        learning_rate: of the network, in this step.
        outputs: one per micro-batch.
        images: indices of the samples in the training set, one tensor per micro-batch, on the CPU.
        timesteps: of the samples, one tensor per micro-batch.
        norms: 2-norms of the gradients of the network's parameters before clipping, (n,).
        applied: as in `StepRecord`; True where only the device knows.
        skipped: 0-dim, on the device, 1 where the step was not applied; None where ``applied`` says it.
    """

    step: int
    learning_rate: float
    outputs: Sequence[StepOutput]
    images: list[Tensor]
    timesteps: list[Tensor]
    norms: Tensor
    applied: bool = True
    skipped: Tensor | None = None


@dataclass(frozen=True)
class _Pending:
    trace: StepTrace  # without its outputs, whose graph is freed
    names: tuple[str, ...]
    means: Tensor  # of these names
    losses: list[Tensor]  # per sample, one tensor per micro-batch


class LossMeter:
    """Collects the losses of steps on the device and reads many steps at once."""

    def __init__(self) -> None:
        self._pending: list[_Pending] = []
        self._last_read: list[_Pending] = []
        self._settled = 0  # of the pending ones, the first

    def add(self, trace: StepTrace) -> None:
        """Add one optimizer step, without reading anything back from the device."""
        with torch.no_grad():
            scalars = [output.scalars() for output in trace.outputs]
            mean = torch.stack([torch.stack(list(each.values())) for each in scalars]).mean(0)
            norm = torch.linalg.vector_norm(trace.norms).to(mean).reshape(1)
        losses = [out.per_sample_loss.detach() for out in trace.outputs]
        names = (*scalars[0], GRAD_NORM)
        self._pending.append(_Pending(replace(trace, outputs=[]), names, torch.cat([mean, norm]), losses))

    def settle(self) -> list[tuple[int, bool]]:
        """The number of each step added since the last call, and whether it was applied.

        What only the device knows is read, for all steps at once.
        """
        start, self._settled = self._settled, len(self._pending)
        skipped = [p.trace.skipped for p in self._pending[start:] if p.trace.skipped is not None]
        values = iter(torch.stack(skipped).tolist() if skipped else ())
        for place, pending in enumerate(self._pending[start:], start):
            if pending.trace.skipped is not None:
                trace = replace(pending.trace, applied=not next(values), skipped=None)
                self._pending[place] = replace(pending, trace=trace)
        return [(pending.trace.step, pending.trace.applied) for pending in self._pending[start:]]

    def forget_after(self, step: int) -> None:
        """Drop the steps after this one, which the run repeats."""
        self._pending = [pending for pending in self._pending if pending.trace.step <= step]
        self._settled = len(self._pending)

    def read(self, mean_over_ranks: Callable[[Tensor], Tensor]) -> list[StepRecord]:
        """One record per step added since the last call, oldest first: the one place where the host waits.

        Args:
            mean_over_ranks: averages a tensor over the processes. Collective call: every process must make it.
        """
        self._last_read, self._pending, self._settled = self._pending, [], 0
        if not self._last_read:
            return []
        rows = mean_over_ranks(torch.stack([pending.means for pending in self._last_read])).tolist()
        return [_record(pending, row) for pending, row in zip(self._last_read, rows, strict=True)]

    def samples(self, step: int) -> list[SampleLoss]:
        """This process's samples of a step that was not read yet or was in the block read last."""
        pending = self._find(step)
        parts = (pending.trace.images, pending.trace.timesteps, pending.losses)
        images, timesteps, losses = (torch.cat(part).tolist() for part in parts)
        return [SampleLoss(*values) for values in zip(images, timesteps, losses, strict=True)]

    def norms(self, step: int) -> list[float]:
        """The norms of the gradients of the network's parameters in a step, as for `samples`."""
        norms: list[float] = self._find(step).trace.norms.tolist()
        return norms

    def _find(self, step: int) -> _Pending:
        return next(pending for pending in (*self._pending, *self._last_read) if pending.trace.step == step)


def _record(pending: _Pending, row: list[float]) -> StepRecord:
    """The record of a step from the means of its scalars."""
    means: dict[str, Any] = {"loss_vlb": None, "loss_gamma": 0.0, "logvar": 0.0}
    means |= dict(zip(pending.names, row, strict=True))
    if math.isnan(means.get("loss_bound", math.nan)):
        means["loss_bound"] = None
    own = {each.name for each in fields(StepRecord)}
    terms = {name: means.pop(name) for name in list(means) if name not in own}
    trace = pending.trace
    return StepRecord(trace.step, trace.learning_rate, applied=trace.applied, terms=terms, **means)


def first_nonfinite(records: list[StepRecord], check_gradients: bool) -> StepRecord | None:
    """The first step that was applied with a loss or gradient that is not finite.

    Gradients are not checked under a loss scaler, which skips such steps.
    """
    for record in records:
        values = (record.loss, record.loss_simple, *((record.grad_norm,) if check_gradients else ()))
        if record.applied and not all(map(math.isfinite, values)):
            return record
    return None

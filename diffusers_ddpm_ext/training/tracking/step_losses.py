"""Losses of optimizer steps, kept on the device until a block of steps is read at once.

A step therefore never waits for its own loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusers_ddpm_ext.losses.objective import ObjectiveOutput

MEANS = ("loss", "loss_simple", "loss_vlb", "loss_gamma", "logvar", "loss_bound", "grad_norm")


@dataclass(frozen=True)
class StepRecord:
    """Means over the effective batch of one optimizer step.

    Attributes:
        step: optimizer steps done, the first is 1.
        learning_rate: of the network, in this step.
        loss: the minimized loss.
        loss_simple: the unweighted distance.
        loss_vlb: the distance under the weights of the variational bound.
        loss_gamma: the distance under the log-variances, ``mean(loss / exp(logvar) + logvar)``.
        logvar: mean of the table of log-variances.
        grad_norm: 2-norm of the network's gradient before clipping.
        loss_bound: bits per dimension, an estimate of the bound without its prior; None where the loss has no bound.
        applied: whether the step updated the weights; False if it was skipped because it was not finite.
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
        """A row for ``metrics.jsonl`` and trackers, under CompVis' names, with log-variances if learned."""
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
        timesteps: of the samples, one tensor per micro-batch, on the CPU.
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
    trace: StepTrace  # without its outputs, whose graph is freed
    means: Tensor  # of `MEANS`
    losses: list[Tensor]  # per sample, one tensor per micro-batch


class LossMeter:
    """Collects the losses of steps on the device and reads many steps at once."""

    def __init__(self) -> None:
        self._pending: list[_Pending] = []
        self._last_read: list[_Pending] = []

    def add(self, trace: StepTrace) -> None:
        """Add one optimizer step, without reading anything back from the device."""
        with torch.no_grad():
            terms = [
                torch.stack([out.loss, out.loss_simple, out.loss_vlb, out.loss_gamma, out.logvar_mean, _bound(out)])
                for out in trace.outputs
            ]
            mean = torch.stack(terms).mean(0)
            norm = torch.linalg.vector_norm(trace.norms).to(mean).reshape(1)
        losses = [out.per_sample_loss.detach() for out in trace.outputs]
        self._pending.append(_Pending(replace(trace, outputs=[]), torch.cat([mean, norm]), losses))

    def read(self, mean_over_ranks: Callable[[Tensor], Tensor]) -> list[StepRecord]:
        """One record per step added since the last call, oldest first: the one place where the host waits.

        Args:
            mean_over_ranks: averages a tensor over the processes. Collective call: every process must make it.
        """
        self._last_read, self._pending = self._pending, []
        if not self._last_read:
            return []
        rows = mean_over_ranks(torch.stack([pending.means for pending in self._last_read])).tolist()
        records = []
        for pending, row in zip(self._last_read, rows, strict=True):
            means, trace = dict(zip(MEANS, row, strict=True)), pending.trace
            bound = means.pop("loss_bound")
            loss_bound = None if math.isnan(bound) else bound
            records.append(
                StepRecord(trace.step, trace.learning_rate, loss_bound=loss_bound, applied=trace.applied, **means)
            )
        return records

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


def _bound(output: ObjectiveOutput) -> Tensor:
    return torch.full_like(output.loss, math.nan) if output.loss_bound is None else output.loss_bound.to(output.loss)


def first_nonfinite(records: list[StepRecord], check_gradients: bool) -> StepRecord | None:
    """The first step that was applied with a loss or gradient that is not finite.

    Gradients are not checked under a loss scaler, which skips such steps.
    """
    for record in records:
        values = (record.loss, record.loss_simple, *((record.grad_norm,) if check_gradients else ()))
        if record.applied and not all(map(math.isfinite, values)):
            return record
    return None

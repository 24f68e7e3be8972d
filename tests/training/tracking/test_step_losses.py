"""Losses of steps between the device and their records."""

from __future__ import annotations

import math

import pytest
import torch

from diffusers_ddpm_ext.losses.objective import ObjectiveOutput
from diffusers_ddpm_ext.training.tracking.step_losses import (
    LossMeter,
    SampleLoss,
    StepRecord,
    StepTrace,
    first_nonfinite,
)


def output(per_sample: list[float]) -> ObjectiveOutput:
    samples = torch.tensor(per_sample, dtype=torch.float32, requires_grad=True)
    mean = samples.mean()
    return ObjectiveOutput(
        mean, mean.detach(), 2 * mean.detach(), 3 * mean.detach(), torch.tensor(0.5), samples, samples
    )


def trace(step: int, outputs: list, timesteps: list[list[int]], norm: float = 1.0, applied: bool = True) -> StepTrace:
    steps = [torch.tensor(some) for some in timesteps]
    return StepTrace(step, 0.1, outputs, [some + 100 for some in steps], steps, torch.tensor([norm]), applied)


def test_a_record_is_the_mean_of_the_micro_batches():
    meter = LossMeter()
    meter.add(trace(7, [output([1, 3]), output([5, 7])], [[0, 1]] * 2, 9.0))
    (record,) = meter.read(lambda tensor: tensor)
    assert record == StepRecord(7, 0.1, 4.0, 4.0, 8.0, 12.0, 0.5, 9.0)
    assert meter.read(lambda tensor: tensor) == []


def test_one_collective_call_reads_many_steps():
    """The processes meet once a block, not once a step."""
    meter, exchanges = LossMeter(), []
    for step in (1, 2, 3):
        meter.add(trace(step, [output([float(step)])], [[0]]))

    def mean_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
        exchanges.append(tensor.shape)
        return tensor * 2

    records = meter.read(mean_over_ranks)
    assert exchanges == [(3, 7)]
    assert [record.loss for record in records] == [2.0, 4.0, 6.0]


def test_the_first_non_finite_step_is_found_not_the_last_read():
    meter = LossMeter()
    meter.add(trace(1, [output([1, 1])], [[4, 5]]))
    meter.add(trace(2, [output([1, 2]), output([math.inf, 1])], [[6, 7], [8, 9]], 3.0))
    meter.add(trace(3, [output([math.nan, math.nan])], [[1, 2]]))
    broken = first_nonfinite(meter.read(lambda tensor: tensor), check_gradients=True)
    assert broken is not None
    assert broken.step == 2
    assert meter.samples(2)[1:3] == [SampleLoss(107, 7, 2.0), SampleLoss(108, 8, math.inf)]
    assert meter.norms(2) == [3.0]


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_a_non_finite_gradient_counts_except_under_a_loss_scaler(norm):
    record = StepRecord(1, 0.1, 1.0, 1.0, 1.0, 1.0, 0.0, norm)
    assert first_nonfinite([record], check_gradients=True) is record
    assert first_nonfinite([record], check_gradients=False) is None


def test_a_skipped_step_does_not_count_as_non_finite():
    record = StepRecord(4, 0.1, math.nan, math.nan, math.nan, math.nan, 0.0, math.nan, applied=False)
    assert first_nonfinite([record], check_gradients=True) is None
    assert record.row(True) == {"step": 4, "train/skipped": 1, "lr": 0.1}, "no NaN, which JSON does not have"


@pytest.mark.parametrize("learned", [False, True])
def test_rows_have_compvis_names(learned):
    row = StepRecord(3, 0.1, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0).row(learned)
    expected = {
        "step": 3,
        "train/loss": 1.0,
        "train/loss_simple": 2.0,
        "train/loss_vlb": 3.0,
        "train/grad_norm": 6.0,
        "lr": 0.1,
    }
    assert row == expected | ({"train/loss_gamma": 4.0, "logvar": 5.0} if learned else {})

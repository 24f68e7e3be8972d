"""Validation losses and log losses on fixed draws."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.losses.objective import DDPMObjective
from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler
from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.training.data.dataset import load_data
from diffusers_ddpm_ext.training.data.image_set import ImageSet
from diffusers_ddpm_ext.training.evaluation.processes import Processes
from diffusers_ddpm_ext.training.evaluation.validation_loss import (
    ValidationLosses,
    compute_validation_losses,
    log_loss_per_step,
    stratified_timesteps,
    validation_draws,
)
from diffusers_ddpm_ext.training.factory.task import DenoisingTask
from diffusers_ddpm_ext.utils import random_keys as keys

CHAIN = 40
ALONE = Processes(0, 1, torch.device("cpu"), lambda tensor: tensor)


class Constant(nn.Module):
    """A network whose output is one value, with dropout."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))
        self.dropout = nn.Dropout(0.5)

    def forward(self, xt: Tensor, t: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.dropout(torch.ones_like(xt)) * self.value)


def task_of(value: float = 0.0) -> DenoisingTask:
    return DenoisingTask(Constant(value), DDPMObjective(DDPMExtScheduler(num_train_timesteps=CHAIN)))


@pytest.fixture(scope="module")
def images() -> ImageSet:
    validation = load_data(DataOptions(resolution=(8, 8))).validation
    assert validation is not None
    return validation


@pytest.mark.parametrize("count", [1, 7, 1000, 1300])
def test_one_timestep_in_every_interval(count):
    steps = stratified_timesteps(torch.Generator().manual_seed(0), count, 1000).sort().values.double()
    pieces = torch.arange(count).double() * 1000 / count
    assert (steps >= pieces.floor()).all()
    assert (steps <= pieces + 1000 / count).all()
    assert steps.max() < 1000


def test_draws_are_the_same_every_time_and_enough():
    first, again, other = (validation_draws(seed, 180, 1000, max_images=100) for seed in (3, 3, 4))
    assert torch.equal(first.timesteps, again.timesteps)
    assert not torch.equal(first.timesteps, other.timesteps)
    assert len(first.images.unique()) == len(first) == 100
    assert first.images.max() > 175, "spaced over the entire set, which may be sorted"
    few = validation_draws(3, 3, 1000)
    assert len(few) >= 32
    assert set(few.images.tolist()) == {0, 1, 2}


def test_validation_losses_are_means_over_the_draws(images):
    """A network with output c has loss mean((c - eps)^2); eps comes from the documented keys."""
    draws = validation_draws(3, len(images), CHAIN)
    scores = compute_validation_losses(task_of(0.25), images, draws, 64, ALONE)
    losses = [
        ((0.25 - keys.sample_draws(3, 0, [i], (1, 8, 8), 1, keys.VALIDATION)[1]).double() ** 2).mean()
        for i in range(len(draws))
    ]
    assert scores.loss_simple == pytest.approx(float(torch.stack(losses).mean()), rel=1e-6)
    assert scores.loss == pytest.approx(scores.loss_simple, rel=1e-6)


def test_validation_losses_do_not_depend_on_batches_and_processes(images):
    """Equal up to rounding for other batch sizes, and exactly equal for any number of processes."""
    draws, task = validation_draws(3, len(images), CHAIN), task_of(0.25)
    alone = compute_validation_losses(task, images, draws, 50, ALONE)
    assert compute_validation_losses(task, images, draws, 7, ALONE).loss_simple == pytest.approx(
        alone.loss_simple, rel=1e-6
    )
    parts: list[Tensor] = []

    def part(tensor: Tensor) -> Tensor:
        parts.append(tensor)
        return tensor

    for rank in range(3):
        compute_validation_losses(task, images, draws, 50, Processes(rank, 3, torch.device("cpu"), part))
    means = torch.stack(parts).sum(0).sum(0) / len(draws)
    assert means.tolist() == [alone.loss, alone.loss_simple, alone.loss_vlb]


def test_validation_does_not_change_the_training_state(images):
    """Dropout is off, the mode is restored, and no global random number is drawn."""
    task = task_of(0.25)
    task.train()
    before = torch.get_rng_state()
    draws = validation_draws(3, len(images), CHAIN)
    first, again = (compute_validation_losses(task, images, draws, 64, ALONE) for _ in range(2))
    assert first == again
    assert task.training
    assert task.denoiser.training
    assert torch.equal(torch.get_rng_state(), before)
    assert task.denoiser.value.grad is None


def test_metric_names_are_those_of_compvis():
    assert ValidationLosses(1.0, 2.0, 3.0).metrics("_ema") == {
        "val/loss_ema": 1.0,
        "val/loss_simple_ema": 2.0,
        "val/loss_vlb_ema": 3.0,
    }


def test_log_loss_of_each_step(images):
    """Output c on unit noise has a mean loss of 1 + c^2 at every step that was drawn; others are NaN."""
    steps = torch.tensor([0, 5, 39]).repeat(400)
    log_losses = log_loss_per_step(task_of(2.0), images, 0, steps, 128, ALONE)
    assert log_losses.shape == (CHAIN,)
    assert np.isfinite(log_losses).nonzero()[0].tolist() == [0, 5, 39]
    # the mean over 400 draws of 64 values has a standard error of sqrt(2 + 4 * 4) / sqrt(400 * 64) = 0.027
    np.testing.assert_allclose(np.exp(log_losses[[0, 5, 39]]), 5.0, atol=0.12)

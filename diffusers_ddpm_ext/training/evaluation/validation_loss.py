"""Validation losses, and the log loss of every step, on fixed draws of timesteps and noise.

The draws have their own random keys: they do not advance the training's randomness, and two sets of weights are always
compared on the same timesteps and the same noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusers_ddpm_ext.losses.objective import ObjectiveOutput
from diffusers_ddpm_ext.training.data.latents import SampleSet
from diffusers_ddpm_ext.training.evaluation.processes import Processes
from diffusers_ddpm_ext.training.factory.task import DenoisingTask
from diffusers_ddpm_ext.utils import random_keys as keys
from diffusers_ddpm_ext.utils.dtensor import reshard

LOG_LOSS_STREAM = "logvar"
MIN_VALIDATION_DRAWS = 32
"""Fewer validation images than this are noised several times each: a few timesteps do not represent the chain."""


@dataclass(frozen=True)
class Draws:
    """Pairs of an image and a timestep, and the random keys of their noise.

    Attributes:
        images: index of the image, (N,), int64.
        timesteps: (N,), int64.
        stream: name of the random stream; the noise of draw i has the key (stream, seed, 0, i).
        seed: of the run.
    """

    images: Tensor
    timesteps: Tensor
    stream: str
    seed: int

    def __len__(self) -> int:
        """Number of draws."""
        return len(self.images)


@dataclass(frozen=True)
class ValidationLosses:
    """Means over all draws, as the objective defines its terms."""

    loss: float
    loss_simple: float
    loss_vlb: float

    def metrics(self, suffix: str = "") -> dict[str, float]:
        """The values under CompVis' metric names, such as ``val/loss_simple``; suffix ``_ema`` for the average's."""
        values = {"loss_simple": self.loss_simple, "loss": self.loss, "loss_vlb": self.loss_vlb}
        return {f"val/{name}{suffix}": value for name, value in values.items()}


def validation_draws(seed: int, num_images: int, num_train_timesteps: int, max_images: int | None = None) -> Draws:
    """At least ``MIN_VALIDATION_DRAWS`` draws: evenly spaced images, stratified timesteps, the same in every call."""
    used = evenly_spaced(num_images, max_images)
    images = used.repeat(-(-MIN_VALIDATION_DRAWS // len(used)))
    timesteps = stratified_timesteps(
        keys.generator(keys.VALIDATION, seed, "timesteps"), len(images), num_train_timesteps
    )
    return Draws(images, timesteps, keys.VALIDATION, seed)


def evenly_spaced(count: int, limit: int | None) -> Tensor:
    """Indices of at most ``limit`` of ``count`` images, evenly spaced, (n,), int64."""
    used = count if limit is None else min(count, limit)
    return torch.arange(used) * count // used


def stratified_timesteps(generator: torch.Generator, count: int, num_train_timesteps: int) -> Tensor:
    """Timesteps in random order, one in each of ``count`` equal intervals of the chain, (count,), int64, in [0, T)."""
    intervals = torch.randperm(count, generator=generator).double()
    offsets = torch.rand(count, generator=generator, dtype=torch.float64)
    steps = ((intervals + offsets) * num_train_timesteps / count).long()
    return steps.clamp(max=num_train_timesteps - 1)


@torch.no_grad()
def compute_validation_losses(
    task: DenoisingTask, images: SampleSet, draws: Draws, batch_size: int, processes: Processes
) -> ValidationLosses:
    """Mean losses of a task over all draws, the same on every process.

    The batches are the same for any number of processes. Collective call: every process must make it.

    Args:
        task: not wrapped by DDP; its training mode is restored afterwards.
        images: the validation set.
        draws: from `validation_draws`.
        batch_size: images in one forward pass.
        processes: that share the batches.
    """

    def batch_sums(output: ObjectiveOutput, t: Tensor) -> Tensor:
        return torch.stack([output.loss, output.loss_simple, output.loss_vlb]).cpu().double() * len(t)

    shape = (-(-len(draws) // batch_size), 3)
    batches = _sum_batches(task, images, draws, batch_size, processes, batch_sums, shape)
    return ValidationLosses(*(batches.sum(0) / len(draws)).tolist())


@torch.no_grad()
def log_loss_per_step(
    task: DenoisingTask, images: SampleSet, seed: int, timesteps: Tensor, batch_size: int, processes: Processes
) -> np.ndarray:
    """The log of the mean unweighted loss at every step, which learned log-variances estimate.

    Collective call: every process must make it.

    Args:
        task: not wrapped by DDP; its training mode is restored afterwards.
        images: the training set.
        seed: of the run.
        timesteps: timestep of each draw, (N,), int64.
        batch_size: images in one forward pass.
        processes: that share the batches.

    Returns:
        (T,), float64, natural log; NaN at steps without a draw.
    """
    chain, count = task.objective.schedule.num_train_timesteps, len(timesteps)
    order = keys.generator(LOG_LOSS_STREAM, seed, "images")
    chosen = torch.cat([torch.randperm(len(images), generator=order) for _ in range(-(-count // len(images)))])
    draws = Draws(chosen[:count], timesteps, LOG_LOSS_STREAM, seed)

    def batch_sums(output: ObjectiveOutput, t: Tensor) -> Tensor:
        losses = output.per_sample_simple.cpu().double()
        return torch.zeros(chain, dtype=torch.float64).index_add_(0, t.cpu(), losses)

    total = _sum_batches(task, images, draws, batch_size, processes, batch_sums, (1, chain))[0].numpy()
    counts = np.bincount(timesteps.numpy(), minlength=chain)
    return np.log(np.divide(total, counts, out=np.full(chain, np.nan), where=counts > 0))


def _sum_batches(
    task: DenoisingTask,
    images: SampleSet,
    draws: Draws,
    batch_size: int,
    processes: Processes,
    batch_sums: Callable[[ObjectiveOutput, Tensor], Tensor],
    shape: tuple[int, int],
) -> Tensor:
    """A table of that shape, to whose row ``b % rows`` the sums of batch b are added, on all processes."""
    training = task.training
    task.eval()
    table = torch.zeros(shape, dtype=torch.float64)
    for batch, is_own in processes.batches(-(-len(draws) // batch_size)):
        positions = range(batch * batch_size, min((batch + 1) * batch_size, len(draws)))
        indices, t = (part[positions.start : positions.stop] for part in (draws.images, draws.timesteps))
        x0 = images.samples(indices)
        _, noise = keys.sample_draws(draws.seed, 0, positions, x0.shape[1:], 1, draws.stream)
        conditions = images.conditions(indices).to(processes.device)
        x0, noise, t = (tensor.to(processes.device) for tensor in (x0, noise, t))
        output = task(x0, noise, t, conditions) if conditions.as_dict() else task(x0, noise, t)
        sums = batch_sums(output, t)
        if is_own:
            table[batch % len(table)] += sums
    task.train(training)
    reshard(task)  # FSDP reshards in the backward pass, which does not follow here
    return processes.sum_over_ranks(table.to(processes.device)).cpu()

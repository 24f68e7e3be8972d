"""Measurements on fixed draws: validation losses, and the log loss of every step.

A measurement takes its randomness from its own keys, so it never touches the training's, and two sets of weights are
always judged on the same timesteps and the same noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusers_ddpm_ext.models.conditioning import Conditions
from diffusers_ddpm_ext.training.data.image_set import ImageSet
from diffusers_ddpm_ext.training.factory.task import DenoisingTask
from diffusers_ddpm_ext.utils import random_keys as keys
from diffusers_ddpm_ext.utils.dtensor import reshard

LOGVAR = "logvar"
MIN_VALIDATION_DRAWS = 32
"""Fewer validation images than this are each noised several times: a handful of steps says little about a chain."""


@dataclass(frozen=True)
class Processes:
    """How a measurement is shared among processes.

    Attributes:
        rank: of this process.
        world_size: number of processes.
        device: where the network lives.
        sum_over_ranks: adds a tensor over the processes; called by all of them.
        stop_requested: whether this process should stop; the rest of a measurement is then left out, and its result
            worth nothing.
        lockstep: whether each process needs the others for a forward pass, as those of a sharded network do; then
            ``stop_requested`` must answer the same in all of them.
    """

    rank: int
    world_size: int
    device: torch.device
    sum_over_ranks: Callable[[Tensor], Tensor]
    stop_requested: Callable[[], bool] = lambda: False
    lockstep: bool = False


@dataclass(frozen=True)
class Draws:
    """Which image is noised to which step with which noise.

    Attributes:
        images: index of the image, (N,), int64.
        timesteps: (N,), int64.
        stream: name of the noise's stream; draw i takes its key (stream, seed, 0, i).
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
        """The rows' names of CompVis: ``val/loss_simple`` and its fellows, ``_ema`` at their end for the average's."""
        values = {"loss_simple": self.loss_simple, "loss": self.loss, "loss_vlb": self.loss_vlb}
        return {f"val/{name}{suffix}": value for name, value in values.items()}


def validation_draws(seed: int, num_images: int, num_train_timesteps: int, max_images: int | None = None) -> Draws:
    """The draws of every validation of a run.

    The chain is cut into as many equal pieces as there are draws and each draw takes a step from a piece of its own,
    in an order that has nothing to do with that of the images.

    Args:
        seed: of the run.
        num_images: size of the validation set.
        num_train_timesteps: T.
        max_images: use only so many images, taken evenly from all of them.

    Returns:
        At least ``MIN_VALIDATION_DRAWS`` draws, the same for every call.
    """
    used = num_images if max_images is None else min(num_images, max_images)
    repeats = -(-MIN_VALIDATION_DRAWS // used)
    images = (torch.arange(used) * num_images // used).repeat(repeats)
    timesteps = stratified_timesteps(
        keys.generator(keys.VALIDATION, seed, "timesteps"), len(images), num_train_timesteps
    )
    return Draws(images, timesteps, keys.VALIDATION, seed)


def stratified_timesteps(generator: torch.Generator, count: int, num_train_timesteps: int) -> Tensor:
    """Steps that cover the chain evenly, in random order.

    Args:
        generator: source of the order and of the place inside each piece.
        count: number of steps.
        num_train_timesteps: T.

    Returns:
        (count,), int64, in [0, T): exactly one in each of ``count`` equal pieces of the chain.
    """
    pieces = torch.randperm(count, generator=generator).double()
    inside = torch.rand(count, generator=generator, dtype=torch.float64)
    steps = ((pieces + inside) * num_train_timesteps / count).long()
    return steps.clamp(max=num_train_timesteps - 1)


@torch.no_grad()
def compute_validation_losses(
    task: DenoisingTask, images: ImageSet, draws: Draws, batch_size: int, processes: Processes
) -> ValidationLosses:
    """Mean losses of a task's present weights.

    The batches are the same on any number of processes, which take turns at them.

    Args:
        task: not wrapped by DDP; its mode is put back afterwards.
        images: the validation set.
        draws: from :func:`validation_draws`.
        batch_size: images in one forward pass.
        processes: how to share the work.

    Returns:
        The means over all draws, the same on every process.
    """

    def terms(x0: Tensor, noise: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        output = task(x0, noise, t, *_given(conditions))
        return torch.stack([output.loss, output.loss_simple, output.loss_vlb]).cpu().double() * len(t)

    batches = _run(task, images, draws, batch_size, processes, terms, torch.zeros(-(-len(draws) // batch_size), 3))
    return ValidationLosses(*(batches.sum(0) / len(draws)).tolist())


@torch.no_grad()
def log_loss_per_step(
    task: DenoisingTask, images: ImageSet, seed: int, timesteps: Tensor, batch_size: int, processes: Processes
) -> np.ndarray:
    """The truth that learned log-variances estimate: the log of the mean unweighted loss at every step.

    Args:
        task: not wrapped by DDP; its mode is put back afterwards.
        images: the training set.
        seed: of the run.
        timesteps: the step of each draw, (N,), int64.
        batch_size: images in one forward pass.
        processes: how to share the work.

    Returns:
        (T,), float64, natural log; NaN at steps without a draw.
    """
    chain, count = task.objective.schedule.num_train_timesteps, len(timesteps)
    order = keys.generator(LOGVAR, seed, "images")
    chosen = torch.cat([torch.randperm(len(images), generator=order) for _ in range(-(-count // len(images)))])
    draws = Draws(chosen[:count], timesteps, LOGVAR, seed)

    def terms(x0: Tensor, noise: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        losses = task(x0, noise, t, *_given(conditions)).per_sample_simple.cpu().double()
        return torch.zeros(chain, dtype=torch.float64).index_add_(0, t.cpu(), losses)

    total = _run(task, images, draws, batch_size, processes, terms, torch.zeros(1, chain))[0].numpy()
    counts = np.bincount(timesteps.numpy(), minlength=chain)
    return np.log(np.divide(total, counts, out=np.full(chain, np.nan), where=counts > 0))


def _given(conditions: Conditions) -> tuple[Conditions, ...]:
    """What a task is called with besides, where it is conditioned on anything."""
    return (conditions,) if conditions.named() else ()


def _run(
    task: DenoisingTask,
    images: ImageSet,
    draws: Draws,
    batch_size: int,
    processes: Processes,
    terms: Callable[[Tensor, Tensor, Tensor, Conditions], Tensor],
    table: Tensor,
) -> Tensor:
    """Add the terms of every batch to a row of a table: row b for batch b, or the only row there is."""
    training = task.training
    task.eval()
    table = table.double()
    batches = [range(start, min(start + batch_size, len(draws))) for start in range(0, len(draws), batch_size)]
    for first in range(0, len(batches), processes.world_size):
        number = first + processes.rank
        mine = number < len(batches)
        if processes.stop_requested() or not (mine or processes.lockstep):
            break
        places = batches[number if mine else 0]
        x0 = images.pixels(draws.images[places.start : places.stop])
        _, noise = keys.sample_draws(draws.seed, 0, places, x0.shape[1:], 1, draws.stream)
        t = draws.timesteps[places.start : places.stop]
        conditions = images.conditions(draws.images[places.start : places.stop]).to(processes.device)
        row = terms(x0.to(processes.device), noise.to(processes.device), t.to(processes.device), conditions)
        if mine:
            table[number % len(table)] += row
    task.train(training)
    reshard(task)  # no backward pass follows that would
    return processes.sum_over_ranks(table.to(processes.device)).cpu()

"""The bound of images on keyed draws, row by row: a row is one image at one step of the chain.

Rows of several images share a call of the network. What a row draws follows from the seed, its image and its step, so
that the result depends neither on how the work is divided nor on what was measured before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from diffusers_ddpm_ext.diffusion.gaussian import q_sample
from diffusers_ddpm_ext.diffusion.likelihood import (
    EIGHT_BITS,
    ChainScheduler,
    ReverseTransition,
    exact_dtype,
    prior_bits,
)
from diffusers_ddpm_ext.diffusion.likelihood_estimate import Strata
from diffusers_ddpm_ext.models.conditioning import Conditions
from diffusers_ddpm_ext.training.data.image_set import ImageSet
from diffusers_ddpm_ext.training.evaluation.validation_loss import Processes
from diffusers_ddpm_ext.utils import random_keys as keys

Network = Callable[[Tensor, Tensor, Conditions], Tensor]


class BatchCache(Protocol):
    """Where rows are kept that were measured before."""

    def known(self, batch: int) -> Tensor | None:
        """What a batch gave, if it is known."""
        ...

    def note(self, batch: int, values: Tensor) -> None:
        """Keep what a batch gave."""
        ...


@dataclass(frozen=True)
class BoundEvaluation:
    """What is measured.

    Attributes:
        scheduler: its chain in use.
        images: the set.
        chosen: which images of it, (N,), int64.
        strata: of the chain; each image draws a step in each.
        seed: of the draws.
        stream: of the draws.
        batch_size: rows in one call of the network.
        clip_denoised: whether the predicted x0 is clipped.
        decoder: see `discretized_gaussian_log_likelihood`.
        bin_width: see there.
    """

    scheduler: ChainScheduler
    images: ImageSet
    chosen: Tensor
    strata: Strata
    seed: int = 0
    stream: str = keys.BOUND
    batch_size: int = 256
    clip_denoised: bool = False
    decoder: str = "exact"
    bin_width: float = EIGHT_BITS
    places: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        drawn = [
            self.strata.draw(keys.generator(self.stream, self.seed, image, "steps")) for image in self.chosen.tolist()
        ]
        object.__setattr__(self, "places", np.stack(drawn))

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.places.size)

    @property
    def batches(self) -> int:
        """Number of calls of the network."""
        return -(-self.rows // self.batch_size)


@dataclass(frozen=True)
class BoundValues:
    """What was measured.

    Attributes:
        bits: of each image and stratum, (N, K), bits per dimension, not weighted.
        prior: (N,).
        places: of the chain that were drawn, (N, K).
    """

    bits: np.ndarray
    prior: np.ndarray
    places: np.ndarray


@torch.no_grad()
def evaluate_bound(
    network: Network,
    measure: BoundEvaluation,
    processes: Processes,
    dtype: torch.dtype = torch.float32,
    ledger: BatchCache | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> BoundValues:
    """Measure the rows; all processes enter, and take turns at the batches.

    Args:
        network: from noisy samples, steps and conditions to the network's output.
        measure: what is measured.
        processes: how the work is shared.
        dtype: that the network is fed in.
        ledger: of this process; what it knows is not measured again.
        progress: is told the rows of each batch that is done.

    Returns:
        The rows, the same in every process; worth nothing if the processes were stopped.
    """
    kept = measure.scheduler.kept
    law, steps = ReverseTransition.from_scheduler(measure.scheduler), torch.from_numpy(kept.timesteps.copy())
    flat, count = torch.from_numpy(measure.places).flatten(), measure.places.shape[1]
    table = torch.zeros(measure.rows, 2, dtype=exact_dtype(processes.device))
    for first in range(0, measure.batches, processes.world_size):
        batch = first + processes.rank
        mine = batch < measure.batches
        if processes.stop_requested() or not (mine or processes.lockstep):
            break
        start = (batch if mine else 0) * measure.batch_size
        rows = torch.arange(start, min(start + measure.batch_size, measure.rows))
        values = None if ledger is None or not mine else ledger.known(batch)
        if values is None:
            values = _evaluate_rows(network, measure, law, rows, flat[rows], steps, count, processes.device, dtype)
            if ledger is not None and mine:
                ledger.note(batch, values)
        if mine:
            table[rows] = values
            progress(len(rows))
    whole = processes.sum_over_ranks(table.to(processes.device)).cpu().numpy()
    bits, prior = whole[:, 0].reshape(-1, count), whole[:, 1].reshape(-1, count)[:, 0]
    return BoundValues(bits, prior, measure.places)


def _evaluate_rows(
    network: Network,
    measure: BoundEvaluation,
    law: ReverseTransition,
    rows: Tensor,
    place: Tensor,
    steps: Tensor,
    count: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Bits and prior of some rows, (R, 2); the prior is that of the image, at its first row alone."""
    indices = measure.chosen[rows // count]
    one_each, back = torch.unique_consecutive(indices, return_inverse=True)
    exact = exact_dtype(device)
    x0 = measure.images.pixels(one_each).to(device, exact)
    t = steps[place]
    noise = keys.noise_of_steps(measure.stream, measure.seed, indices.tolist(), t.tolist(), x0.shape[1:])
    conditions = measure.images.conditions(indices).to(device)
    clean, place, t = x0[back.to(device)], place.to(device), t.to(device)
    xt = q_sample(measure.scheduler.kept, clean, noise.to(device, exact), place)
    output = network(xt.to(dtype), t, conditions)
    bits = law.terms(
        output,
        clean,
        xt,
        t,
        clip_denoised=measure.clip_denoised,
        decoder=measure.decoder,
        bin_width=measure.bin_width,
    ).bits
    prior = prior_bits(measure.scheduler, x0)[back.to(device)]
    first = (rows % count == 0).to(device)
    return torch.stack([bits.to(exact), torch.where(first, prior, 0)], 1).cpu()

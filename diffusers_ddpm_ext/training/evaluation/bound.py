"""The variational bound of images on keyed draws, in rows: a row is one image at one step of the chain.

Rows of several images share a forward pass. The draws of a row depend on the seed, its image and its step alone, so
the result depends neither on the number of processes nor on what was evaluated before. Unlike
`bits_per_dim`, which draws one batch's noise from a generator, this
reads images in turn, with their conditions, and can resume.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from diffusers_ddpm_ext.diffusion.gaussian import q_sample
from diffusers_ddpm_ext.diffusion.levels import EIGHT_BITS, exact_dtype
from diffusers_ddpm_ext.diffusion.likelihood import ChainScheduler, bound_terms, prior_bits
from diffusers_ddpm_ext.diffusion.likelihood_estimate import Strata
from diffusers_ddpm_ext.models.conditioning import Conditions
from diffusers_ddpm_ext.training.data.latents import SampleSet
from diffusers_ddpm_ext.training.evaluation.cache import EvaluationCache
from diffusers_ddpm_ext.training.evaluation.processes import Processes
from diffusers_ddpm_ext.training.evaluation.validation_loss import evenly_spaced
from diffusers_ddpm_ext.utils import random_keys as keys
from diffusers_ddpm_ext.utils.vocabulary import Decoder

ConditionedNetwork = Callable[[Tensor, Tensor, Conditions], Tensor]


@dataclass(frozen=True)
class BoundEvaluation:
    """What is evaluated.

    Attributes:
        scheduler: the chain in use.
        images: the set.
        strata: of the chain; each image draws one step in each.
        max_images: upper limit of the images used, which are spaced evenly over the set.
        seed: of the draws.
        batch_size: rows in one forward pass.
        dtype: precision of the network's input.
        clip_denoised: whether the predicted x0 is clipped.
        decoder: see `discretized_gaussian_log_likelihood`.
        bin_width: see there.
        indices: of the images used, (N,), int64.
        places: places in the chain that were drawn, (N, K).
    """

    scheduler: ChainScheduler
    images: SampleSet
    strata: Strata
    max_images: int | None = None
    seed: int = 0
    batch_size: int = 256
    dtype: torch.dtype = torch.float32
    clip_denoised: bool = False
    decoder: Decoder = "exact"
    bin_width: float = EIGHT_BITS
    indices: Tensor = field(init=False)
    places: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        indices = evenly_spaced(len(self.images), self.max_images)
        generators = (keys.generator(keys.BOUND, self.seed, image, "steps") for image in indices.tolist())
        object.__setattr__(self, "indices", indices)
        object.__setattr__(self, "places", np.stack([self.strata.draw(generator) for generator in generators]))

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.places.size)

    @property
    def batches(self) -> int:
        """Number of forward passes."""
        return -(-self.rows // self.batch_size)


@dataclass(frozen=True)
class BoundValues:
    """The result of an evaluation.

    Attributes:
        bits: of each image and stratum, (N, K), bits per dimension, not weighted.
        prior: (N,), bits per dimension.
        places: places in the chain that were drawn, (N, K).
    """

    bits: np.ndarray
    prior: np.ndarray
    places: np.ndarray


@torch.no_grad()
def evaluate_bound(
    network: ConditionedNetwork,
    evaluation: BoundEvaluation,
    processes: Processes,
    cache: EvaluationCache | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> BoundValues:
    """Evaluate all rows, the batches shared among the processes. Collective call: every process must make it.

    Args:
        network: maps noisy samples, steps and conditions to the network's output.
        evaluation: what is evaluated.
        processes: that share the batches.
        cache: of this process; batches in it are not evaluated again.
        progress: called with the number of rows of each finished batch.

    Returns:
        The values, the same on every process; invalid if a stop was requested.
    """
    count = evaluation.places.shape[1]
    table = torch.zeros(evaluation.rows, 2, dtype=exact_dtype(processes.device))
    for batch, is_own in processes.batches(evaluation.batches):
        start = batch * evaluation.batch_size
        rows = torch.arange(start, min(start + evaluation.batch_size, evaluation.rows))
        values = None if cache is None or not is_own else cache.get(batch, len(rows))
        if values is None:
            values = _evaluate_rows(network, evaluation, rows, processes.device)
            if cache is not None and is_own:
                cache.put(batch, values)
        if is_own:
            table[rows] = values
            progress(len(rows))
    summed = processes.sum_over_ranks(table.to(processes.device)).cpu().numpy()
    bits, prior = summed[:, 0].reshape(-1, count), summed[:, 1].reshape(-1, count)[:, 0]
    return BoundValues(bits, prior, evaluation.places)


def _evaluate_rows(
    network: ConditionedNetwork, evaluation: BoundEvaluation, rows: Tensor, device: torch.device
) -> Tensor:
    """Bits and prior of some rows, (R, 2); the prior of an image is in its first row alone."""
    scheduler, images, count = evaluation.scheduler, evaluation.images, evaluation.places.shape[1]
    place = torch.from_numpy(evaluation.places).flatten()[rows]
    t = torch.from_numpy(scheduler.kept.timesteps.copy())[place]
    indices = evaluation.indices[rows // count]
    distinct, inverse = torch.unique_consecutive(indices, return_inverse=True)
    exact = exact_dtype(device)
    x0 = images.samples(distinct).to(device, exact)
    noise = keys.noise_of_steps(keys.BOUND, evaluation.seed, indices.tolist(), t.tolist(), x0.shape[1:])
    conditions = images.conditions(indices).to(device)
    inverse, place, t = inverse.to(device), place.to(device), t.to(device)
    clean = x0[inverse]
    xt = q_sample(scheduler.kept, clean, noise.to(device, exact), place)
    bits = bound_terms(
        scheduler,
        network(xt.to(evaluation.dtype), t, conditions),
        clean,
        xt,
        t,
        clip_denoised=evaluation.clip_denoised,
        decoder=evaluation.decoder,
        bin_width=evaluation.bin_width,
    ).bits
    prior = prior_bits(scheduler, x0)[inverse]
    first = (rows % count == 0).to(device)
    return torch.stack([bits.to(exact), torch.where(first, prior, 0)], 1).cpu()

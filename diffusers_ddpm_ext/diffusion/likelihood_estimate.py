"""Estimate of the bound on a set of images from a few steps per image: strata, weights and a confidence interval.

Every image draws its own steps: the images' errors are then independent, and Student's t over the images' totals
covers both sources of randomness, the choice of images and that of their steps and noise. If all images shared their
steps, the second source would be common to all and invisible in their standard deviation.

The chain is divided into strata: its first step, the decoder's, which differs from all others, and intervals of the
rest. One step is drawn in each stratum and represents all of its steps. The terms of the bound fall steeply with the
noise: of intervals of equal length the first would have a few large terms among many small ones, and the totals would
be too skewed for an interval. The edges are therefore placed where the KL divergences of standard normal data sum to
equal parts, with a quarter of the weight on equal length, for networks whose errors lie elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusers_ddpm_ext.diffusion.respacing import Steps
from diffusers_ddpm_ext.diffusion.schedule import NoiseSchedule, Table

EQUAL_LENGTH_SHARE = 0.25


@dataclass(frozen=True)
class Strata:
    """Strata of a chain of ``length`` steps.

    Attributes:
        starts: first index of each stratum, (K,), int64, ascending; the first stratum is the first step alone.
        sizes: number of steps in each stratum, (K,), int64, of sum ``length``.
    """

    starts: Steps
    sizes: Steps

    @classmethod
    def from_schedule(cls, kept: NoiseSchedule, count: int | None = None) -> Strata:
        """Divide the chain in use into ``count`` strata: 2 to all steps; None: all.

        ValueError if ``count`` is out of this range (1 is allowed for a chain of one step).
        """
        length = len(kept)
        if count is None or count == length:
            return cls(np.arange(length), np.ones(length, dtype=np.int64))
        if not 2 <= count <= length:
            raise ValueError(
                f"num_timesteps={count} must be in [2, {length}], or 'all': the first step is a separate stratum."
            )
        snr, noise = kept.snr, 1 - kept.alphas_cumprod
        costs = np.log1p(noise[1:] * (snr[:-1] - snr[1:]))
        shares = (1 - EQUAL_LENGTH_SHARE) * costs / costs.sum() + EQUAL_LENGTH_SHARE / (length - 1)
        edge_index = np.arange(1, count - 1)
        edges = 1 + np.searchsorted(np.cumsum(shares), edge_index / (count - 1))
        # Every stratum has at least one step.
        edges = np.maximum.accumulate(edges - edge_index) + edge_index
        edges = np.minimum(edges.clip(min=1 + edge_index), length - (count - 1) + edge_index)
        starts = np.concatenate([[0, 1], edges]).astype(np.int64)
        return cls(starts, np.diff(np.append(starts, length)))

    def __len__(self) -> int:
        return len(self.starts)

    def draw(self, generator: torch.Generator) -> Steps:
        """One chain index per stratum, (K,), int64."""
        fraction = torch.rand(len(self), generator=generator, dtype=torch.float64).numpy()
        return self.starts + np.minimum((fraction * self.sizes).astype(np.int64), self.sizes - 1)


@dataclass(frozen=True)
class Estimate:
    """Mean of the bound over images, its confidence interval and its parts; bits per dimension.

    Attributes:
        bits_per_dim: mean of the bound.
        low: lower end of the interval; None for a single image.
        high: upper end.
        prior: prior term of the mean.
        steps: sum of the KL divergences of the mean.
        decoder: decoder term of the mean.
        num_images: number of images.
        confidence: of the interval.
    """

    bits_per_dim: float
    low: float | None
    high: float | None
    prior: float
    steps: float
    decoder: float
    num_images: int
    confidence: float


def estimate(bits: Table | Tensor, prior: Table | Tensor, strata: Strata, confidence: float = 0.95) -> Estimate:
    """Mean of the bound over images, with Student's t interval over their totals.

    Args:
        bits: terms of the bound at each image's steps, (N, K), one per stratum.
        prior: of each image, (N,).
        strata: from which the steps were drawn.
        confidence: of the interval, in (0, 1), else ValueError.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence!r} must be in (0, 1); 0.95 is usual.")
    table = np.asarray(bits, dtype=np.float64) * strata.sizes
    prior_bits = np.asarray(prior, dtype=np.float64)
    totals = table.sum(1) + prior_bits
    half = half_width(totals, confidence)
    mean = float(totals.mean())
    return Estimate(
        mean,
        None if half is None else mean - half,
        None if half is None else mean + half,
        float(prior_bits.mean()),
        float(table[:, 1:].sum(1).mean()),
        float(table[:, 0].mean()),
        len(totals),
        confidence,
    )


def half_width(values: Table, confidence: float = 0.95) -> float | None:
    """Half the width of Student's t interval for the mean of ``values``, (N,); None for a single value."""
    from scipy.stats import t

    count = len(values)
    if count < 2:
        return None
    return float(t.ppf((1 + confidence) / 2, count - 1) * values.std(ddof=1) / math.sqrt(count))


class StepBits(NamedTuple):
    """Mean term of the bound at a step, bits per dimension; no standard error for a single draw."""

    timestep: int
    mean: float
    standard_error: float | None
    draws: int


def step_table(bits: Table | Tensor, indices: Steps, timesteps: Steps) -> list[StepBits]:
    """Mean term of the bound at each step of a chain that any image drew, ascending.

    Args:
        bits: (N, K).
        indices: of their steps in the chain, (N, K).
        timesteps: of the chain, (length,), ascending.
    """
    values, flat = np.asarray(bits, dtype=np.float64).ravel(), np.asarray(indices).ravel()
    rows: list[StepBits] = []
    order = np.argsort(flat, kind="stable")
    edges = np.searchsorted(flat[order], np.arange(len(timesteps) + 1))
    for index, timestep in enumerate(timesteps):
        drawn = values[order[edges[index] : edges[index + 1]]]
        if len(drawn):
            error = float(drawn.std(ddof=1) / math.sqrt(len(drawn))) if len(drawn) > 1 else None
            rows.append(StepBits(int(timestep), float(drawn.mean()), error, len(drawn)))
    return rows

"""The bound of a set of images from a few steps of each: strata, weights and an interval.

Every image draws its own steps: the mean over images then has errors that are independent of each other, and Student's
t over the images' totals covers both kinds of chance, which images were taken and which steps and noise they drew.
With steps that all images share, the second kind is common to all and invisible in their spread.

The chain is cut into strata: its first step, which the decoder sees and which differs from all others, and pieces of
the rest. One step is drawn in each, and counts for the whole piece. What a step adds falls steeply with its noise:
pieces of equal length would leave the first of them with a few large steps among many small ones, and totals so skewed
that no interval of theirs is to be trusted. Pieces are therefore cut where a schedule's own divergences, those of
standard normal data, add up to equal parts; a quarter of them goes by length, for networks that err elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusers_ddpm_ext.diffusion.respacing import Steps
from diffusers_ddpm_ext.diffusion.schedule import NoiseSchedule, Table

BY_LENGTH = 0.25


@dataclass(frozen=True)
class Strata:
    """Pieces of a chain of ``length`` steps.

    Attributes:
        starts: first place of each piece, (K,), int64, ascending; the first piece is the chain's first step alone.
        sizes: places in each piece, (K,), int64, of sum ``length``.
    """

    starts: Steps
    sizes: Steps

    @classmethod
    def from_schedule(cls, kept: NoiseSchedule, count: int | None = None) -> Strata:
        """Cut a chain.

        Args:
            kept: the chain in use.
            count: K, steps of each image, from 2 to all (1 for a chain of one step); None: all.

        Raises:
            ValueError: ``count`` is out of its range.
        """
        length = len(kept)
        if count is None or count == length:
            return cls(np.arange(length), np.ones(length, dtype=np.int64))
        if not 2 <= count <= length:
            raise ValueError(
                f"num_timesteps={count} must lie in [2, {length}], or be 'all': the first step is a stratum of its "
                "own."
            )
        snr, noise = kept.snr, 1 - kept.alphas_cumprod
        costs = np.log1p(noise[1:] * (snr[:-1] - snr[1:]))
        shares = (1 - BY_LENGTH) * costs / costs.sum() + BY_LENGTH / (length - 1)
        pieces = np.arange(1, count - 1)
        edges = 1 + np.searchsorted(np.cumsum(shares), pieces / (count - 1))
        # At least one step for every piece, on both sides of each edge.
        edges = np.maximum.accumulate(edges - pieces) + pieces
        edges = np.minimum(edges.clip(min=1 + pieces), length - (count - 1) + pieces)
        starts = np.concatenate([[0, 1], edges]).astype(np.int64)
        return cls(starts, np.diff(np.append(starts, length)))

    def __len__(self) -> int:
        return len(self.starts)

    def draw(self, generator: torch.Generator) -> Steps:
        """One place of each piece, (K,), int64."""
        inside = torch.rand(len(self), generator=generator, dtype=torch.float64).numpy()
        return self.starts + np.minimum((inside * self.sizes).astype(np.int64), self.sizes - 1)


@dataclass(frozen=True)
class Estimate:
    """A mean over images with its interval, and its parts; bits per dimension.

    Attributes:
        bits_per_dim: the bound's mean.
        low: lower end of the interval; None for a single image, which says nothing of the spread.
        high: its upper end.
        prior: part of the mean.
        steps: part of the mean, all divergences together.
        decoder: part of the mean.
        num_images: that it was taken over.
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
    """Put an estimate together.

    Args:
        bits: what each image's drawn steps add to its bound, (N, K), by stratum.
        prior: of each image, (N,).
        strata: that they were drawn from.
        confidence: of the interval, in (0, 1).

    Returns:
        The mean over the images, with Student's t interval over their totals.

    Raises:
        ValueError: ``confidence`` is out of its range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence!r} must lie in (0, 1); 0.95 is usual.")
    table = np.asarray(bits, dtype=np.float64) * strata.sizes
    before = np.asarray(prior, dtype=np.float64)
    totals = table.sum(1) + before
    half = half_width(totals, confidence)
    mean = float(totals.mean())
    return Estimate(
        mean,
        None if half is None else mean - half,
        None if half is None else mean + half,
        float(before.mean()),
        float(table[:, 1:].sum(1).mean()),
        float(table[:, 0].mean()),
        len(totals),
        confidence,
    )


def half_width(values: Table, confidence: float = 0.95) -> float | None:
    """Half of Student's t interval of the mean of ``values``, (N,); None for a single one."""
    from scipy.stats import t

    count = len(values)
    if count < 2:
        return None
    return float(t.ppf((1 + confidence) / 2, count - 1) * values.std(ddof=1) / math.sqrt(count))


def step_table(bits: Table | Tensor, places: Steps, timesteps: Steps) -> list[tuple[int, float, float | None, int]]:
    """What each step of a chain adds, where any image drew it.

    Args:
        bits: (N, K).
        places: which place of the chain each of them was at, (N, K).
        timesteps: of the chain, (length,), ascending.

    Returns:
        Rows (timestep, mean bits per dimension, its standard error or None, draws), ascending.
    """
    values, flat = np.asarray(bits, dtype=np.float64).ravel(), np.asarray(places).ravel()
    rows: list[tuple[int, float, float | None, int]] = []
    order = np.argsort(flat, kind="stable")
    edges = np.searchsorted(flat[order], np.arange(len(timesteps) + 1))
    for place, timestep in enumerate(timesteps):
        seen = values[order[edges[place] : edges[place + 1]]]
        if len(seen):
            error = float(seen.std(ddof=1) / math.sqrt(len(seen))) if len(seen) > 1 else None
            rows.append((int(timestep), float(seen.mean()), error, len(seen)))
    return rows

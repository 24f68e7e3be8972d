"""Precision, recall, density and coverage of samples, by nearest neighbors of features.

    ball of an image   all features at most as far as its k-th nearest neighbor in its own set
    precision          share of the samples inside the ball of some reference image      (arXiv 1904.06991, eq. 1)
    recall             share of the reference images inside the ball of some sample      (arXiv 1904.06991, eq. 2)
    density            balls of reference images around a sample, on average, over k     (arXiv 2002.09797, eq. 4)
    coverage           share of the reference images with a sample in their ball         (arXiv 2002.09797, eq. 5)

All four depend on N, M and k, also in the limit: compare them at the same ones only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffusers_ddpm_ext.metrics.distances import distance_blocks, rounding_bound
from diffusers_ddpm_ext.metrics.intervals import (
    Estimate,
    Features,
    checked_confidence,
    checked_pair,
    from_halves,
    proportion_from_halves,
    random_halves,
)
from diffusers_ddpm_ext.utils.checks import checked_integer

NEAREST = 5


@dataclass(frozen=True)
class ManifoldEstimate:
    """Precision, recall, density and coverage; the intervals are those of their averages at these numbers of images.

    Attributes:
        precision: share of the samples that look like reference images.
        recall: share of the reference images that look like samples.
        density: how many reference images' balls a sample is in, over k; 1 for samples of the same distribution.
        coverage: share of the reference images that have a sample nearby.
    """

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


def manifold_metrics(samples: Features, reference: Features, nearest: int = NEAREST) -> dict[str, float]:
    """Precision, recall, density and coverage by name.

    Args:
        samples: features, (N, D), N more than ``nearest``.
        reference: features, (M, D), M more than ``nearest``.
        nearest: k, of the neighbor at which a ball ends.

    Raises:
        ValueError: not such features, or no such number.
    """
    nearest = checked_integer("nearest", nearest, "an integer of at least 1", low=1)
    values = _values(*_centered(*checked_pair(samples, reference, at_least=nearest + 1)), nearest)
    return dict(zip(ManifoldEstimate.__dataclass_fields__, values.tolist(), strict=True))


def estimate_manifolds(
    samples: Features, reference: Features, nearest: int = NEAREST, confidence: float = 0.95, seed: int = 0
) -> ManifoldEstimate:
    """Precision, recall, density and coverage with their intervals.

    Args:
        samples: features, (N, D), N at least 2 ``nearest`` + 2.
        reference: features, (M, D), M at least 2 ``nearest`` + 2.
        nearest: k, of the neighbor at which a ball ends.
        confidence: of the intervals.
        seed: of the division into halves.

    Raises:
        ValueError: not such features, or no such number.
    """
    nearest = checked_integer("nearest", nearest, "an integer of at least 1", low=1)
    x, y = _centered(*checked_pair(samples, reference, at_least=2 * nearest + 2))
    confidence = checked_confidence(confidence)
    divisions = zip(random_halves(len(x), seed), random_halves(len(y), seed + 1), strict=True)
    halves = np.array([[_values(x[i], y[j], nearest) for i, j in zip(*each, strict=True)] for each in divisions])
    values = _values(x, y, nearest).tolist()
    return ManifoldEstimate(
        proportion_from_halves(values[0], halves[..., 0], len(x), confidence),
        proportion_from_halves(values[1], halves[..., 1], len(y), confidence),
        from_halves(values[2], halves[..., 2], confidence).clipped(low=0),
        proportion_from_halves(values[3], halves[..., 3], len(y), confidence),
    )


def _centered(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    center = y.mean(axis=0)
    return x - center, y - center


def _values(x: np.ndarray, y: np.ndarray, nearest: int) -> np.ndarray:
    """The four metrics, (4,)."""
    same = rounding_bound(x, y)
    radii_x, radii_y = _squared_radii(x, nearest) + same, _squared_radii(y, nearest) + same
    balls = np.zeros(len(x), np.int64)  # of reference images around each sample
    recalled, covered = np.zeros(len(y), bool), np.zeros(len(y), bool)
    for block, squared in distance_blocks(y, x):
        in_reference = squared <= radii_y[block, None]
        balls += in_reference.sum(axis=0)
        covered[block] = in_reference.any(axis=1)
        recalled[block] = (squared <= radii_x).any(axis=1)
    return np.array([(balls > 0).mean(), recalled.mean(), balls.mean() / nearest, covered.mean()])


def _squared_radii(features: np.ndarray, nearest: int) -> np.ndarray:
    """Squared distance of each image to its k-th nearest neighbor, (N,)."""
    radii = np.empty(len(features))
    for block, squared in distance_blocks(features, features):
        rows = np.arange(len(squared))
        squared[rows, block.start + rows] = np.inf  # no image is its own neighbor
        radii[block] = np.partition(squared, nearest - 1, axis=1)[:, nearest - 1]
    return radii

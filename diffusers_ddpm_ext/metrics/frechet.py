"""Frechet distance of two sets of features (FD; FID with Inception's).

    x, y       features (N, D) and (M, D)
    mu, S      mean and covariance of features, the latter over N - 1
    A          a factor of the covariance: S = A A^T

    FD = |mu_x - mu_y|^2 + tr S_x + tr S_y - 2 tr (S_x S_y)^(1/2)        (Heusel et al., arXiv 1706.08500, eq. 6)

The last trace is the sum of the singular values of ``A_x^T A_y``. No root of a matrix is taken, and fewer images than
features (a singular covariance) are no special case.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffusers_ddpm_ext.metrics.intervals import (
    NUM_GROUPS,
    Estimate,
    Features,
    checked_confidence,
    checked_pair,
    extrapolated,
    jackknife,
    random_groups,
)


@dataclass(frozen=True)
class FrechetEstimate:
    """The Frechet distance of samples to reference images.

    Attributes:
        fd: the distance at these numbers of images, as published ones are. It is biased upward, the more the fewer
            images; its interval is that of its average at these numbers.
        extrapolated: without the part of the bias that falls as 1/N, from two sizes: an estimate of the distance of
            the two distributions. Unreliable with fewer images than features.
    """

    fd: Estimate
    extrapolated: Estimate


def frechet_distance(samples: Features, reference: Features) -> float:
    """The Frechet distance of two sets of features, in float64.

    Args:
        samples: features, (N, D), N at least 2.
        reference: features, (M, D), M at least 2.

    Raises:
        ValueError: not features of at least two images each, of one width.
    """
    return _distance(*checked_pair(samples, reference, at_least=2))


def estimate_frechet(
    samples: Features, reference: Features, confidence: float = 0.95, seed: int = 0
) -> FrechetEstimate:
    """The Frechet distance with its bias and intervals.

    Args:
        samples: features, (N, D), N at least 4.
        reference: features, (M, D), M at least 4.
        confidence: of the intervals.
        seed: of the division into groups.

    Raises:
        ValueError: not such features, or no such confidence.
    """
    x, y = checked_pair(samples, reference)
    confidence = checked_confidence(confidence)
    groups = min(NUM_GROUPS, len(x) // 2, len(y) // 2)
    group_x, group_y = random_groups(len(x), groups, seed), random_groups(len(y), groups, seed + 1)
    value = _distance(x, y)
    without = np.array([_distance(x[group_x != group], y[group_y != group]) for group in range(groups)])
    return FrechetEstimate(
        jackknife(value, without, confidence).clipped(low=0), extrapolated(value, without, confidence)
    )


def _distance(x: np.ndarray, y: np.ndarray) -> float:
    factor_x, factor_y = _factor(x), _factor(y)
    shift = float(((x.mean(axis=0) - y.mean(axis=0)) ** 2).sum())
    overlap = float(np.linalg.svd(factor_x @ factor_y.T, compute_uv=False).sum())
    return max(0.0, shift + float((factor_x**2).sum()) + float((factor_y**2).sum()) - 2 * overlap)


def _factor(features: np.ndarray) -> np.ndarray:
    """A^T with A A^T the covariance of features, (min(N, D), D)."""
    centered = (features - features.mean(axis=0)) / np.sqrt(len(features) - 1)
    return np.asarray(np.linalg.qr(centered, mode="r")) if len(centered) > centered.shape[1] else centered

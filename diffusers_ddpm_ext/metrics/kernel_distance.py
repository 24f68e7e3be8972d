"""Kernel distance of two sets of features (KID with Inception's): the squared maximum mean discrepancy.

    k(a, b) = (a . b / D + 1)^3
    KID     = mean of k over pairs of samples + mean over pairs of reference images - 2 mean over mixed pairs

over pairs of different images (Binkowski et al., arXiv 1801.01401): unbiased at any number of images. The paper's
code averages over random subsets of 1,000; all pairs have the same expectation and less variance.
"""

from __future__ import annotations

import numpy as np

from diffusers_ddpm_ext.metrics.intervals import (
    NUM_GROUPS,
    Estimate,
    Features,
    checked_confidence,
    checked_pair,
    jackknife,
    random_groups,
)

BLOCK_ENTRIES = 2**23
"""Of the kernel's matrix that are in memory at a time."""


def kernel_distance(samples: Features, reference: Features) -> float:
    """The unbiased kernel distance of two sets of features, in float64. It may be negative.

    Args:
        samples: features, (N, D), N at least 2.
        reference: features, (M, D), M at least 2.

    Raises:
        ValueError: not features of at least two images each, of one width.
    """
    x, y = checked_pair(samples, reference, at_least=2)
    return _value(*_group_sums(x, y, np.zeros(len(x), np.int64), np.zeros(len(y), np.int64), 1))


def estimate_kernel_distance(
    samples: Features, reference: Features, confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """The unbiased kernel distance with its interval, from blocks of the kernel's matrix.

    The interval is that of the distance of the two distributions. Where they are the same it is wider than needed.

    Args:
        samples: features, (N, D), N at least 4.
        reference: features, (M, D), M at least 4.
        confidence: of the interval.
        seed: of the division into groups.

    Raises:
        ValueError: not such features, or no such confidence.
    """
    x, y = checked_pair(samples, reference)
    confidence = checked_confidence(confidence)
    groups = min(NUM_GROUPS, len(x) // 2, len(y) // 2)
    sums, sizes = _group_sums(
        x, y, random_groups(len(x), groups, seed), random_groups(len(y), groups, seed + 1), groups
    )
    kept = [np.arange(groups) != group for group in range(groups)]
    without = [_value(sums[:, rest][:, :, rest], sizes[:, rest]) for rest in kept]
    return jackknife(_value(sums, sizes), np.array(without), confidence)


def _group_sums(
    x: np.ndarray, y: np.ndarray, group_x: np.ndarray, group_y: np.ndarray, groups: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the kernel over pairs of groups, (3, G, G): of x, of y, mixed; and sizes of the groups, (2, G)."""
    member_x, member_y = (np.eye(groups)[group] for group in (group_x, group_y))
    sums = [
        _block_sums(x, x, member_x, member_x, same=True),
        _block_sums(y, y, member_y, member_y, same=True),
        _block_sums(x, y, member_x, member_y, same=False),
    ]
    return np.stack(sums), np.stack([member_x.sum(axis=0), member_y.sum(axis=0)])


def _block_sums(a: np.ndarray, b: np.ndarray, member_a: np.ndarray, member_b: np.ndarray, same: bool) -> np.ndarray:
    total = np.zeros((member_a.shape[1], member_b.shape[1]))
    rows = max(1, BLOCK_ENTRIES // len(b))
    for start in range(0, len(a), rows):
        kernel = (a[start : start + rows] @ b.T / a.shape[1] + 1) ** 3
        if same:  # an image is no pair with itself
            kernel[np.arange(len(kernel)), start + np.arange(len(kernel))] = 0
        total += member_a[start : start + rows].T @ kernel @ member_b
    return total


def _value(sums: np.ndarray, sizes: np.ndarray) -> float:
    n, m = sizes.sum(axis=1)
    of_x, of_y, mixed = sums.sum(axis=(1, 2))
    return float(of_x / (n * (n - 1)) + of_y / (m * (m - 1)) - 2 * mixed / (n * m))

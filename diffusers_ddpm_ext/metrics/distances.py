"""Squared Euclidean distances of features, by blocks that fit in memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

BLOCK_ENTRIES = 2**23
ROUNDING = 1e-12
"""Of a squared distance, relative to the squared norms of its two ends."""


def squared_norms(features: np.ndarray) -> np.ndarray:
    """(N,) of (N, D)."""
    norms: np.ndarray = np.einsum("nd,nd->n", features, features)
    return norms


def distance_blocks(rows: np.ndarray, columns: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Blocks of the matrix of squared distances: which rows, and (rows, M), never negative.

    Args:
        rows: features, (N, D).
        columns: features, (M, D). Both have been centered, so that little is lost to rounding.
    """
    norms_rows, norms_columns = squared_norms(rows), squared_norms(columns)
    step = max(1, BLOCK_ENTRIES // len(columns))
    for start in range(0, len(rows), step):
        block = slice(start, min(start + step, len(rows)))
        squared = norms_rows[block, None] + norms_columns - 2 * (rows[block] @ columns.T)
        yield block, np.maximum(squared, 0, out=squared)


def rounding_bound(x: np.ndarray, y: np.ndarray) -> float:
    """What two squared distances may differ by that are equal."""
    return ROUNDING * float(squared_norms(x).max() + squared_norms(y).max())

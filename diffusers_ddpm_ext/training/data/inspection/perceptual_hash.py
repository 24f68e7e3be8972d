"""Perceptual hashes of images, and the pairs of them that differ in few bits.

The hash has one bit for each of the 64 lowest frequencies of a discrete cosine transform of the image, in gray and at
32 x 32 pixels: is it above their median. A copy that was resized, compressed again, or made a little brighter has the
same bits but for a few. It is the `phash` of the package imagehash, which tests compare it with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

SIDE, LOW_FREQUENCIES = 32, 8
BITS = LOW_FREQUENCIES**2
MAX_DISTANCE = 6
"""Bits in which two hashes of a pair may differ."""
MAX_PAIRS = 100_000
BLOCK = 2**20  # comparisons at a time
MAX_COMPARISONS = 2 * 10**10
"""Of hashes: about a minute, which a set of some 500,000 images needs."""


def _cosines() -> NDArray[np.float64]:
    """The lowest frequencies of the transform (type II, not normalized) as a matrix, (8, 32)."""
    k, n = np.arange(LOW_FREQUENCIES)[:, None], np.arange(SIDE)
    return 2 * np.cos(np.pi * k * (2 * n + 1) / (2 * SIDE))


_COSINES = _cosines()
_WEIGHTS = np.uint64(1) << np.arange(BITS - 1, -1, -1, dtype=np.uint64)


def perceptual_hash(gray: NDArray[np.generic]) -> int:
    """Hash of a gray image of 32 x 32 pixels: 64 bits, the first one the highest."""
    frequencies = (_COSINES @ gray.astype(np.float64) @ _COSINES.T).ravel()
    bits = frequencies > np.median(frequencies)
    return int((_WEIGHTS[bits]).sum())


@dataclass(frozen=True)
class HashPairs:
    """Pairs of images whose hashes differ in few bits, the closest first.

    Attributes:
        pairs: numbers of two images, the lower first, (P, 2), int64.
        bits: in which their hashes differ, (P,), int64.
        complete: False if there are more than `MAX_PAIRS`, of which the closest are here, or too many comparisons.
    """

    pairs: NDArray[np.int64]
    bits: NDArray[np.int64]
    complete: bool


def close_pairs(hashes: NDArray[np.uint64], max_distance: int = MAX_DISTANCE) -> HashPairs:
    """Find all pairs of images whose hashes differ in at most so many bits.

    Two such hashes agree in one of ``max_distance + 1`` parts of their bits, so that only those that share a part are
    compared. Of images with the same hash, each is paired with the first of them alone.

    Args:
        hashes: of each image, (N,), uint64.
        max_distance: number of bits.
    """
    distinct, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    others = np.flatnonzero(first[inverse] != np.arange(len(hashes)))
    same = np.stack([first[inverse[others]], others], axis=1)
    found = _distinct_pairs(distinct, max_distance)
    differing = np.sort(first[found.pairs], axis=1)
    pairs = np.concatenate([same, differing]).astype(np.int64)
    bits = np.concatenate([np.zeros(len(same), dtype=np.int64), found.bits])
    order = np.lexsort((pairs[:, 1], pairs[:, 0], bits))[:MAX_PAIRS]
    return HashPairs(pairs[order], bits[order], found.complete and len(pairs) <= MAX_PAIRS)


def _distinct_pairs(hashes: NDArray[np.uint64], max_distance: int) -> HashPairs:
    """The pairs of distinct hashes; every one once. Of too many, those at the smallest distances are kept."""
    found = np.empty((0, 2), dtype=np.int64)
    limit, comparisons = max_distance, 0
    for members in _groups(hashes, max_distance):
        for number, pairs in _pairs_in(hashes, members, limit):
            comparisons += number
            found = np.concatenate([found, pairs[_distances(hashes, pairs) <= limit]])
            while len(found) > 4 * MAX_PAIRS and limit > 1:
                limit //= 2
                found = np.unique(found[_distances(hashes, found) <= limit], axis=0)
        if comparisons > MAX_COMPARISONS or len(found) > 4 * MAX_PAIRS:
            limit = 0
            break
    found = np.unique(found, axis=0)
    return HashPairs(found, _distances(hashes, found), complete=limit == max_distance)


def _distances(hashes: NDArray[np.uint64], pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.bitwise_count(hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]]).astype(np.int64)


def _groups(hashes: NDArray[np.uint64], max_distance: int) -> Iterator[NDArray[np.int64]]:
    """Images that agree in one of ``max_distance + 1`` parts of their bits."""
    ends = np.linspace(0, BITS, max_distance + 2).astype(int)
    for low, high in pairwise(ends):
        part = (hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(part, kind="stable")
        _, starts = np.unique(part[order], return_index=True)
        for start, stop in pairwise([*starts.tolist(), len(order)]):
            if stop - start > 1:
                yield order[start:stop]


def _pairs_in(
    hashes: NDArray[np.uint64], members: NDArray[np.int64], max_distance: int
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Numbers of comparisons, and the pairs that they found among some images."""
    rows = max(1, BLOCK // len(members))
    values = hashes[members]
    for start in range(0, len(members) - 1, rows):
        others = values[start + 1 :]
        distances = np.bitwise_count(values[start : start + rows, None] ^ others[None, :])
        row, column = np.nonzero(distances <= max_distance)
        later = column >= row
        pairs = np.stack([members[start + row[later]], members[start + 1 + column[later]]], axis=1)
        yield distances.size, np.sort(pairs, axis=1)

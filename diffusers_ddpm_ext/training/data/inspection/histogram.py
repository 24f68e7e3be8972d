"""Histograms and moments of values that arrive image by image, of a range that nobody knows before.

Bins are the intervals [k w, (k + 1) w) with integers k and a width w that is a power of two. A value outside of the
bins doubles the width until it fits, which joins neighboring bins and moves none: the result is the same in any order.
Integers start at a width of 1, so that up to `MAX_BINS` of them have a bin each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_BINS = 4096
FLOAT_BINS = 1024
"""Bins of the first floats: later ones may have a larger range."""
MIN_EXPONENT = -1000
PRECISION_BITS = 50
"""Bins are not narrower than the largest value by 2^-50: float64 has no numbers between."""


@dataclass(frozen=True)
class Histogram:
    """Counts of values per channel.

    Attributes:
        counts: (C, bins), int64.
        first: number k of the first bin.
        exponent: the width of a bin is two to this power.
    """

    counts: NDArray[np.int64]
    first: int
    exponent: int

    @property
    def width(self) -> float:
        """Width of a bin, in units of the values."""
        return math.ldexp(1.0, self.exponent)

    @property
    def edges(self) -> NDArray[np.float64]:
        """Lower end of each bin, and the upper end of the last, (bins + 1,)."""
        return (self.first + np.arange(self.counts.shape[1] + 1, dtype=np.float64)) * self.width

    def merge(self, other: Histogram) -> Histogram:
        """The histogram of the values of both; they have the same number of channels."""
        exponent = max(self.exponent, other.exponent)
        while True:
            parts = [_coarsen(each, exponent) for each in (self, other)]
            first = min(part.first for part in parts)
            bins = max(part.first + part.counts.shape[1] for part in parts) - first
            if bins <= MAX_BINS:
                break
            exponent += max(1, math.ceil(math.log2(bins / MAX_BINS)))
        counts = np.zeros((len(self.counts), bins), dtype=np.int64)
        for part in parts:
            start = part.first - first
            counts[:, start : start + part.counts.shape[1]] += part.counts
        return Histogram(counts, first, exponent)


def histogram_of(values: NDArray[np.generic]) -> Histogram:
    """Histogram of finite values, (C, n) with n >= 1, integers or floats."""
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind in "biu":
        exponent = max(0, math.ceil(math.log2((high - low + 1) / MAX_BINS)))
        numbers = values.astype(np.int64) >> exponent
    else:
        exponent = _float_exponent(low, high)
        numbers = np.floor(np.ldexp(values.astype(np.float64), -exponent)).astype(np.int64)
    first = int(numbers.min())
    bins = int(numbers.max()) - first + 1
    counts = np.stack([np.bincount(row - first, minlength=bins) for row in numbers])
    return Histogram(counts.astype(np.int64), first, exponent)


def _float_exponent(low: float, high: float) -> int:
    """Exponent of a width by which the range has at most `FLOAT_BINS` bins, and which float64 resolves."""
    largest = max(abs(low), abs(high))
    finest = math.frexp(largest)[1] - PRECISION_BITS if largest else -PRECISION_BITS
    half = high / 2 - low / 2  # the whole may overflow
    return max(finest, MIN_EXPONENT, math.frexp(half / FLOAT_BINS)[1] + 1 if half > 0 else MIN_EXPONENT)


def coarsen(histogram: Histogram, bins: int) -> Histogram:
    """The same counts in at most so many bins."""
    while histogram.counts.shape[1] > bins:
        histogram = _coarsen(histogram, histogram.exponent + 1)
    return histogram


def _coarsen(histogram: Histogram, exponent: int) -> Histogram:
    """The same counts in wider bins."""
    shift = exponent - histogram.exponent
    if shift == 0:
        return histogram
    first = histogram.first >> shift
    bins = histogram.counts.shape[1]
    last = (histogram.first + bins - 1) >> shift
    starts = [0, *(((k << shift) - histogram.first) for k in range(first + 1, last + 1))]
    return Histogram(np.add.reduceat(histogram.counts, starts, axis=1), first, exponent)


@dataclass(frozen=True)
class Moments:
    """Number, mean and sum of squared distances from it, per channel: each (C,), float64."""

    count: NDArray[np.float64]
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]

    @property
    def std(self) -> NDArray[np.float64]:
        """Standard deviation of all values, (C,)."""
        return np.sqrt(self.squares / np.maximum(self.count, 1))

    def merge(self, other: Moments) -> Moments:
        """The moments of the values of both (Chan, Golub and LeVeque, 1979)."""
        count = self.count + other.count
        share = other.count / np.maximum(count, 1)
        with np.errstate(over="ignore", invalid="ignore"):
            distance = other.mean - self.mean
            squares = self.squares + other.squares + distance**2 * self.count * share
            return Moments(count, self.mean + distance * share, squares)


def moments_of(values: NDArray[np.generic]) -> Moments:
    """Moments of finite values, (C, n)."""
    count = np.full(len(values), values.shape[1], dtype=np.float64)
    with np.errstate(over="ignore"):  # of floats near the largest there is
        mean = values.mean(axis=1, dtype=np.float64)
        return Moments(count, mean, values.var(axis=1, dtype=np.float64) * count)


def moments_of_histogram(histogram: Histogram) -> Moments:
    """Moments of integers that have a bin each."""
    levels = histogram.edges[:-1]
    count = histogram.counts.sum(axis=1).astype(np.float64)
    mean = histogram.counts @ levels / np.maximum(count, 1)
    squares = (histogram.counts * (levels - mean[:, None]) ** 2).sum(axis=1)
    return Moments(count, mean, squares)

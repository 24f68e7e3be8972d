"""Streaming histograms and moments against NumPy's of all values at once."""

from __future__ import annotations

import numpy as np
import pytest

from diffusers_ddpm_ext.training.data.inspection.histogram import (
    MAX_BINS,
    Histogram,
    coarsen,
    histogram_of,
    moments_of,
    moments_of_histogram,
)

PARTS = {
    "floats of any scale": [np.random.default_rng(0).normal(10.0**k, 10.0 ** (k - 1), (2, 500)) for k in range(-3, 4)],
    "integers": [np.random.default_rng(k).integers(-(10**k), 10**k, (2, 300)) for k in range(1, 7)],
    "one value": [np.full((2, 10), 3.5), np.full((2, 4), 3.5)],
    "two distant values": [np.full((2, 10), -1e300), np.full((2, 4), 1e300), np.zeros((2, 3))],
    "the whole range": [np.full((2, 3), -1.7e308), np.full((2, 4), 1.7e308), np.array([[-1.7e308, 1.7e308]] * 2)],
    "tiny beside zero": [np.full((2, 10), 5e-324), np.zeros((2, 4))],
    "a difference that float64 barely has": [np.array([[1e9, 1e9 + 1e-6]] * 2)],
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_in_any_order_are_numpys_histogram_of_all(name):
    parts = PARTS[name]
    for order in (parts, parts[::-1]):
        merged = histogram_of(order[0])
        for part in order[1:]:
            merged = merged.merge(histogram_of(part))
        values = np.concatenate(parts, axis=1).astype(float)
        assert merged.counts.shape[1] <= MAX_BINS
        for channel in range(2):
            numbers = np.floor(np.ldexp(values[channel], -merged.exponent)) - merged.first
            expected = np.bincount(numbers.astype(int), minlength=merged.counts.shape[1])
            np.testing.assert_array_equal(merged.counts[channel], expected)


def test_small_integers_have_a_bin_each():
    values = np.random.default_rng(0).integers(-1000, 3000, (1, 5000))
    histogram = histogram_of(values)
    assert histogram.width == 1
    np.testing.assert_array_equal(histogram.counts[0], np.bincount(values[0] - values.min()))


def test_coarser_bins_have_the_same_counts():
    histogram = histogram_of(np.random.default_rng(0).normal(size=(3, 10_000)))
    coarse = coarsen(histogram, 40)
    assert coarse.counts.shape[1] <= 40
    assert (coarse.counts.sum(axis=1) == 10_000).all()
    edges = coarse.edges
    fine = histogram.edges[:-1]
    for k in range(len(edges) - 1):
        inside = (fine >= edges[k]) & (fine < edges[k + 1])
        np.testing.assert_array_equal(coarse.counts[:, k], histogram.counts[:, inside].sum(axis=1))


def test_moments_of_parts_are_those_of_all():
    parts = [np.random.default_rng(k).normal(k, 1 + k, (3, 100 * (k + 1))) for k in range(5)]
    merged = moments_of(parts[0])
    for part in parts[1:]:
        merged = merged.merge(moments_of(part))
    values = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(merged.mean, values.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(merged.std, values.std(axis=1), rtol=1e-12)


def test_moments_of_bytes_follow_from_their_histogram():
    values = np.random.default_rng(0).integers(0, 256, (2, 999))
    counts = np.stack([np.bincount(row, minlength=256) for row in values])
    moments = moments_of_histogram(Histogram(counts, 0, 0))
    np.testing.assert_allclose(moments.mean, values.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(moments.std, values.std(axis=1), rtol=1e-12)

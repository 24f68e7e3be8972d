"""The suggested range holds all values, and not much more."""

from __future__ import annotations

import numpy as np
import pytest

from diffusers_ddpm_ext.training.data.inspection.array_suggestions import _data_range
from diffusers_ddpm_ext.training.data.inspection.suggestion import plain_number


def test_floats_outside_of_0_to_1():
    """Read back from the text of the command line; at most a quarter wider than the values."""
    rng = np.random.default_rng(0)
    for _ in range(2000):
        scale, place = 10.0 ** rng.uniform(-12, 30), rng.normal() * 10.0 ** rng.uniform(-3, 6)
        values = np.float32(scale) * (place + rng.random(50, dtype=np.float32))
        low, high = float(values.min()), float(values.max())
        suggested = _data_range("float32", low, high, is_needed=False)
        if suggested is None:
            assert low >= 0
            assert high <= 1
            continue
        start, end = (float(plain_number(value)) for value in suggested[:2])
        assert start <= low < high <= end or low == high
        if (start, end) not in ((-1, 1), (0, 255)) and low < high:
            assert end - start <= 1.25 * (high - low)


@pytest.mark.parametrize(
    ("dtype", "low", "high", "expected"),
    [
        ("uint8", 0, 255, None),
        ("uint8", 0, 20, (0, 31)),
        ("uint16", 0, 65535, None),
        ("uint16", 3, 4095, (0, 4095)),
        ("uint16", 0, 4096, (0, 8191)),
        ("int16", -32768, 32767, None),
        ("int16", -1024, 3071, (-1024, 3072)),
        ("int16", -5, -5, (-5, 0)),
        ("uint32", 0, 2**32 - 1, None),
        ("float64", 0, 1, None),
        ("float64", -1, 1, (-1, 1)),
        ("float64", 0.0, 250.0, (0, 255)),
        ("float64", 5.0, 5.0, (0, 5)),
    ],
)
def test_known_ranges(dtype, low, high, expected):
    suggested = _data_range(dtype, low, high, is_needed=False)
    assert (None if suggested is None else suggested[:2]) == expected


def test_integers_without_a_range_of_their_own_always_get_one():
    assert _data_range("uint32", 0, 2**32 - 1, is_needed=True) is not None
    assert _data_range("uint32", 0, 1, is_needed=True)[:2] == (0, 1)

"""How arrays are read, and the range of their values, where a run has to be told."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from diffusers_ddpm_ext.training.data.inspection.suggestion import Origin, Suggestion, plain_number
from diffusers_ddpm_ext.training.data.inspection.summary import SetSummary

FEW_VALUES = 0.25
"""Share of an integer dtype's range below which a range of their own is suggested for the values."""


def suggest_reading(origin: Origin, summaries: Sequence[SetSummary]) -> Iterator[Suggestion]:
    """How arrays are read, where that was not on the command line, and the range of their values."""
    reading, given = summaries[0].reading, {flag for flag, _ in origin.flags}
    if reading.key is not None and "array_key" not in given:
        yield Suggestion("array_key", (reading.key,), "the only array in the files with the shape of an image")
    if reading.layout is not None and "array_layout" not in given:
        yield Suggestion("array_layout", (reading.layout,), "the first axis of the arrays is the shortest")
    if "data_range" in given:
        return
    dtype = summaries[0].pixels.main_kind.dtype
    ranges = [
        (statistics.low, statistics.high)
        for summary in summaries
        for kind, statistics in summary.pixels.statistics.items()
        if kind.dtype == dtype
    ]
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    suggested = _data_range(dtype, low, high, reading.data_range is not None)
    if suggested is not None:
        values = (plain_number(suggested[0]), plain_number(suggested[1]))
        yield Suggestion("data_range", values, f"values are from {low:.6g} to {high:.6g}{suggested[2]}")


def _data_range(dtype: str, low: float, high: float, is_needed: bool) -> tuple[float, float, str] | None:
    """A range that holds all values, and a remark; None where the default fits.

    Args:
        dtype: of the values.
        low: the smallest value.
        high: the largest value.
        is_needed: whether the dtype has no default.
    """
    if np.dtype(dtype).kind == "f":
        if low >= 0 and high <= 1:
            return None
        if low >= -1 and high <= 1:
            return -1, 1, ""
        if low >= 0 and 100 < high <= 255:
            return 0, 255, ""
        if low == high:
            return min(low, 0.0), max(high, 0.0), ", all the same"
        if not math.isfinite(high - low):
            return low, high, ""
        step = 10.0 ** (math.floor(math.log10(max(high - low, 1e-300))) - 1)
        return min(low, _outward(low, step, math.floor)), max(high, _outward(high, step, math.ceil)), ""
    limits = np.iinfo(dtype)
    if not is_needed and high - low >= FEW_VALUES * (int(limits.max) - int(limits.min)):
        return None
    if low == high < 0:
        return low, 0, ", all the same"
    if low >= 0:
        bits = max(1, int(high).bit_length())
        return 0, 2**bits - 1, f", which are {bits} bits"
    step = 2.0 ** max(0, int(high - low).bit_length() - 5)
    low, high = _outward(low, step, math.floor), _outward(high, step, math.ceil)
    return max(low, int(limits.min)), min(high, int(limits.max)), ""


def _outward(value: float, step: float, to_integer: Callable[[float], int]) -> float:
    """A value rounded to a multiple of a step, without the rounding errors of the product."""
    return float(f"{to_integer(value / step) * step:.12g}")

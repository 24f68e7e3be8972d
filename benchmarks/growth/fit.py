"""Fitted slopes with their uncertainty, and Markdown tables of measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

T_QUANTILES = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""Student's t for 95 % on both sides, with 1 to 10 degrees of freedom."""


@dataclass(frozen=True)
class Slope:
    """A slope with half the width of its 95 % confidence interval."""

    value: float
    margin: float

    def __str__(self) -> str:
        return f"{self.value:.2f} +- {self.margin:.2f}"


def fit_line(x: ArrayLike, y: ArrayLike) -> Slope:
    """Least-squares slope of y over x, (n,) each, with n of 3 or more.

    The margin takes the residuals for independent errors of equal size.

    Raises:
        ValueError: fewer than three points, or all at the same x.
    """
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if a.shape != b.shape or len(a) < 3 or not np.ptp(a):
        raise ValueError(f"x {a.shape} and y {b.shape}: a slope needs three points or more, and two different x.")
    centered = a - a.mean()
    spread = float((centered**2).sum())
    slope = float((centered * (b - b.mean())).sum() / spread)
    residuals = b - b.mean() - slope * centered
    degrees = len(a) - 2
    error = float(np.sqrt((residuals**2).sum() / degrees / spread))
    quantile = T_QUANTILES[degrees - 1] if degrees <= len(T_QUANTILES) else 2.0
    return Slope(slope, quantile * error)


def fit_power(x: ArrayLike, y: ArrayLike) -> Slope:
    """Exponent p of y ~ x**p: the slope of the logarithms, as `fit_line`."""
    return fit_line(np.log(np.asarray(x, dtype=float)), np.log(np.asarray(y, dtype=float)))


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table."""
    print(f"\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)

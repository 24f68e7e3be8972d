"""Features of images, and intervals, for tests of metrics."""

from __future__ import annotations

import numpy as np

from diffusers_ddpm_ext.metrics.intervals import Estimate


def golden_features() -> tuple[np.ndarray, np.ndarray]:
    """Features that need no generator: (40, 6) and (50, 6)."""
    x = np.sin(np.arange(240.0).reshape(40, 6) ** 1.5)
    return x, np.cos(np.arange(300.0).reshape(50, 6) ** 1.3) + 0.1


def covered(estimates: list[Estimate], truth: float) -> float:
    """Share of the intervals that have the truth in them."""
    return float(np.mean([each.low <= truth <= each.high for each in estimates]))

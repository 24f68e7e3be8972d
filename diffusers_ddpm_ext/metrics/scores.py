"""Sample metrics by the names of `--metrics`: all of one pair of features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from diffusers_ddpm_ext.metrics.frechet import estimate_frechet
from diffusers_ddpm_ext.metrics.intervals import Estimate, Features
from diffusers_ddpm_ext.metrics.kernel_distance import estimate_kernel_distance
from diffusers_ddpm_ext.metrics.manifolds import NEAREST, estimate_manifolds
from diffusers_ddpm_ext.utils.vocabulary import SAMPLE_METRICS


def compute_scores(
    names: Sequence[str],
    samples: Features,
    reference: Features,
    confidence: float = 0.95,
    nearest: int = NEAREST,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Sample metrics with their intervals.

    Args:
        names: ``fd``, ``kid`` and ``prdc``, each at most once.
        samples: features, (N, D).
        reference: features, (M, D).
        confidence: of the intervals.
        nearest: k of precision, recall, density and coverage.
        seed: of the resampling.

    Returns:
        By name: ``fd`` and ``fd_extrapolated``; ``kid``; ``precision``, ``recall``, ``density`` and ``coverage``.

    Raises:
        ValueError: a name is unknown, or the features are not ones that a metric takes.
    """
    unknown = [name for name in names if name not in SAMPLE_METRICS]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(f"names={list(names)} must be some of {', '.join(SAMPLE_METRICS)}, each once.")
    functions: dict[str, Callable[[], dict[str, Estimate]]] = {
        "fd": partial(_frechet, samples, reference, confidence, seed),
        "kid": lambda: {"kid": estimate_kernel_distance(samples, reference, confidence, seed)},
        "prdc": lambda: dict(vars(estimate_manifolds(samples, reference, nearest, confidence, seed))),
    }
    return {name: estimate for each in names for name, estimate in functions[each]().items()}


def _frechet(samples: Features, reference: Features, confidence: float, seed: int) -> dict[str, Estimate]:
    estimate = estimate_frechet(samples, reference, confidence, seed)
    return {"fd": estimate.fd, "fd_extrapolated": estimate.extrapolated}

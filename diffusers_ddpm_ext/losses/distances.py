"""Distances between a prediction and its target, one number per sample.

``d`` is ``prediction - target``; every distance is the mean over all axes but the first.

Source of the pseudo-Huber distance: [iCT] Song & Dhariwal 2023, in the scaling of Diffusers' training scripts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]

LOSS_TYPES = ("l2", "l1", "huber")


def _mean_per_sample(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1).mean(dim=1)


def l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of ``|d|``: (B, ...) and (B, ...) to (B,)."""
    return _mean_per_sample((prediction - target).abs())


def l2(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of ``d^2``: (B, ...) and (B, ...) to (B,)."""
    return _mean_per_sample((prediction - target).square())


def huber(prediction: Tensor, target: Tensor, c: float = 0.1) -> Tensor:
    """Mean of the pseudo-Huber distance ``2 c (sqrt(d^2 + c^2) - c)``: ``d^2`` for small d, ``2 c |d|`` for large.

    Args:
        prediction: (B, ...).
        target: same shape.
        c: where the square turns into a line, above 0, in the unit of d.

    Returns:
        (B,).
    """
    square = (prediction - target).square()
    # d^2 / (sqrt(d^2 + c^2) + c) instead of the difference, which cancels for small d.
    return _mean_per_sample(2 * c * square / ((square + c**2).sqrt() + c))


def get_distance(loss_type: str | Distance, huber_c: float = 0.1, allowed: tuple[str, ...] = LOSS_TYPES) -> Distance:
    """The distance of a name.

    Args:
        loss_type: ``l2``, ``l1``, ``huber``, or a callable ``distance(prediction, target) -> (B,)``, returned as is.
        huber_c: the ``c`` of ``huber``, above 0.
        allowed: names that an error lists, where more than the distances are allowed.

    Returns:
        ``distance(prediction, target) -> (B,)``.

    Raises:
        ValueError: the name is unknown, or ``huber_c`` is out of its range.
    """
    _check_huber_c(huber_c)
    if callable(loss_type):
        return loss_type
    if loss_type == "l2":
        return l2
    if loss_type == "l1":
        return l1
    if loss_type == "huber":
        return partial(huber, c=float(huber_c))
    way_out = f"choose one of {', '.join(allowed)}, or give a callable distance(prediction, target) -> (B,)."
    raise ValueError(f"loss_type={loss_type!r} is unknown: {way_out}")


def _check_huber_c(huber_c: Any) -> None:
    if isinstance(huber_c, bool) or not isinstance(huber_c, (int, float)) or not 0 < huber_c < math.inf:
        raise ValueError(f"huber_c={huber_c!r} must be a finite number above 0; the usual value is 0.1.")

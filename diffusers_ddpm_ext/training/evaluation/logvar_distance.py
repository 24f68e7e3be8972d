"""Distance of learned log-variances from the losses that they estimate, and the warning where it is large."""

from __future__ import annotations

import math

import numpy as np

FAR = 0.3
"""Warn from this distance on: the learned variance is then wrong by a third."""
BLOCKS = 10
"""Parts of the chain over which the measurement, a few draws per step, is averaged."""


def logvar_distance(logvar: np.ndarray, log_loss: np.ndarray) -> float:
    """Mean absolute error of log-variances over parts of the chain.

    Args:
        logvar: learned, (T,), natural log.
        log_loss: log of the measured loss, (T,); NaN where it was not measured.

    Returns:
        The mean over the parts of ``|log(mean(loss / exp(logvar)))|``, which noise of the measurement does not bias;
        NaN if nothing was measured.
    """
    known = np.flatnonzero(np.isfinite(log_loss))
    if len(known) == 0:
        return math.nan
    errors = []
    for part in np.array_split(known, min(BLOCKS, len(known))):
        differences = log_loss[part] - logvar[part]
        largest = differences.max()
        errors.append(abs(largest + math.log(np.exp(differences - largest).mean())))
    return float(np.mean(errors))


def logvar_warning(logvar: np.ndarray, log_loss: np.ndarray, learning_rate: float) -> str | None:
    """A sentence with the remedy if learned log-variances are far from the measured loss."""
    distance = logvar_distance(logvar, log_loss)
    if not distance > FAR:
        return None
    higher = f"a higher --logvar_learning_rate than {learning_rate:g}" + (
        " (0.02 is usual)" if learning_rate < 0.02 else ""
    )
    start = float(np.nanmean(log_loss))
    return (
        f"the learned log-variances are {distance:.2g} from the log of the measured loss on average"
        f" (samples/logvar.png), so they are not learned yet: use {higher}, more steps, or --logvar_init {start:.2g}"
    )

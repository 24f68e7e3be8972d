"""The distance of learned log-variances from the measured loss, and its warning."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffusers_ddpm_ext.training.evaluation.logvar_distance import logvar_distance, logvar_warning


def measured(logvar: np.ndarray, draws: int, seed: int = 0) -> np.ndarray:
    """The log of the mean of a few losses whose mean is exp(logvar): means of squares of 64 normal numbers."""
    noise = np.random.default_rng(seed).chisquare(64, size=(len(logvar), draws)).mean(1) / 64
    return logvar + np.log(noise)


CURVES = {
    "flat": np.zeros(1000),
    "of an eps model": np.linspace(-1.0, -6.0, 1000),
    "of a v model": np.linspace(-5.0, -1.0, 50),
}


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("draws", [1, 32])
def test_noise_of_the_measurement_is_no_distance(curve: str, draws: int):
    log_loss = measured(CURVES[curve], draws)
    assert logvar_distance(CURVES[curve], log_loss) < 0.1
    assert logvar_warning(CURVES[curve], log_loss, 1e-3) is None


@pytest.mark.parametrize(("offset", "warned"), [(0.2, False), (0.79, True), (-0.5, True), (8.0, True)])
def test_a_table_that_is_not_learned_is_a_warning_with_the_remedy(offset: float, warned: bool):
    log_loss = CURVES["of an eps model"]
    warning = logvar_warning(log_loss + offset, log_loss, 1e-3)
    assert (warning is not None) == warned
    if warning is not None:
        assert "a higher --logvar_learning_rate than 0.001" in warning
        assert f"--logvar_init {log_loss.mean():.2g}" in warning


def test_only_measured_steps_count():
    log_loss = np.full(100, math.nan)
    assert math.isnan(logvar_distance(np.zeros(100), log_loss))
    assert logvar_warning(np.zeros(100), log_loss, 0.02) is None
    log_loss[::10] = -0.5
    assert logvar_distance(np.zeros(100), log_loss) == pytest.approx(0.5)

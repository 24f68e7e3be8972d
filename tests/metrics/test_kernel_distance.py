"""Kernel distance against sums over all pairs, torchmetrics, and moments of Gaussians."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers.metric_cases import covered, golden_features

from diffusers_ddpm_ext.metrics import kernel_distance as module
from diffusers_ddpm_ext.metrics.kernel_distance import estimate_kernel_distance, kernel_distance

TORCHMETRICS_KID = 0.06331533767257813
"""`poly_mmd` of torchmetrics 1.9 for the first 40 of each of `golden_features`, in float64."""


def by_pairs(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    of_x = np.mean([kernel(a, b) for a, b in itertools.permutations(x, 2)])
    of_y = np.mean([kernel(a, b) for a, b in itertools.permutations(y, 2)])
    return float(of_x + of_y - 2 * np.mean([kernel(a, b) for a in x for b in y]))


@pytest.mark.parametrize("entries", [2**23, 70])
def test_it_is_a_mean_over_pairs(entries, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ENTRIES", entries)  # the second: three rows at a time
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((17, 5)), 0.4 + rng.standard_normal((23, 5))
    assert kernel_distance(x, y) == pytest.approx(by_pairs(x, y), rel=1e-12)
    assert estimate_kernel_distance(x, y).value == pytest.approx(by_pairs(x, y), rel=1e-12)


def test_torchmetrics_of_recorded_features():
    x, y = golden_features()
    assert kernel_distance(x, y[:40]) == pytest.approx(TORCHMETRICS_KID, rel=1e-9)


def test_torchmetrics():
    kid = pytest.importorskip("torchmetrics.image.kid")
    x, y = (torch.from_numpy(features[:40]) for features in golden_features())
    assert float(kid.poly_mmd(y, x)) == pytest.approx(TORCHMETRICS_KID, rel=1e-9)


def moments(mean: np.ndarray, scale: float) -> list[np.ndarray]:
    """E x, E x x and E x x x (outer products) of a Gaussian with this standard deviation along all axes."""
    spread = scale**2 * np.eye(len(mean))
    mixed = np.einsum("i,jk->ijk", mean, spread)
    third = np.einsum("i,j,k->ijk", mean, mean, mean)
    return [mean, np.outer(mean, mean) + spread, third + mixed + mixed.transpose(1, 0, 2) + mixed.transpose(1, 2, 0)]


def test_intervals_cover_the_distance_of_two_gaussians():
    """E (a b / D + 1)^3 expands into products of moments. 200 resamplings."""
    rng, d = np.random.default_rng(1), 4
    pairs = zip(moments(np.full(d, 0.5), 0.9), moments(np.zeros(d), 1.0), strict=True)
    truth = sum(w / d**p * ((a - b) ** 2).sum() for (a, b), w, p in zip(pairs, (3, 3, 1), (1, 2, 3), strict=True))
    estimates = [
        estimate_kernel_distance(0.5 + 0.9 * rng.standard_normal((150, d)), rng.standard_normal((200, d)))
        for _ in range(200)
    ]
    assert np.mean([each.value for each in estimates]) == pytest.approx(truth, rel=0.05)
    assert 0.90 <= covered(estimates, truth) <= 0.98


def test_no_bias_between_sets_of_one_distribution():
    """Few images: a biased estimate would be positive. The intervals are wider than needed here."""
    rng = np.random.default_rng(2)
    estimates = [
        estimate_kernel_distance(rng.standard_normal((24, 8)), rng.standard_normal((24, 8))) for _ in range(200)
    ]
    values = np.array([each.value for each in estimates])
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(200)
    assert covered(estimates, 0.0) >= 0.90


def test_a_refusal():
    with pytest.raises(ValueError, match="at least 4 are needed"):
        estimate_kernel_distance(np.zeros((3, 2)), np.zeros((9, 2)))

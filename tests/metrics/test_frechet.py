"""Frechet distance against SciPy's root of a matrix, torchmetrics and closed forms of Gaussians."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.metric_cases import covered, golden_features
from scipy.linalg import sqrtm

from diffusers_ddpm_ext.metrics.frechet import estimate_frechet, frechet_distance

TORCHMETRICS_FD = 0.7229806019337612
"""`FrechetInceptionDistance` of torchmetrics 1.9 for `golden_features`, in float64."""


def by_sqrtm(x: np.ndarray, y: np.ndarray) -> float:
    s, r = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + r - 2 * sqrtm(s @ r).real))


@pytest.mark.parametrize(("n", "m", "d"), [(200, 150, 12), (60, 400, 30)])
def test_it_is_the_formula_with_a_root_of_the_matrix(n, m, d):
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((d, d))
    x, y = rng.standard_normal((n, d)) @ mix, 0.5 + rng.standard_normal((m, d)) * 1.3
    assert frechet_distance(x, y) == pytest.approx(by_sqrtm(x, y), rel=1e-9)


def test_fewer_images_than_features():
    """SciPy's root of a singular matrix is inexact; the oracle has the inner products of centered images."""
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((20, 64)), 0.3 + rng.standard_normal((30, 64))
    a, b = x - x.mean(0), y - y.mean(0)
    roots = np.sqrt(np.maximum(np.linalg.eigvalsh(a @ b.T @ b @ a.T) / 19 / 29, 0)).sum()
    trace = (a**2).sum() / 19 + (b**2).sum() / 29
    assert frechet_distance(x, y) == pytest.approx(((x.mean(0) - y.mean(0)) ** 2).sum() + trace - 2 * roots, rel=1e-6)


def test_torchmetrics_of_recorded_features():
    assert frechet_distance(*golden_features()) == pytest.approx(TORCHMETRICS_FD, rel=1e-9)


def test_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")

    class Same(torch.nn.Module):
        num_features = 6

        def forward(self, features):
            return features

    x, y = (torch.from_numpy(features) for features in golden_features())
    metric = fid.FrechetInceptionDistance(feature=Same(), normalize=True).set_dtype(torch.float64)
    metric.update(y, real=True)
    metric.update(x, real=False)
    assert float(metric.compute()) == pytest.approx(TORCHMETRICS_FD, rel=1e-6)


def test_gaussians_of_known_moments():
    """Features with exactly these moments, whose covariances commute: a sum over the axes."""
    rng = np.random.default_rng(2)
    raw = rng.standard_normal((300, 5))
    white = np.linalg.qr(raw - raw.mean(0))[0] * np.sqrt(299)
    scales, shift = np.array([1.0, 2.0, 0.5, 3.0, 1.5]), np.array([0.0, 1.0, -1.0, 0.5, 2.0])
    expected = (shift**2).sum() + ((scales - 1) ** 2).sum()
    assert frechet_distance(white * scales + shift, white) == pytest.approx(expected, abs=1e-10)
    assert frechet_distance(white, white[::-1]) == pytest.approx(0, abs=1e-10)


def test_rotations_and_shifts_change_nothing_and_scale_is_squared():
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((50, 8)), rng.standard_normal((70, 8)) * 2
    turn = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    value = frechet_distance(x, y)
    assert frechet_distance(x @ turn + 5, y @ turn + 5) == pytest.approx(value)
    assert frechet_distance(y, x) == pytest.approx(value)
    assert frechet_distance(3 * x, 3 * y) == pytest.approx(9 * value)


def test_intervals_cover_and_the_extrapolation_removes_the_bias():
    """200 resamplings; the truth of `fd` is its mean, that of the extrapolation the distance of the distributions."""
    rng = np.random.default_rng(4)
    d, truth = 6, 6 * 0.4**2 + 6 * 0.2**2
    estimates = [
        estimate_frechet(0.4 + 0.8 * rng.standard_normal((120, d)), rng.standard_normal((150, d))) for _ in range(200)
    ]
    plain, extrapolated = [e.fd for e in estimates], [e.extrapolated for e in estimates]
    average = np.mean([e.value for e in plain])
    assert 0.90 <= covered(plain, average) <= 0.98
    assert 0.90 <= covered(extrapolated, truth) <= 0.98
    assert average > truth + 0.1  # the bias, which the extrapolation lacks
    assert np.mean([e.value for e in extrapolated]) == pytest.approx(truth, abs=0.05)


def test_tensors_of_any_precision_and_more_confidence():
    x, y = golden_features()
    tensors = torch.from_numpy(x), torch.from_numpy(y).requires_grad_()
    narrow, wide = estimate_frechet(*tensors, confidence=0.5), estimate_frechet(x, y, confidence=0.99)
    assert narrow.fd.value == wide.fd.value == pytest.approx(TORCHMETRICS_FD, rel=1e-9)
    assert wide.fd.low < narrow.fd.low < narrow.fd.high < wide.fd.high
    assert frechet_distance(tensors[0].float(), y) == pytest.approx(TORCHMETRICS_FD, rel=1e-5)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), "samples has the features of 1 images: at least 4"),
        (np.zeros((5, 3)), np.zeros((5, 4)), "samples has 3 features an image and reference 4"),
        (np.full((5, 3), np.nan), np.zeros((5, 3)), "samples must be finite: the features of image 0"),
        (np.zeros((5, 3)), np.zeros((5, 3, 2)), "reference=ndarray of float64, shape"),
        (np.zeros((5, 3), complex), np.zeros((5, 3)), "samples=ndarray of complex128"),
    ],
)
def test_what_is_no_pair_of_features(x, y, message):
    with pytest.raises(ValueError, match=message):
        estimate_frechet(x, y)


def test_a_confidence_is_between_0_and_1():
    with pytest.raises(ValueError, match="confidence=1 must be between 0 and 1"):
        estimate_frechet(*golden_features(), confidence=1)

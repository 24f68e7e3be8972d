"""Precision, recall, density and coverage against loops that follow the papers' definitions."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.metric_cases import covered

from diffusers_ddpm_ext.metrics import distances
from diffusers_ddpm_ext.metrics.manifolds import estimate_manifolds, manifold_metrics


def by_definition(x: np.ndarray, y: np.ndarray, k: int) -> dict[str, float]:
    def radius(points: np.ndarray, i: int) -> float:
        return sorted(float(np.linalg.norm(points[i] - p)) for j, p in enumerate(points) if j != i)[k - 1]

    def in_ball(points: np.ndarray, radii: list[float], other: np.ndarray) -> list[bool]:
        return [float(np.linalg.norm(p - other)) <= r for p, r in zip(points, radii, strict=True)]

    radii_x, radii_y = ([radius(points, i) for i in range(len(points))] for points in (x, y))
    around = [in_ball(y, radii_y, sample) for sample in x]
    return {
        "precision": float(np.mean([any(balls) for balls in around])),
        "recall": float(np.mean([any(in_ball(x, radii_x, image)) for image in y])),
        "density": float(np.mean([sum(balls) / k for balls in around])),
        "coverage": float(np.mean(np.any(around, axis=0))),
    }


@pytest.mark.parametrize("entries", [2**23, 100])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_they_are_the_papers_definitions(k, entries, monkeypatch):
    monkeypatch.setattr(distances, "BLOCK_ENTRIES", entries)  # the second: two rows at a time
    rng = np.random.default_rng(k)
    x, y = 0.4 + 0.7 * rng.standard_normal((35, 3)), rng.standard_normal((42, 3))
    expected = by_definition(x, y, k)
    assert manifold_metrics(x, y, k) == pytest.approx(expected)
    estimate = estimate_manifolds(x, y, k)
    assert {name: getattr(estimate, name).value for name in expected} == pytest.approx(expected)
    assert 0 < expected["recall"] < 1


def test_integers_with_ties_and_copies_far_from_the_origin():
    """Distances that are equal are equal after rounding, too; an image's copy is its neighbor at distance 0."""
    rng = np.random.default_rng(7)
    x, y = rng.integers(0, 3, (30, 2)).astype(float), rng.integers(0, 3, (40, 2)).astype(float)
    assert manifold_metrics(x * 0.1 + 1e3, y * 0.1 + 1e3, 5) == pytest.approx(by_definition(x, y, 5))


def test_the_same_images_and_others_far_away():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((30, 4))
    assert manifold_metrics(x, x.copy()) == pytest.approx(
        {"precision": 1, "recall": 1, "density": by_definition(x, x, 5)["density"], "coverage": 1}
    )
    assert set(manifold_metrics(x + 100, x).values()) == {0}
    sure = estimate_manifolds(x + 100, x).precision
    assert sure.value == sure.low == 0 < sure.high < 0.3  # Wilson's interval has a width all the same


def test_intervals_cover():
    """200 resamplings; the truth is the average at these numbers of images."""
    rng = np.random.default_rng(1)
    estimates = [
        estimate_manifolds(0.3 + 0.9 * rng.standard_normal((80, 3)), rng.standard_normal((90, 3))) for _ in range(200)
    ]
    for name in ("precision", "recall", "density", "coverage"):
        values = [getattr(each, name) for each in estimates]
        assert 0.90 <= covered(values, np.mean([each.value for each in values])) <= 0.98, name


@pytest.mark.parametrize(("k", "message"), [(0, "nearest=0 must be"), (1.5, "nearest=1.5"), (20, "at least 42")])
def test_refusals(k, message):
    with pytest.raises(ValueError, match=message):
        estimate_manifolds(np.zeros((30, 2)), np.zeros((30, 2)), k)

"""The scripts of benchmarks/latents: their distances, and which pictures they draw."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import numpy as np
import pytest
from helpers.paths import ROOT

FOLDER = ROOT / "benchmarks" / "latents"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"latents_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_frechet_distance_of_independent_coordinates():
    """Diagonal covariances commute: the sum of (difference of means)^2 and (difference of deviations)^2."""
    distances = script("distances")
    a = distances.Moments(np.array([0.0, 1.0]), np.diag([4.0, 9.0]))
    b = distances.Moments(np.array([1.0, -1.0]), np.diag([1.0, 25.0]))
    assert distances.frechet(a, b) == pytest.approx(1 + 4 + (2 - 1) ** 2 + (3 - 5) ** 2)
    assert distances.frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_kernel_distance_is_unbiased():
    """Its mean over many pairs of small sets of one distribution is zero, far closer than that of the biased one."""
    distances, draw = script("distances"), np.random.default_rng(0)
    values = [distances.kernel_distance(draw.normal(size=(8, 2)), draw.normal(size=(8, 2))) for _ in range(2000)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))
    assert distances.kernel_distance(draw.normal(size=(8, 2)), draw.normal(2, 1, size=(8, 2))) > 1


def test_the_jackknife_of_a_mean_is_its_standard_error():
    distances, rows = script("distances"), np.random.default_rng(1).normal(size=1600)
    means = rows.reshape(100, 16).mean(0)
    expected = distances.T_95 * means.std(ddof=1) / 4
    assert distances.jackknife(lambda part: float(part.mean()), rows) == pytest.approx(expected)


LIST = """# group: Smileys & Emotion
# subgroup: face-smiling
1F600                                      ; fully-qualified     # x E1.0 grinning face
263A                                       ; unqualified         # x E0.6 smiling face
# group: People & Body
1F44B 1F3FB                                ; fully-qualified     # x E1.0 waving hand: light skin tone
1F469 200D 1F692                           ; fully-qualified     # x E4.0 woman firefighter
# group: Component
1F3FB                                      ; component           # x E1.0 light skin tone
"""


def test_the_list_gives_groups_and_leaves_skin_tones_out():
    assert list(script("emoji").read_list(LIST)) == [
        ("Smileys & Emotion", "grinning face", "\U0001f600"),
        ("People & Body", "woman firefighter", "\U0001f469\u200d\U0001f692"),
    ]

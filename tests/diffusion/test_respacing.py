"""Which steps a shorter chain keeps: always K of them, and Diffusers' own wherever Diffusers' are right."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers import DDPMScheduler

from diffusers_ddpm_ext.diffusion.respacing import TIMESTEP_SPACINGS, custom_timesteps, spaced_timesteps


def is_a_chain(steps: np.ndarray, count: int, total: int) -> bool:
    return len(steps) == count and (np.diff(steps) < 0).all() and steps[-1] >= 0 and steps[0] < total


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("total", [1, 2, 3, 10, 61, 128, 999, 1000])
def test_every_count_gives_a_chain(spacing, total):
    for count in range(1, total + 1):
        steps = spaced_timesteps(count, total, spacing)
        assert is_a_chain(steps, count, total), (spacing, count, steps)
        assert steps.dtype == np.int64


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_stock_where_stock_is_right(spacing):
    stock = DDPMScheduler(timestep_spacing=spacing)
    wrong = 0
    for count in range(1, 1001):
        stock.set_timesteps(count)
        theirs = stock.timesteps.numpy()
        if is_a_chain(theirs, count, 1000):
            np.testing.assert_array_equal(spaced_timesteps(count, 1000, spacing), theirs)
        else:
            wrong += 1
    assert wrong == (62 if spacing == "trailing" else 0)


@pytest.mark.parametrize("count", [61, 998])
def test_trailing_reaches_no_step_below_zero(count):
    """The counts at which the division's rounding adds a step -1 to stock's list."""
    steps = spaced_timesteps(count, 1000, "trailing")
    assert steps[0] == 999
    exact = [round(1000 * (count - i) / count) - 1 for i in range(count)]
    assert np.abs(steps - exact).max() <= 1  # ties may round either way


def test_spacings_by_hand():
    assert spaced_timesteps(5, 10, "leading").tolist() == [8, 6, 4, 2, 0]
    assert spaced_timesteps(5, 10, "leading", 1).tolist() == [9, 7, 5, 3, 1]
    assert spaced_timesteps(5, 10, "trailing").tolist() == [9, 7, 5, 3, 1]
    assert spaced_timesteps(4, 10, "linspace").tolist() == [9, 6, 3, 0]
    assert spaced_timesteps(5, 10, "trailing", 3).tolist() == [9, 7, 5, 3, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1000), "num_inference_steps=0"),
        ((-3, 1000), "num_inference_steps=-3"),
        ((1001, 1000), "num_inference_steps=1001"),
        ((2.5, 1000), "num_inference_steps=2.5"),
        ((True, 1000), "num_inference_steps=True"),
        ((10, 1000, "sideways"), "timestep_spacing='sideways'"),
        ((1000, 1000, "leading", 1), "steps_offset=1"),
        ((10, 1000, "leading", -1), "steps_offset=-1"),
        ((10, 1000, "leading", 0.5), "steps_offset=0.5"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        spaced_timesteps(*arguments)


def test_custom_steps_pass():
    assert custom_timesteps([99, 5, 0], 100).tolist() == [99, 5, 0]
    assert custom_timesteps(np.array([7.0, 3.0]), 100).tolist() == [7, 3]
    assert custom_timesteps((4,), 5).dtype == np.int64


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "at least one"),
        ([[3, 2]], "shape"),
        ([3, 3, 1], "descending"),
        ([1, 2], "descending"),
        ([100, 1], "in \\[0, 100\\)"),
        ([4, -1], "in \\[0, 100\\)"),
        ([4.5, 1], "integers"),
        (["a", "b"], "integers"),
        ([float("nan")], "integers"),
    ],
)
def test_custom_steps_refused(steps, message):
    with pytest.raises(ValueError, match=message):
        custom_timesteps(steps, 100)

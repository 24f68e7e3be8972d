"""The search for few steps: against all choices of steps where there are few, and on positions of every kind."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from diffusers_ddpm_ext.diffusion.respacing import TIMESTEP_SPACINGS, spaced_timesteps
from diffusers_ddpm_ext.diffusion.schedule import NoiseSchedule
from diffusers_ddpm_ext.diffusion.step_fit import fit_steps, interpolate_steps, most_calls

STD = 0.3


def gaussian_error(schedule: NoiseSchedule):
    """Relative error of the standard deviation that DDIM gives a Gaussian of deviation 0.3; each step is a factor."""

    def error(steps: tuple[int, ...]) -> float:
        abar, scale = schedule.alphas_cumprod, 1.0
        for t, below in itertools.pairwise([*steps, -1]):
            now, then = abar[t], 1.0 if below < 0 else abar[below]
            x0 = now**0.5 * STD**2 / (now * STD**2 + 1 - now)  # of the exact denoiser, per unit of x_t
            scale *= then**0.5 * x0 + (1 - then) ** 0.5 * (1 - now**0.5 * x0) / (1 - now) ** 0.5
        return abs(scale / STD - 1)

    return error


def counted(error):
    calls = []

    def function(steps):
        calls.append(len(steps))
        return error(steps)

    return function, calls


@pytest.mark.parametrize("count", [1, 2, 3])
def test_nearly_the_best_of_all_choices(count):
    """In the rank of all choices of K of 24 steps, the result is among the best 2 % (or is the best one)."""
    error = gaussian_error(NoiseSchedule(24, 0.004, 0.4))
    every = sorted(error(steps[::-1]) for steps in itertools.combinations(range(24), count))
    fit = fit_steps(error, count, 24)
    assert fit.error <= every[len(every) // 50]
    assert fit.error == error(fit.steps)
    even = min(error(tuple(spaced_timesteps(count, 24, spacing).tolist())) for spacing in TIMESTEP_SPACINGS)
    assert fit.error_even == even
    assert fit.error < even


@pytest.mark.parametrize(("count", "total"), [(1, 1), (3, 3), (5, 1000), (6, 50), (7, 50), (20, 1000), (50, 50)])
def test_steps_are_a_chain_and_the_cost_is_bounded(count, total):
    target = np.linspace(0.7 * total, 0.02 * total, count)
    error, calls = counted(lambda steps: float(np.abs(steps - target).sum() if len(steps) == count else sum(steps)))
    fit = fit_steps(error, count, total)
    assert len(fit.steps) == count
    assert all(total > above > below >= 0 for above, below in itertools.pairwise(fit.steps))
    assert sum(calls) <= most_calls(count) + 3 * count
    assert fit == fit_steps(error, count, total)
    if count == total:
        assert fit.steps == tuple(range(count))[::-1]


def test_a_start_is_used():
    """An error without slope but at the start's own density: only the interpolated start finds it."""
    start = (700, 650, 600, 550, 90)
    wanted = interpolate_steps(start, 10, 1000)
    fit = fit_steps(lambda steps: float(steps != wanted), 10, 1000, start)
    assert fit.steps == wanted
    assert fit.error == 0


def test_interpolation_keeps_the_density():
    rng = np.random.default_rng(0)
    for _ in range(200):
        total = int(rng.integers(1, 60))
        count, other = (int(value) for value in rng.integers(1, total + 1, 2))
        steps = tuple(int(step) for step in sorted(rng.choice(total, count, replace=False))[::-1])
        assert interpolate_steps(steps, count, total) == steps
        result = interpolate_steps(steps, other, total)
        assert len(result) == other
        assert all(total > above > below >= 0 for above, below in itertools.pairwise((*result, -1)[:-1]))
        assert result[-1] >= 0
    trailing = tuple(spaced_timesteps(5, 1000, "trailing").tolist())
    assert interpolate_steps(trailing, 10, 1000) == tuple(spaced_timesteps(10, 1000, "trailing").tolist())


@pytest.mark.parametrize("count", [0, 11])
def test_the_number_of_steps_is_checked(count):
    with pytest.raises(ValueError, match=rf"num_inference_steps={count} must be in \[1, 10\]"):
        fit_steps(lambda steps: 0.0, count, 10)

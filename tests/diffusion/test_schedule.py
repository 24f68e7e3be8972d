"""Noise schedules: against Diffusers' tables, against definitions, and at the borders of what is allowed."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers import DDPMScheduler

from diffusers_ddpm_ext.diffusion.schedule import TABLE_NAMES, NoiseSchedule, make_betas
from diffusers_ddpm_ext.diffusion.variance_fit import VarianceMeter
from diffusers_ddpm_ext.utils.vocabulary import BETA_SCHEDULES


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
@pytest.mark.parametrize("steps", [7, 100, 1000])
def test_names_mean_what_diffusers_means(name, steps):
    stock = DDPMScheduler(num_train_timesteps=steps, beta_schedule=name, beta_start=0.0005, beta_end=0.015)
    ours = make_betas(name, steps, 0.0005, 0.015)
    assert np.abs(ours - stock.betas.double().numpy()).max() < 2e-7


def test_sqrt_is_the_root_of_linear():
    np.testing.assert_allclose(make_betas("sqrt", 50, 0.01, 0.2) ** 2, np.linspace(0.01, 0.2, 50), rtol=1e-14)


@pytest.mark.parametrize("s", [0.001, 0.008, 0.05])
def test_cosine_telescopes_to_its_definition(s):
    """The product of 1 - beta over the first half must be f(1/2) / f(0), for any number of steps."""
    f = lambda u: np.cos((u + s) / (1 + s) * np.pi / 2) ** 2  # noqa: E731
    for steps in (10, 1000):
        abar = np.cumprod(1 - make_betas("squaredcos_cap_v2", steps, cosine_s=s))
        assert abar[steps // 2 - 1] == pytest.approx(f(0.5) / f(0.0), rel=1e-12)


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_tables_satisfy_their_algebra(name):
    schedule = NoiseSchedule(200, 0.001, 0.05, name, v_posterior=0.3)
    abar, prev = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    np.testing.assert_allclose(schedule.sqrt_alphas_cumprod**2 + schedule.sqrt_one_minus_alphas_cumprod**2, 1)
    np.testing.assert_allclose(schedule.sqrt_recip_alphas_cumprod * schedule.sqrt_alphas_cumprod, 1)
    np.testing.assert_allclose(schedule.snr * schedule.sqrt_recipm1_alphas_cumprod**2, 1, rtol=1e-9)
    np.testing.assert_allclose(prev * schedule.alphas, abar, rtol=1e-12)
    # a clean sample of 1 without noise stays on the mean's path: c1 + ct * sqrt(A) = sqrt(P)
    path = schedule.posterior_mean_coef1 + schedule.posterior_mean_coef2 * schedule.sqrt_alphas_cumprod
    np.testing.assert_allclose(path, np.sqrt(prev), rtol=1e-10)


def test_v_posterior_runs_from_the_posterior_to_the_forward_step():
    schedule = NoiseSchedule(100, 0.001, 0.05)
    small, large = (schedule.with_v_posterior(v).posterior_variance for v in (0, 1))
    np.testing.assert_array_equal(large, schedule.betas)
    assert small[0] == 0
    assert (small < large).all()
    np.testing.assert_allclose(schedule.with_v_posterior(0.25).posterior_variance, 0.75 * small + 0.25 * large)


def test_zero_terminal_snr_follows_the_paper():
    """[ZTSNR] algorithm 1: the first step stays, the last has no signal, roots of abar are shifted and scaled."""
    plain, zero = NoiseSchedule(100, 0.001, 0.05), NoiseSchedule(100, 0.001, 0.05, rescale_betas_zero_snr=True)
    assert zero.betas[-1] == 1
    assert zero.zero_terminal_snr
    assert not plain.zero_terminal_snr
    assert zero.betas[0] == pytest.approx(plain.betas[0], rel=1e-12)
    root, first, last = plain.sqrt_alphas_cumprod, plain.sqrt_alphas_cumprod[0], plain.sqrt_alphas_cumprod[-1]
    np.testing.assert_allclose(zero.sqrt_alphas_cumprod, (root - last) * first / (first - last), atol=1e-14)
    again = NoiseSchedule(trained_betas=zero.betas, rescale_betas_zero_snr=True)
    np.testing.assert_allclose(again.betas, zero.betas, atol=1e-12)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_one_step_is_a_chain(prediction_type):
    schedule = NoiseSchedule(1, 0.1, 0.1, prediction_type=prediction_type)
    assert len(schedule) == 1
    for name in TABLE_NAMES:
        assert np.isfinite(getattr(schedule, name)).all(), name


def test_respaced_chain_is_the_chain_of_its_own_betas():
    full = NoiseSchedule(100, 0.001, 0.05, v_posterior=0.4)
    kept = full.respaced([90, 10, 55, 0])
    alone = NoiseSchedule(trained_betas=kept.betas, v_posterior=0.4)
    np.testing.assert_array_equal(kept.timesteps, [0, 10, 55, 90])
    np.testing.assert_array_equal(kept.alphas_cumprod, full.alphas_cumprod[[0, 10, 55, 90]])
    for name in TABLE_NAMES[:-1]:
        np.testing.assert_allclose(getattr(kept, name), getattr(alone, name), rtol=1e-10, err_msg=name)
    for name in TABLE_NAMES:
        np.testing.assert_array_equal(getattr(full.respaced(range(100)), name), getattr(full, name), err_msg=name)


def test_tables_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        NoiseSchedule(10).betas[0] = 0.5


def test_given_betas_are_not_shared():
    mine = np.array([0.1, 0.2])
    schedule = NoiseSchedule(trained_betas=mine)
    mine[0] = 0.9
    assert schedule.betas[0] == 0.1


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"beta_schedule": "cosine"}, "beta_schedule"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"num_train_timesteps": 2.5}, "num_train_timesteps"),
        ({"num_train_timesteps": True}, "num_train_timesteps"),
        ({"beta_start": 0.0}, "beta_start"),
        ({"beta_end": 1.0}, "beta_end"),
        ({"beta_start": float("nan")}, "beta_start"),
        ({"beta_schedule": "squaredcos_cap_v2", "cosine_s": -0.1}, "cosine_s"),
        ({"trained_betas": []}, "trained_betas"),
        ({"trained_betas": [[0.1, 0.2]]}, "trained_betas"),
        ({"trained_betas": [0.1, 1.0, 0.2]}, "step 1"),
        ({"trained_betas": [0.1, 1.5]}, "step 1"),
        ({"trained_betas": [float("nan"), 0.5]}, "step 0"),
        ({"v_posterior": -0.1}, "v_posterior"),
        ({"v_posterior": 1.1}, "v_posterior"),
        ({"v_posterior": None}, "v_posterior"),
        ({"v_posterior": float("nan")}, "v_posterior"),
        ({"prediction_type": "eps"}, "prediction_type"),
        ({"num_train_timesteps": 1, "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
    ],
)
def test_what_is_not_allowed_is_named(arguments, name):
    with pytest.raises(ValueError, match=name):
        NoiseSchedule(**arguments)


@pytest.mark.parametrize("steps", [[], [3, 3], [-1, 2], [10]])
def test_respacing_refuses_steps_that_are_not_there(steps):
    with pytest.raises(ValueError, match="timesteps"):
        NoiseSchedule(10).respaced(steps)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_train_timesteps": 100_000},
        {"num_train_timesteps": 2000, "beta_start": 0.5, "beta_end": 0.5},
        {"trained_betas": [0.999] * 200},
        {"trained_betas": np.append(np.full(300, 0.999), 1.0)},
    ],
)
def test_betas_that_leave_no_signal_are_refused(arguments):
    """A product below the range of float64 is 0 or sticks at the smallest number: a shorter chain would be 0 / 0."""
    with pytest.raises(ValueError, match=r"^num_train_timesteps=\d+ with these betas leaves no signal"):
        NoiseSchedule(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_train_timesteps": 10**9},
        {"num_train_timesteps": 100_001, "beta_schedule": "squaredcos_cap_v2"},
        {"num_train_timesteps": 10**18, "beta_schedule": "laplace"},
        {"trained_betas": np.broadcast_to(1e-4, 10**9)},
    ],
)
def test_chains_of_absurd_length_are_refused_before_memory_is_spent(arguments):
    with pytest.raises(ValueError, match="100000"):
        NoiseSchedule(**arguments)


def test_the_longest_chain_is_whole():
    schedule = NoiseSchedule(100_000, 1e-6, 1e-4)
    assert np.isfinite(schedule.lvlb_weights).all()
    with pytest.raises(ValueError, match="at most 5000"):
        VarianceMeter(schedule)


@pytest.mark.parametrize(
    "arguments",
    [
        {"trained_betas": [1e-20, 0.5]},
        {"trained_betas": [1e-13, 1e-13]},
        {"trained_betas": [0.1, 5e-324]},
        {"num_train_timesteps": 5, "beta_start": 1e-30},
        {"num_train_timesteps": 5, "beta_start": 1e-20, "beta_schedule": "sigmoid", "beta_end": 1e-19},
    ],
)
def test_betas_that_add_no_noise_are_refused(arguments):
    """1 - beta is 1 in float64: the first step would have no noise at all, and its tables 0 / 0."""
    with pytest.raises(
        ValueError, match=r"(trained_betas|beta_schedule): beta .* of step \d must be between 1e-12 and 1"
    ):
        NoiseSchedule(**arguments)

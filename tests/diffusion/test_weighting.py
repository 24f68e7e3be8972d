"""Weights against torch's KL divergence in float64, the SNR identity, and equality across parameterizations."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffusers_ddpm_ext.diffusion.schedule import NoiseSchedule
from diffusers_ddpm_ext.diffusion.weighting import WEIGHTINGS, elbo_weights, loss_weights, min_snr_weights
from diffusers_ddpm_ext.utils.vocabulary import PREDICTION_TYPES

CHAINS = {
    "linear": {"num_train_timesteps": 1000},
    "scaled_linear": {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear"},
    "cosine": {"num_train_timesteps": 200, "beta_schedule": "squaredcos_cap_v2"},
    "short": {"num_train_timesteps": 7, "beta_start": 0.01, "beta_end": 0.6},
    "zero_snr": {"num_train_timesteps": 100, "rescale_betas_zero_snr": True},
}
FINITE = [(c, p) for c in CHAINS for p in PREDICTION_TYPES if (c, p) != ("zero_snr", "epsilon")]


def gathered(schedule: NoiseSchedule) -> tuple[np.ndarray, ...]:
    """b, a, A, P and the exact posterior's variance, from the kept alphas_cumprod alone."""
    abar = np.array(schedule.alphas_cumprod)
    prev = np.append(1.0, abar[:-1])
    a = abar / prev
    b = 1 - a
    return b, a, abar, prev, b * (1 - prev) / (1 - abar)


def kl_excess(schedule: NoiseSchedule, t: int) -> tuple[float, float]:
    """KL(q || p) of one reverse step minus its value without error, and the squared error, by torch.distributions."""
    generator = torch.Generator().manual_seed(t)
    x0, eps, error = (torch.randn(64, generator=generator, dtype=torch.float64) for _ in range(3))
    b, a, abar, prev, exact = gathered(schedule)
    v = schedule.v_posterior
    model = (1 - v) * exact[t] + v * b[t]
    root, noise = abar[t] ** 0.5, (1 - abar[t]) ** 0.5
    xt = root * x0 + noise * eps
    of_x0 = {
        "sample": lambda output: output,
        "epsilon": lambda output: (xt - noise * output) / root,
        "v_prediction": lambda output: root * xt - noise * output,
    }[schedule.prediction_type]
    target = {"sample": x0, "epsilon": eps, "v_prediction": root * eps - noise * x0}[schedule.prediction_type]

    def mean(clean: torch.Tensor) -> torch.Tensor:
        return (b[t] * prev[t] ** 0.5 * clean + (1 - prev[t]) * a[t] ** 0.5 * xt) / (1 - abar[t])

    q = Normal(mean(x0), exact[t] ** 0.5)
    p = Normal(mean(of_x0(target + error)), model**0.5)
    floor = Normal(mean(x0), model**0.5)
    excess = (kl_divergence(q, p) - kl_divergence(q, floor)).sum()
    return float(excess), float((error**2).sum())


def steps_of(schedule: NoiseSchedule) -> list[int]:
    last = len(schedule) - 1
    return sorted({t for t in (1, 2, 10, last // 3, last // 2, last - 1, last) if 1 <= t <= last})


@pytest.mark.parametrize(("chain", "prediction_type"), FINITE)
@pytest.mark.parametrize("v_posterior", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kept", [None, 5])
def test_exact_weight_is_the_kl_per_squared_error(chain, prediction_type, v_posterior, kept):
    schedule = NoiseSchedule(**CHAINS[chain], v_posterior=v_posterior, prediction_type=prediction_type)
    if kept:
        schedule = schedule.respaced(np.linspace(0, len(schedule) - 1, kept).round().astype(int))
    weights = elbo_weights(schedule)
    assert weights.shape == (len(schedule),)
    assert weights.dtype == np.float64
    for t in steps_of(schedule):
        excess, square = kl_excess(schedule, t)
        assert weights[t] * square == pytest.approx(excess, rel=1e-7)


def test_x0_weight_is_half_the_loss_of_snr():
    """[VDM]: at v_posterior 0 the bound's weight of the clean sample is half the SNR lost in the step."""
    schedule = NoiseSchedule(1000, prediction_type="sample")
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    np.testing.assert_allclose(elbo_weights(schedule)[1:], 0.5 * (snr[:-1] - snr[1:]), rtol=1e-10)


def test_published_figures_of_the_linear_schedule():
    at = [1, 10, 100, 500, 999]
    schedule = NoiseSchedule(1000, beta_schedule="scaled_linear")
    for name, expected in (
        ("sample", [2533, 45.54, 0.3193, 0.002145, 7.5e-6]),
        ("epsilon", [0.5133, 0.05703, 0.009477, 0.00433, 0.01021]),
        ("v_prediction", [0.5132, 0.05696, 0.009204, 0.001435, 7.5e-6]),
    ):
        np.testing.assert_allclose(elbo_weights(schedule.with_prediction_type(name))[at], expected, rtol=1e-2)


@pytest.mark.parametrize("v_posterior", [0.0, 1e-3, 0.3, 1.0])
@pytest.mark.parametrize("length", [1, 2, 50])
def test_first_step(length, v_posterior):
    """The model's last denoising step has mean x0 and variance S, so the weight of the x0 error is 1 / (2 S)."""
    betas = np.linspace(0.01, 0.2, length)
    schedule = NoiseSchedule(trained_betas=betas, v_posterior=v_posterior)
    if v_posterior > 0:
        variance = v_posterior * betas[0]
    elif length == 1:
        variance = betas[0]
    else:
        abar = np.cumprod(1 - betas)
        variance = betas[1] * (1 - abar[0]) / (1 - abar[1])
    expected = {
        "sample": 1 / (2 * variance),
        "epsilon": betas[0] / (2 * variance * (1 - betas[0])),
        "v_prediction": betas[0] / (2 * variance),
    }
    for name in PREDICTION_TYPES:
        weights = elbo_weights(schedule.with_prediction_type(name))
        assert weights[0] == pytest.approx(expected[name], rel=1e-10)
        assert np.isfinite(weights).all()


def test_compvis_table_is_the_schedules_own():
    for name in PREDICTION_TYPES:
        schedule = NoiseSchedule(20, prediction_type=name)
        weights = elbo_weights(schedule, "compvis")
        np.testing.assert_array_equal(weights, schedule.lvlb_weights)
        assert weights.dtype == np.float64
    assert (elbo_weights(NoiseSchedule(20, prediction_type="v_prediction"), "compvis") == 1).all()


def test_zero_terminal_snr_has_no_finite_weight_in_eps():
    weights = elbo_weights(NoiseSchedule(20, rescale_betas_zero_snr=True))
    assert np.isinf(weights[-1])
    assert np.isfinite(weights[:-1]).all()


def test_results_do_not_alias_the_schedule():
    schedule = NoiseSchedule(20, prediction_type="sample")
    for weights in (elbo_weights(schedule), elbo_weights(schedule, "compvis"), min_snr_weights(schedule)):
        weights[:] = 0
    assert (schedule.lvlb_weights > 0).all()
    assert (schedule.snr > 0).all()
    assert (schedule.posterior_variance[1:] > 0).all()


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize(
    "weights_of",
    [
        elbo_weights,
        min_snr_weights,
        *(partial(loss_weights, weighting=name) for name in ("min_snr", "soft_min_snr", "debiased", "elbo")),
        partial(loss_weights, weighting="p2", p2_k=0.5, p2_gamma=0.7),
    ],
)
def test_all_three_parameterizations_minimise_the_same_function(chain, weights_of):
    """The errors of one and the same clean sample: |x0|^2 = |eps|^2 / SNR = (1 - A) |v|^2."""
    schedule = NoiseSchedule(**CHAINS[chain], v_posterior=0.4)
    abar = schedule.alphas_cumprod
    x0, eps, v = (weights_of(schedule.with_prediction_type(name)) for name in ("sample", "epsilon", "v_prediction"))
    signal = abar > 0
    np.testing.assert_allclose(eps[signal], (x0 * (1 - abar) / np.maximum(abar, 1e-300))[signal], rtol=1e-7)
    np.testing.assert_allclose(v, x0 * (1 - abar), rtol=1e-9)


def test_min_snr_is_its_definition():
    schedule = NoiseSchedule(1000, prediction_type="sample")
    weights = min_snr_weights(schedule, 5.0)
    assert weights.max() == 5.0
    snr = np.array([1 / (1 / value - 1) for value in schedule.alphas_cumprod])
    np.testing.assert_allclose(weights, [min(value, 5.0) for value in snr], rtol=1e-9)
    assert (min_snr_weights(schedule.with_prediction_type("epsilon"), float("inf")) == 1).all()


@pytest.mark.parametrize("name", PREDICTION_TYPES)
def test_min_snr_is_finite_at_zero_terminal_snr(name):
    schedule = NoiseSchedule(100, rescale_betas_zero_snr=True, prediction_type=name)
    assert schedule.zero_terminal_snr
    weights = min_snr_weights(schedule)
    assert np.isfinite(weights).all()
    assert weights[-1] == (1 if name == "epsilon" else 0)


@pytest.mark.parametrize("gamma", [0, -1, 0.0, float("nan"), "5", True, None])
def test_gamma_out_of_range(gamma):
    with pytest.raises(ValueError, match="snr_gamma"):
        min_snr_weights(NoiseSchedule(10), gamma)


def test_unknown_kind():
    with pytest.raises(ValueError, match=r"elbo_weights='legacy'.*exact.*compvis"):
        elbo_weights(NoiseSchedule(10), "legacy")


def test_weightings_are_their_papers_formulas():
    schedule = NoiseSchedule(1000)
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    formulas = {
        "simple": np.ones(1000),
        "soft_min_snr": (snr * 5 / (snr + 5)) / snr,
        "p2": 1 / (1 + snr),
        "debiased": 1 / np.sqrt(snr),
        "min_snr": np.minimum(snr, 5) / snr,
        "elbo": elbo_weights(schedule),
        "compvis_elbo": schedule.lvlb_weights,
    }
    assert set(formulas) == set(WEIGHTINGS)
    for name, weights in formulas.items():
        np.testing.assert_allclose(loss_weights(schedule, name), weights, rtol=1e-9, err_msg=name)
    np.testing.assert_allclose(loss_weights(schedule, "p2", p2_k=2, p2_gamma=0.5), (2 + snr) ** -0.5, rtol=1e-9)
    assert (loss_weights(schedule, "p2", p2_gamma=0) == 1).all()


@pytest.mark.parametrize("name", ["simple", "min_snr", "soft_min_snr", "p2", "debiased"])
@pytest.mark.parametrize("space", ["sample", "v_prediction"])
def test_weightings_are_finite_at_zero_terminal_snr(name, space):
    schedule = NoiseSchedule(100, rescale_betas_zero_snr=True, prediction_type=space)
    weights = loss_weights(schedule, name)
    assert np.isfinite(weights).all()
    assert weights[-1] == (1 if name == "simple" else 0)


def test_unknown_weighting_and_bad_numbers():
    schedule = NoiseSchedule(10)
    with pytest.raises(ValueError, match=r"loss_weighting='snr' is unknown: choose one of simple"):
        loss_weights(schedule, "snr")
    for name, value in (("p2_k", 0.0), ("p2_k", -1.0), ("p2_gamma", -0.1), ("p2_gamma", float("nan")), ("p2_k", True)):
        with pytest.raises(ValueError, match=name):
            loss_weights(schedule, "p2", **{name: value})

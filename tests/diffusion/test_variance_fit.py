"""The measuring pass, on Gaussian data whose errors and decoder costs are known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_ddpm_ext import DDPMExtScheduler
from diffusers_ddpm_ext.diffusion.likelihood import bits_per_dim
from diffusers_ddpm_ext.diffusion.variance_fit import GRID, VarianceMeter, fit_logvar

S2 = 0.5
STEPS = 30


def denoiser_of(scheduler: DDPMExtScheduler):
    """The exact posterior mean of Gaussian data of variance S2, in the scheduler's parameterization."""
    table = torch.from_numpy(scheduler.schedule.alphas_cumprod.copy())

    def denoiser(xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        abar = table[t].reshape(-1, *(1,) * (xt.ndim - 1)).to(xt)
        x0 = S2 * abar.sqrt() / (S2 * abar + 1 - abar) * xt
        eps = (xt - abar.sqrt() * x0) / (1 - abar).sqrt()
        outputs = {"sample": x0, "epsilon": eps, "v_prediction": abar.sqrt() * eps - (1 - abar).sqrt() * x0}
        return outputs[scheduler.config.prediction_type]

    return denoiser


def images(count: int = 400) -> torch.Tensor:
    source = torch.Generator().manual_seed(5)
    return S2**0.5 * torch.randn(count, 1, 8, 8, generator=source, dtype=torch.float64)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_errors_decoder_and_moment_are_the_closed_forms(prediction):
    scheduler = DDPMExtScheduler(STEPS, beta_start=0.01, beta_end=0.3, prediction_type=prediction)
    source = torch.Generator().manual_seed(1)
    fit = fit_logvar(
        denoiser_of(scheduler), scheduler, images(), draws=400, generator=source, decoder="continuous", rows=1000
    )
    abar = scheduler.schedule.alphas_cumprod
    error = S2 * (1 - abar) / (S2 * abar + 1 - abar)
    np.testing.assert_allclose(fit.x0_error, error, rtol=0.03)
    assert fit.second_moment == pytest.approx(S2, rel=0.03)
    np.testing.assert_array_equal(fit.draws, 400)
    # The best Gaussian around the prediction has the error's variance, and costs its entropy.
    best = 0.5 * np.log2(2 * math.pi * math.e * error)
    np.testing.assert_allclose(fit.decoder, best, atol=0.03)
    np.testing.assert_allclose(fit.v_decoder, np.minimum(error / (1 - abar), 1), rtol=0.05)
    np.testing.assert_allclose(fit.optimal.v, np.minimum(error / (1 - abar), 1), rtol=0.03)


def test_fitted_variances_and_steps_lower_the_bound():
    """On the very chain: the fitted table is better than 0 and 1, and chosen steps are better than even ones."""
    scheduler = DDPMExtScheduler(STEPS, beta_start=0.01, beta_end=0.3, prediction_type="v_prediction")
    denoiser, x0 = denoiser_of(scheduler), images()
    fit = fit_logvar(denoiser, scheduler, x0, draws=200, decoder="continuous", generator=torch.Generator())

    def bound(count: int, optimal: bool = False, **options) -> float:
        chosen = {str(k): steps.tolist() for k, steps in fit.choose(scheduler.schedule, 10).items()}
        own = DDPMExtScheduler.from_config(scheduler.config, optimal_timesteps=chosen, **options)
        own.set_timesteps(count, optimal=optimal)
        source = torch.Generator().manual_seed(2)
        return float(bits_per_dim(denoiser, own, x0, generator=source, decoder="continuous").total.mean())

    fitted = {"v_posterior": fit.optimal.v.tolist(), "v_decoder": fit.v_decoder.tolist()}
    best = bound(STEPS, **fitted)
    assert best < bound(STEPS, v_posterior=0.0)
    assert best < bound(STEPS, v_posterior=1.0)
    for count in (1, 3, 10):
        assert bound(count, optimal=True, **fitted) <= bound(count, **fitted) + 5e-3  # other noise


def test_the_grid_finds_the_best_variance_of_levels():
    """17 levels, a prediction off by a known error: no v of a fine grid is better than the one found."""
    scheduler = DDPMExtScheduler(5, beta_start=0.05, beta_end=0.5, prediction_type="sample")
    source = torch.Generator().manual_seed(0)
    x0 = torch.randint(0, 17, (64, 1, 8, 8), generator=source).double() / 8 - 1
    predicted = x0 + 0.1 * torch.randn(x0.shape, generator=source, dtype=torch.float64)
    meter = VarianceMeter(scheduler.schedule, "exact", 0.125)
    meter.add(x0, predicted, torch.full((64,), 3))
    fit = meter.result()
    assert np.isinf(fit.decoder[0])
    assert np.isfinite(fit.decoder[3])
    noise = 1 - scheduler.schedule.alphas_cumprod[3]

    def cost(v: float) -> float:
        z = torch.distributions.Normal(predicted, (v * noise) ** 0.5)
        upper = torch.where(x0 > 0.99, torch.ones_like(x0), z.cdf(x0 + 0.0625))
        lower = torch.where(x0 < -0.99, torch.zeros_like(x0), z.cdf(x0 - 0.0625))
        return float(-torch.log2((upper - lower).clamp(min=1e-300)).mean())

    assert fit.decoder[3] == pytest.approx(cost(fit.v_decoder[3]), abs=1e-3)
    assert min(cost(v) for v in np.geomspace(GRID[5], 1, 400)) > fit.decoder[3] - 1e-3


def test_what_cannot_be_fitted():
    learned = DDPMExtScheduler(5, variance_type="learned_range")
    with pytest.raises(ValueError, match=r"learned_range.*nothing to fit"):
        fit_logvar(lambda x, t: x, learned, images(2))
    plain = DDPMExtScheduler(5)
    with pytest.raises(ValueError, match="draws=0"):
        fit_logvar(lambda x, t: x, plain, images(2), draws=0)
    with pytest.raises(ValueError, match="not finite"):
        fit_logvar(lambda x, t: x * float("nan"), plain, images(2), draws=1)
    with pytest.raises(ValueError, match="decoder"):
        fit_logvar(lambda x, t: x, plain, images(2), draws=1, decoder="tanh")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"draws": 1.5}, "draws=1.5 must be an integer"),
        ({"draws": "4"}, "draws='4'"),
        ({"rows": 0}, "rows=0 must be"),
        ({"rows": 2.5}, "rows=2.5"),
        ({"x0": torch.zeros(4, 1, 2, 2, dtype=torch.uint8)}, "floating"),
        ({"x0": torch.zeros(4)}, r"x0 must be floating, \(B, C"),
        ({"x0": torch.zeros(4, 0)}, r"x0 must be floating, \(B, C"),
        ({"scheduler": None}, "has no NoiseSchedule"),
        ({"scheduler": DDPMScheduler()}, "has no NoiseSchedule"),
        ({"denoiser": None}, "is not a network"),
    ],
)
def test_wrong_arguments_are_named(changes, match):
    arguments = {"denoiser": lambda x, t: x, "scheduler": DDPMExtScheduler(10), "x0": torch.zeros(4, 1, 2, 2)}
    with pytest.raises(ValueError, match=match):
        fit_logvar(**(arguments | changes))

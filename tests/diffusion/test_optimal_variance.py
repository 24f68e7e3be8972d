"""The best reverse variance and the best steps, against closed forms, brute force and the bound itself."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
import torch

from diffusers_ddpm_ext import DDPMExtScheduler
from diffusers_ddpm_ext.diffusion.likelihood import bits_per_dim
from diffusers_ddpm_ext.diffusion.optimal_variance import (
    Smoother,
    best_timesteps,
    optimal_v,
    pair_costs,
    prior_costs,
    step_bits,
    x0_error_of_logvar,
)
from diffusers_ddpm_ext.diffusion.schedule import NoiseSchedule

LN2 = math.log(2)


def gaussian_error(schedule: NoiseSchedule, s2: float) -> np.ndarray:
    """Error of the posterior mean of x0 ~ N(0, s2)."""
    abar = schedule.alphas_cumprod
    return s2 * (1 - abar) / (abar * s2 + 1 - abar)


def exact_denoiser(scheduler: DDPMExtScheduler, s2: float):
    """The posterior mean, in the words of what the scheduler's network predicts."""
    abar = torch.from_numpy(scheduler.schedule.alphas_cumprod.copy())

    def denoiser(xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = abar[t].reshape(-1, *(1,) * (xt.ndim - 1))
        x0 = a.sqrt() * s2 / (a * s2 + 1 - a) * xt
        eps = (xt - a.sqrt() * x0) / (1 - a).sqrt()
        return {"epsilon": eps, "sample": x0, "v_prediction": a.sqrt() * eps - (1 - a).sqrt() * x0}[
            scheduler.config.prediction_type
        ]

    return denoiser


def nodes(scheduler: DDPMExtScheduler, s2: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Two images of two pixels: all four combinations of data +-s and noise +-1, each once; exact for quadratics."""
    x0 = math.sqrt(s2) * torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)[:, None, None]
    eps = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)[:, None, None]
    return x0, eps.expand(len(scheduler.kept), *x0.shape)


def bound(scheduler: DDPMExtScheduler, s2: float) -> torch.Tensor:
    x0, noise = nodes(scheduler, s2)
    both = [
        bits_per_dim(exact_denoiser(scheduler, s2), scheduler, x0, noise=sign * noise, decoder="continuous")
        for sign in (1, -1)
    ]
    return torch.stack([b.total for b in both]).mean() * LN2


def analytic(kept: NoiseSchedule, s2: float, variance: np.ndarray) -> float:
    """The bound, nats per dimension, by its terms in [DDPM] eqs. 5 to 7; `variance` is that of each reverse step."""
    error = gaussian_error(kept, s2)
    total = 0.5 * (kept.alphas_cumprod[-1] * (s2 - 1) - np.log(1 - kept.alphas_cumprod[-1]))
    total += 0.5 * (np.log(2 * np.pi * variance[0]) + error[0] / variance[0])
    b, a, prev = kept.betas[1:], kept.alphas_cumprod[1:], kept.alphas_cumprod_prev[1:]
    small, c1 = b * (1 - prev) / (1 - a), b * np.sqrt(prev) / (1 - a)
    s = variance[1:]
    return total + 0.5 * (np.log(s / small) - 1 + small / s + c1**2 * error[1:] / s).sum()


def used_variance(kept: NoiseSchedule) -> np.ndarray:
    small = kept.betas * (1 - kept.alphas_cumprod_prev) / (1 - kept.alphas_cumprod)
    v = np.broadcast_to(kept.v_posterior, len(kept))
    variance = (1 - v) * small + v * kept.betas
    if variance[0] == 0:
        variance[0] = small[1] if len(kept) > 1 else kept.betas[0]
    return variance


def chains(steps: int) -> list[list[int] | None]:
    return [None, [steps // 2], [steps - 1], sorted({0, steps // 3, steps - 1}), list(range(1, steps, 3))]


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("steps", [10, 100, 1000])
@pytest.mark.parametrize("v", [0.0, 0.3, 1.0])
def test_the_bound_of_gaussian_data_is_the_analytic_one(prediction_type, steps, v):
    s2 = 0.6
    for chain in chains(steps):
        scheduler = DDPMExtScheduler(steps, v_posterior=v, prediction_type=prediction_type)
        if chain:
            scheduler.set_timesteps(timesteps=chain[::-1])
        expected = analytic(scheduler.kept, s2, used_variance(scheduler.kept))
        assert float(bound(scheduler, s2)) == pytest.approx(expected, abs=1e-9 * max(1, abs(expected)))


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("steps", [10, 100, 1000])
@pytest.mark.parametrize("s2", [0.05, 0.6, 1.0])
def test_with_the_best_variance_nothing_is_lost(prediction_type, steps, s2):
    """The bound is entropy + KL(q(x_T) || N(0, I)) on every chain, and any smaller v makes it worse."""
    start = DDPMExtScheduler(steps, prediction_type=prediction_type)
    v = optimal_v(start.schedule, gaussian_error(start.schedule, s2)).v
    for chain in chains(steps):
        scheduler = DDPMExtScheduler(steps, prediction_type=prediction_type, v_posterior=v)
        if chain:
            scheduler.set_timesteps(timesteps=chain[::-1])
        last = scheduler.kept.alphas_cumprod[-1]
        marginal = last * s2 + 1 - last
        expected = 0.5 * np.log(2 * np.pi * np.e * s2) + 0.5 * (marginal - 1 - np.log(marginal))
        assert float(bound(scheduler, s2)) == pytest.approx(expected, abs=1e-9 * max(1, abs(expected)))
        t = int(scheduler.kept.timesteps[len(scheduler.kept) // 2])
        halved = np.where(np.arange(steps) == t, v / 2, v)
        worse = DDPMExtScheduler(steps, prediction_type=prediction_type, v_posterior=halved)
        worse.set_timesteps(timesteps=scheduler.kept.timesteps[::-1])
        assert float(bound(worse, s2)) > expected + 1e-11


def test_clipped_steps_are_listed_with_their_cost():
    s2, scheduler = 1.7, DDPMExtScheduler(100)
    schedule = scheduler.schedule
    result = optimal_v(schedule, gaussian_error(schedule, s2))
    # v* = s2 / (A s2 + 1 - A) is above 1 at every step
    assert result.clipped.tolist() == list(range(100))
    assert (result.v == 1).all()
    free = analytic(schedule, s2, used_variance(schedule.with_v_posterior(1.0)))
    error, kept = gaussian_error(schedule, s2), schedule
    small = kept.betas * (1 - kept.alphas_cumprod_prev) / (1 - kept.alphas_cumprod)
    best = np.where(np.arange(100) == 0, kept.betas[0], small + kept.posterior_mean_coef1**2 * error)
    lost = (free - analytic(schedule, s2, best)) / LN2
    assert result.loss == pytest.approx(lost, rel=1e-9)
    assert result.loss > 0


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_log_loss_stands_for_an_error_of_x0(prediction_type):
    """The exact network's squared error, in its own space, over nodes."""
    s2 = 0.4
    scheduler = DDPMExtScheduler(50, prediction_type=prediction_type)
    x0 = math.sqrt(s2) * torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)[:, None]
    eps = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)[:, None]
    log_loss = []
    for step in range(50):
        t = torch.full((4,), step)
        out = exact_denoiser(scheduler, s2)(scheduler.add_noise(x0, eps, t), t)
        target = {"epsilon": eps, "sample": x0, "v_prediction": scheduler.get_velocity(x0, eps, t)}[prediction_type]
        log_loss.append(float(((out - target) ** 2).mean().log()))
    result = x0_error_of_logvar(scheduler.schedule, np.array(log_loss))
    np.testing.assert_allclose(result, gaussian_error(scheduler.schedule, s2), rtol=1e-9)


def chain_cost(schedule: NoiseSchedule, error: np.ndarray, decoder: np.ndarray, moment: float, steps) -> float:
    kept = schedule.respaced(steps)
    v = np.minimum(error / (1 - schedule.alphas_cumprod), 1)[list(kept.timesteps)]
    s = used_variance(kept.with_v_posterior(v))[1:]
    b, a, prev = kept.betas[1:], kept.alphas_cumprod[1:], kept.alphas_cumprod_prev[1:]
    small, c1 = b * (1 - prev) / (1 - a), b * np.sqrt(prev) / (1 - a)
    errors = error[list(kept.timesteps)][1:]
    steps_cost = 0.5 * (np.log(s / small) - 1 + small / s + c1**2 * errors / s).sum() / LN2
    last = kept.alphas_cumprod[-1]
    return decoder[kept.timesteps[0]] + steps_cost + 0.5 * (last * (moment - 1) - np.log(1 - last)) / LN2


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("first", [None, 0, 2])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_best_steps_are_the_best_of_all(count, first, scale):
    """Every subset is tried; with errors so large that v is clipped, too."""
    schedule = NoiseSchedule(12, 1e-3, 0.4)
    rng = np.random.default_rng(3)
    error = scale * gaussian_error(schedule, 0.5) * rng.uniform(0.6, 1.4, 12)
    decoder, moment = rng.uniform(0, 2, 12) + np.linspace(0, 3, 12), 0.5
    result = best_timesteps(schedule, error, decoder, moment, [count], first)[count]
    options = [c for c in itertools.combinations(range(12), count) if first is None or c[0] == first]
    costs = {c: chain_cost(schedule, error, decoder, moment, c) for c in options}
    assert tuple(result[::-1]) == min(costs, key=costs.get)


def test_costs_add_up_to_the_bound_of_a_chain():
    schedule = NoiseSchedule(30, 1e-3, 0.2)
    error = gaussian_error(schedule, 0.7)
    steps = [2, 9, 10, 29]
    costs, prior = pair_costs(schedule, error), prior_costs(schedule, 0.7)
    result = 1.5 + sum(costs[s, t] for s, t in itertools.pairwise(steps)) + prior[29]
    assert result == pytest.approx(chain_cost(schedule, error, np.full(30, 1.5), 0.7, steps), rel=1e-12)
    assert np.isinf(costs[5, 5])
    assert np.isinf(costs[6, 5])


def test_a_thousand_steps_all_lengths_up_to_a_hundred():
    schedule = NoiseSchedule(1000)
    error = gaussian_error(schedule, 0.3)
    began = time.perf_counter()
    result = best_timesteps(schedule, error, np.linspace(0, 5, 1000), 0.3, range(1, 101))
    assert time.perf_counter() - began < 60  # seconds; 0.4 on an idle machine. A cubic search takes minutes.
    assert sorted(result) == list(range(1, 101))
    for count, steps in result.items():
        assert len(steps) == count
        assert (np.diff(steps) < 0).all()
    totals = [chain_cost(schedule, error, np.linspace(0, 5, 1000), 0.3, result[k]) for k in (1, 5, 25, 100)]
    assert (np.diff(totals) <= 1e-12).all()  # beyond the last step that pays, more steps only cost no more


def test_smoothing_is_exact_on_lines_and_bridges_what_was_not_seen():
    schedule = NoiseSchedule(400)
    level = np.log(schedule.snr)
    line = 0.3 - 0.7 * level
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 4, 400)
    counts[200:230] = 0
    counts[[0, -1]] = 1
    result = Smoother(schedule, counts)(np.where(counts > 0, line, 99.0))
    np.testing.assert_allclose(result, line, rtol=1e-9, atol=1e-9)
    noisy = line + rng.normal(0, 0.3, 400)
    smooth = Smoother(schedule, np.full(400, 4))(noisy)
    middle = slice(100, 350)
    assert np.abs(smooth - line)[middle].mean() < 0.3 * np.abs(noisy - line)[middle].mean()
    both = Smoother(schedule, np.full(400, 4))(np.stack([noisy, line], 1))
    np.testing.assert_allclose(both[:, 0], smooth, rtol=1e-12)
    with pytest.raises(ValueError, match="no step was measured"):
        Smoother(schedule, np.zeros(400))


def test_steps_that_stand_alone_keep_their_value():
    schedule = NoiseSchedule(4, beta_start=0.3, beta_end=0.9)
    values = np.array([1.0, -2.0, 5.0, 0.5])
    np.testing.assert_array_equal(Smoother(schedule, np.ones(4))(values), values)
    assert np.isfinite(Smoother(NoiseSchedule(9, rescale_betas_zero_snr=True), np.ones(9))(np.arange(9.0))).all()


def test_best_v_is_the_best_of_all():
    """The divergence at v* against a fine grid of v."""
    schedule = NoiseSchedule(100)
    error, grid = gaussian_error(schedule, 0.4), np.linspace(1e-3, 1, 2000)
    v = optimal_v(schedule, error).v
    for t in (1, 20, 99):
        snr, abar = schedule.snr, schedule.alphas_cumprod
        costs = step_bits(error[t], grid, snr[t - 1], snr[t], abar[t])
        assert v[t] == pytest.approx(grid[costs.argmin()], abs=1e-3)
        assert step_bits(error[t], v[t], snr[t - 1], snr[t], abar[t]) <= costs.min() + 1e-12


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda s: optimal_v(s, np.ones(3)), "x0_error"),
        (lambda s: optimal_v(s, np.full(20, np.nan)), "x0_error"),
        (lambda s: x0_error_of_logvar(s, np.ones(4)), "logvar"),
        (lambda s: best_timesteps(s, np.ones(20), np.ones(20), 1.0, [21]), "num_inference_steps"),
        (lambda s: best_timesteps(s, np.ones(20), np.ones(20), 1.0, [0]), "num_inference_steps"),
        (lambda s: best_timesteps(s, np.ones(20), np.ones(20), 1.0, [18], first=3), "1, 17"),
        (lambda s: best_timesteps(s, np.ones(20), np.ones(2), 1.0, [2]), "decoder"),
    ],
)
def test_wrong_tables_are_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call(NoiseSchedule(20))

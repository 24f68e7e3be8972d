"""The Gaussian algebra against Bayes' rule, round trips, and traps of broadcasting and precision."""

from __future__ import annotations

import pytest
import torch

from diffusers_ddpm_ext import DDPMExtScheduler
from diffusers_ddpm_ext.diffusion import gaussian
from diffusers_ddpm_ext.diffusion.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule(50, 0.001, 0.2, v_posterior=0.0)
T = torch.tensor([0, 1, 20, 49])


def draws(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))


def test_posterior_is_bayes_rule():
    """p(x_{t-1} | x_t, x_0) is one forward step times the marginal: add precisions, average means."""
    x0, xt = draws(4, 3)
    t = torch.tensor([1, 2, 20, 49])
    beta = torch.tensor(SCHEDULE.betas)[t][:, None]
    prev = torch.tensor(SCHEDULE.alphas_cumprod)[t - 1][:, None]
    precision = (1 - beta) / beta + 1 / (1 - prev)
    mean = ((1 - beta).sqrt() * xt / beta + prev.sqrt() * x0 / (1 - prev)) / precision
    distribution = gaussian.posterior(SCHEDULE, x0, xt, t)
    torch.testing.assert_close(distribution.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(distribution.variance, 1 / precision, rtol=1e-11, atol=0)
    torch.testing.assert_close(distribution.log_variance, (1 / precision).log(), rtol=1e-11, atol=1e-11)


def test_posterior_ends_at_the_clean_sample():
    x0, xt = draws(2, 3)
    distribution = gaussian.posterior(SCHEDULE, x0, xt, torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(distribution.mean, x0, rtol=1e-12, atol=1e-12)
    assert (distribution.variance == 0).all()


def test_marginal_is_the_product_of_the_steps():
    """Noise step by step with the betas; the closed form must have the same mean and variance."""
    mean, variance = torch.tensor(1.0).double(), torch.tensor(0.0).double()
    for t, beta in enumerate(SCHEDULE.betas):
        mean, variance = mean * (1 - beta) ** 0.5, variance * (1 - beta) + beta
        distribution = gaussian.q_mean_variance(SCHEDULE, torch.ones(1, 1, dtype=torch.float64), torch.tensor([t]))
        assert distribution.mean.item() == pytest.approx(mean.item(), rel=1e-12)
        assert distribution.variance.item() == pytest.approx(variance.item(), rel=1e-12)
        assert distribution.log_variance.exp().item() == pytest.approx(variance.item(), rel=1e-12)


@pytest.mark.parametrize("shape", [(4,), (4, 7), (4, 1, 8, 8), (4, 3, 5, 6, 2)])
def test_every_conversion_returns(shape):
    x0, eps = draws(*shape)
    xt = gaussian.q_sample(SCHEDULE, x0, eps, T)
    v = gaussian.velocity(SCHEDULE, x0, eps, T)
    for got, want in [
        (gaussian.x0_from_eps(SCHEDULE, xt, eps, T), x0),
        (gaussian.x0_from_v(SCHEDULE, xt, v, T), x0),
        (gaussian.eps_from_x0(SCHEDULE, xt, x0, T), eps),
        (gaussian.eps_from_v(SCHEDULE, xt, v, T), eps),
        (gaussian.v_from_x0(SCHEDULE, xt, x0, T), v),
        (gaussian.v_from_eps(SCHEDULE, xt, eps, T), v),
    ]:
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_training_target_predicts_the_clean_sample_and_the_noise(prediction_type):
    x0, eps = draws(4, 2, 3)
    xt = gaussian.q_sample(SCHEDULE, x0, eps, T)
    target = gaussian.training_target(SCHEDULE, prediction_type, x0, eps, T)
    torch.testing.assert_close(gaussian.predict_x0(SCHEDULE, prediction_type, target, xt, T), x0)
    torch.testing.assert_close(gaussian.predict_eps(SCHEDULE, prediction_type, target, xt, T), eps)


def test_velocity_is_the_rotation_of_the_pair():
    """(xt, v) is (x0, eps) rotated: lengths are kept, and v is the derivative of xt by the angle."""
    x0, eps = draws(4, 5)
    xt, v = gaussian.q_sample(SCHEDULE, x0, eps, T), gaussian.velocity(SCHEDULE, x0, eps, T)
    torch.testing.assert_close(xt**2 + v**2, x0**2 + eps**2)
    angle = torch.tensor(SCHEDULE.sqrt_alphas_cumprod)[T].acos()[:, None].requires_grad_()
    (slope,) = torch.autograd.grad((angle.cos() * x0 + angle.sin() * eps).sum(1).sum(), angle)
    torch.testing.assert_close(v.sum(1, keepdim=True), slope)


def test_each_sample_follows_its_own_step():
    """Batch equals width on purpose: a missing reshape would broadcast over pixels and still run."""
    x0, eps = draws(4, 4, 4, 4)
    together = gaussian.q_sample(SCHEDULE, x0, eps, T)
    for i in range(4):
        alone = gaussian.q_sample(SCHEDULE, x0[i : i + 1], eps[i : i + 1], T[i : i + 1])
        assert torch.equal(together[i : i + 1], alone)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_small_integers_are_steps_not_masks(dtype):
    x0, eps = draws(4, 4)
    torch.testing.assert_close(
        gaussian.q_sample(SCHEDULE, x0, eps, T.to(dtype)), gaussian.q_sample(SCHEDULE, x0, eps, T)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_coefficients_are_never_below_float32(dtype):
    schedule = NoiseSchedule()
    t = torch.arange(1000)
    like = torch.zeros(1000, 2, dtype=dtype)
    sigma = gaussian.at_step(schedule.sqrt_one_minus_alphas_cumprod, t, like)
    assert sigma.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    truth = torch.tensor(schedule.sqrt_one_minus_alphas_cumprod)[:, None]
    torch.testing.assert_close(sigma.double(), truth, rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("t", "named"),
    [
        (torch.tensor([0.0, 1.0]), "integers"),
        (torch.tensor([True, False]), "integers"),
        (torch.tensor([0]), "one step per sample"),
        (torch.tensor(0), "one step per sample"),
        (torch.tensor([[0], [1]]), "one step per sample"),
        (torch.tensor([0, 50]), "50"),
        (torch.tensor([-1, 3]), "-1"),
    ],
)
def test_steps_that_would_be_misread_are_refused(t, named):
    with pytest.raises(ValueError, match=named):
        gaussian.q_sample(SCHEDULE, torch.zeros(2, 2), torch.zeros(2, 2), t)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match="shapes"):
        gaussian.q_sample(SCHEDULE, torch.zeros(2, 3), torch.zeros(2, 1), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="prediction_type"):
        gaussian.predict_x0(SCHEDULE, "x0", torch.zeros(2), torch.zeros(2), torch.tensor([0, 1]))


@pytest.mark.parametrize("t", [100, -1, [[1], [2]], [1.5, 2.5], [1, 2, 3]])
def test_steps_are_checked_where_they_are_not_needed(t):
    schedule, x = DDPMExtScheduler(100).schedule, torch.zeros(2, 3)
    for call in (
        lambda: gaussian.training_target(schedule, "epsilon", x, x, t),
        lambda: gaussian.training_target(schedule, "sample", x, x, t),
        lambda: gaussian.predict_x0(schedule, "sample", x, x, t),
        lambda: gaussian.predict_eps(schedule, "epsilon", x, x, t),
    ):
        with pytest.raises(ValueError, match="t must"):
            call()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int16])
def test_steps_of_any_integers(dtype):
    schedule, x = DDPMExtScheduler(100).schedule, torch.ones(2, 3)
    expected = gaussian.q_sample(schedule, x, x, [3, 99])
    assert torch.equal(gaussian.q_sample(schedule, x, x, torch.tensor([3, 99]).to(dtype)), expected)

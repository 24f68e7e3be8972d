"""The reverse step: exact on every chain, and the same noise as stock."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor
from helpers.draws import F64, draws, seeded
from torch import Tensor

from diffusers_ddpm_ext import DDPMExtScheduler
from diffusers_ddpm_ext.utils.vocabulary import PREDICTION_TYPES


def chain_by_hand(scheduler: DDPMExtScheduler, v: float) -> dict[int, tuple[float, float, float, float]]:
    """Step -> (abar, c0, ct, variance), from the alphas_cumprod of the timesteps in use alone ([DDPM] eqs. 6, 7)."""
    config = scheduler.config
    betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_train_timesteps) ** 2
    steps = sorted(scheduler.timesteps.tolist())
    gathered = np.cumprod(1 - betas)[steps]
    rows, prev = {}, 1.0
    for t, abar in zip(steps, gathered, strict=True):
        beta = 1 - abar / prev
        c0 = prev**0.5 * beta / (1 - abar)
        ct = (1 - beta) ** 0.5 * (1 - prev) / (1 - abar)
        rows[t] = (abar, c0, ct, (1 - v) * beta * (1 - prev) / (1 - abar) + v * beta)
        prev = abar
    return rows


@pytest.mark.parametrize("v", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", "custom"])
@pytest.mark.parametrize("count", [1, 2, 3, 10, 50, 61, 998, 999, 1000])
def test_posterior_is_that_of_the_kept_steps(count, spacing, v):
    """Mean and variance of every step, by int and by a step per sample, to 1e-12."""
    custom = spacing == "custom"
    scheduler = DDPMExtScheduler(
        beta_schedule="scaled_linear",
        timestep_spacing="leading" if custom else spacing,
        v_posterior=v,
        clip_sample=False,
        prediction_type="v_prediction",
    )
    if custom:
        steps = sorted(np.random.default_rng(count).choice(1000, count, replace=False).tolist(), reverse=True)
        scheduler.set_timesteps(timesteps=steps)
    else:
        scheduler.set_timesteps(count)
    assert len(scheduler.timesteps) == len(scheduler.kept) == scheduler.num_inference_steps == count
    rows = chain_by_hand(scheduler, v)
    last = min(rows)
    some = scheduler.timesteps[torch.linspace(0, count - 1, min(count, 12)).long()]
    xt, out, noise = draws(len(some), 3, count=3, dtype=F64)
    batched = scheduler.step(out, some, xt, variance_noise=noise).prev_sample
    for i, t in enumerate(some.tolist()):
        abar, c0, ct, variance = rows[t]
        x0 = abar**0.5 * xt[i] - (1 - abar) ** 0.5 * out[i]
        mean = c0 * x0 + ct * xt[i]
        want = mean + (variance**0.5 * noise[i] if t != last else 0)
        one = scheduler.step(out[i : i + 1], t, xt[i : i + 1], variance_noise=noise[i : i + 1])
        for got in (one.prev_sample[0], batched[i]):
            assert got.dtype == F64
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        assert scheduler.kept.posterior_variance[sorted(rows).index(t)] == pytest.approx(variance, abs=1e-12)
        assert float(scheduler._get_variance(t)) == pytest.approx(max(variance, 1e-20), abs=1e-12)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(("variance_type", "v"), [("fixed_small", 0.0), ("fixed_large", 1.0)])
def test_loop_equals_stock(prediction_type, variance_type, v):
    """The same generator, 50 steps: what differs is stock's float32 tables."""
    stock = DDPMScheduler(prediction_type=prediction_type, variance_type=variance_type)
    named = DDPMExtScheduler(prediction_type=prediction_type, variance_type=variance_type)
    dialled = DDPMExtScheduler(prediction_type=prediction_type, v_posterior=v)
    finals = []
    for scheduler in (stock, named, dialled):
        scheduler.set_timesteps(50)
        generator = seeded()
        (x,) = draws(2, 3, 8, 8, count=1)
        for t in scheduler.timesteps:
            x = scheduler.step(torch.sin(x + t), t, x, generator=generator).prev_sample
        finals.append((x, torch.randn(1, generator=generator)))
    for x, following in finals[1:]:
        torch.testing.assert_close(x, finals[0][0], rtol=0, atol=1e-4)
        assert torch.equal(following, finals[0][1]), "the generator must end where stock's ends"


@pytest.mark.parametrize("variance_type", ["fixed_small_log", "learned_range"])
def test_one_step_of_stock_variance_types(variance_type):
    stock, ours = DDPMScheduler(variance_type=variance_type), DDPMExtScheduler(variance_type=variance_type)
    x, out = draws(2, 3, 4, 4)
    out = torch.cat([out, out.tanh()], dim=1) if variance_type == "learned_range" else out
    for t in (0, 1, 500, 999):
        want = stock.step(out, t, x, generator=seeded()).prev_sample
        for form in (t, torch.tensor([t, t])):
            got = ours.step(out, form, x, generator=seeded()).prev_sample
            torch.testing.assert_close(got, want, rtol=0, atol=1e-4)  # stock's tables are float32


@pytest.mark.parametrize("count", [None, 20])
def test_fixed_log_types_draw_the_noise_of_their_namesakes(count):
    x, out = draws(2, 3, 4, 4)
    for name in ("fixed_small", "fixed_large"):
        plain, log = DDPMExtScheduler(variance_type=name), DDPMExtScheduler(variance_type=f"{name}_log")
        for scheduler in (plain, log):
            if count:
                scheduler.set_timesteps(count)
        for t in plain.timesteps[[0, 3, -1]].tolist():
            want = plain.step(out, t, x, generator=seeded()).prev_sample
            got = log.step(out, t, x, generator=seeded()).prev_sample
            assert torch.isfinite(got).all()
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_variances_by_type():
    """Those of stock where stock has a number; stock steps with NaN for fixed_large_log."""
    stock, ours = DDPMScheduler(), DDPMExtScheduler()
    for t in (1, 10, 500, 999):
        for kind in ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"):
            got = ours._get_variance(t, variance_type=kind)
            assert got.shape == ()
            assert got.isfinite()
            assert float(got) == pytest.approx(float(stock._get_variance(t, variance_type=kind)), rel=1e-3)
    assert DDPMExtScheduler(variance_type="fixed_large_log")._get_variance(5) == pytest.approx(
        np.log(ours.schedule.betas[5])
    )
    assert float(ours._get_variance(0)) == 1e-20
    assert float(DDPMExtScheduler(v_posterior=0.25)._get_variance(torch.tensor(7))) == pytest.approx(
        0.75 * float(ours._get_variance(7)) + 0.25 * ours.schedule.betas[7], rel=1e-12
    )
    with pytest.raises(ValueError, match="needs predicted_variance"):
        ours._get_variance(5, variance_type="learned")
    with pytest.raises(ValueError, match="variance_type='other'"):
        ours._get_variance(5, variance_type="other")


def test_learned_reads_the_second_half_as_log_variance():
    """Stock takes the root of a log here, which is NaN."""
    ours = DDPMExtScheduler(variance_type="learned", prediction_type="sample", clip_sample=False)
    x, x0, noise = draws(2, 3, 4, 4, count=3)
    log_variance = torch.full_like(x, -3.0)
    out = torch.cat([x0, log_variance], dim=1)
    c0, ct = ours.posterior_mean_coef1[500], ours.posterior_mean_coef2[500]
    want = c0 * x0 + ct * x + np.exp(-1.5) * noise
    torch.testing.assert_close(ours.step(out, 500, x, variance_noise=noise).prev_sample, want)
    each = ours.step(out, torch.tensor([500, 0]), x, variance_noise=noise).prev_sample
    torch.testing.assert_close(each[0], want[0])
    torch.testing.assert_close(each[1], x0[1])
    huge = torch.cat([x0, torch.full_like(x, 300.0)], dim=1)
    torch.testing.assert_close(ours.step(huge, 0, x).prev_sample, x0)
    torch.testing.assert_close(ours.step(huge, torch.zeros(2, dtype=torch.long), x).prev_sample, x0)


def test_learned_range_ends_at_small_and_large():
    kept = DDPMExtScheduler(variance_type="learned_range", clip_sample=False)
    kept.set_timesteps(10)
    x, out, noise = draws(2, 3, 4, 4, count=3)
    for place, name in ((-1.0, "fixed_small"), (1.0, "fixed_large")):
        fixed = DDPMExtScheduler(variance_type=name, clip_sample=False)
        fixed.set_timesteps(10)
        want = fixed.step(out, 500, x, variance_noise=noise).prev_sample
        doubled = torch.cat([out, torch.full_like(x, place)], dim=1)
        torch.testing.assert_close(kept.step(doubled, 500, x, variance_noise=noise).prev_sample, want)


@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 3, 4, 4), (3, 2, 4, 3, 2)])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_each_sample_follows_its_own_step(shape, prediction_type):
    """Batch equals channels on purpose: a missing reshape would broadcast over pixels and still run."""
    ours = DDPMExtScheduler(prediction_type=prediction_type)
    x, out, noise = draws(*shape, count=3)
    t = torch.tensor([0, 400, 999])
    each = ours.step(out, t, x, variance_noise=noise)
    for i in range(3):
        one = ours.step(out[i : i + 1], int(t[i]), x[i : i + 1], variance_noise=noise[i : i + 1])
        torch.testing.assert_close(each.prev_sample[i], one.prev_sample[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(each.pred_original_sample[i], one.pred_original_sample[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(each.prev_sample[0], each.pred_original_sample[0])


@pytest.mark.parametrize(
    "timestep", [500, np.int64(500), torch.tensor(500), torch.tensor([500]), torch.tensor([500] * 2)]
)
def test_every_form_of_a_step(timestep):
    x, out = draws(2, 3, 4, 4)
    want = DDPMExtScheduler().step(out, 500, x, generator=seeded()).prev_sample
    got = DDPMExtScheduler().step(out, timestep, x, generator=seeded()).prev_sample
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", [int, torch.tensor, lambda t: torch.tensor([t, t])])
def test_no_noise_on_the_last_kept_step(form):
    """Also above step 0, where stock with fixed_large adds noise to the final image."""
    ours = DDPMExtScheduler(v_posterior=1.0)
    ours.set_timesteps(timesteps=[700, 300, 40])
    x, out = draws(2, 3, 4, 4)
    last = ours.step(out, form(40), x, generator=seeded())
    torch.testing.assert_close(last.prev_sample, last.pred_original_sample, rtol=0, atol=1e-6)
    first = ours.step(out, form(300), x, generator=seeded())
    assert (first.prev_sample - ours.step(out, form(300), x, generator=seeded(4)).prev_sample).std() > 0.1


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (4, 2, 2), (4, 1)])
def test_noise_is_that_of_randn_tensor(shape):
    """One generator, a list of them, none; permuted samples too."""
    ours = DDPMExtScheduler(prediction_type="sample", clip_sample=False, v_posterior=1.0)
    x = torch.zeros(shape)
    sigma = ours.schedule.betas[500] ** 0.5

    def noise(sample: Tensor, generator: Any) -> Tensor:
        return ours.step(sample, 500, sample, generator=generator).prev_sample / sigma

    def close(got: Tensor, want: Tensor) -> None:
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)

    close(noise(x, seeded()), randn_tensor(shape, generator=seeded()))
    several = [seeded(i) for i in range(4)]
    close(noise(x, several), randn_tensor(shape, generator=[seeded(i) for i in range(4)]))
    close(noise(x[:1], [seeded(2)]), randn_tensor((1, *shape[1:]), generator=seeded(2)))
    permuted = torch.zeros(*shape[1:], 4).permute(-1, *range(len(shape) - 1))
    close(noise(permuted, seeded()), randn_tensor(shape, generator=seeded()))
    torch.manual_seed(5)
    drawn = noise(x, None)
    torch.manual_seed(5)
    close(drawn, torch.randn(shape))
    with pytest.raises(ValueError, match="one generator per sample"):
        noise(x, several[:3])


def test_given_noise_leaves_the_generator_alone():
    ours, generator = DDPMExtScheduler(), seeded()
    x, out, noise = draws(2, 3, 4, 4, count=3)
    kept = noise.clone()
    ours.step(out, 500, x, generator=generator, variance_noise=noise)
    ours.step(out, torch.tensor([500, 3]), x, generator=generator, variance_noise=noise)
    assert torch.equal(noise, kept)
    assert torch.equal(torch.randn(3, generator=generator), torch.randn(3, generator=seeded()))


@pytest.mark.parametrize("form", [int, lambda t: torch.tensor([t, t])])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("thresholding", [False, True])
def test_no_argument_is_changed(prediction_type, thresholding, form):
    ours = DDPMExtScheduler(prediction_type=prediction_type, thresholding=thresholding)
    x, out = (5 * tensor for tensor in draws(2, 3, 4, 4))
    before = x.clone(), out.clone()
    ours.step(out, form(500), x)
    assert torch.equal(x, before[0])
    assert torch.equal(out, before[1])


@pytest.mark.parametrize("form", [int, lambda t: torch.tensor([t, t])])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("clip", [False, True])
def test_gradients_flow_through_a_step(prediction_type, clip, form):
    ours = DDPMExtScheduler(prediction_type=prediction_type, clip_sample=clip)
    x, out, noise = (tensor.requires_grad_() for tensor in draws(2, 3, count=3, dtype=F64))
    step = lambda out, x, noise: ours.step(out, form(100), x, return_dict=False, variance_noise=noise)  # noqa: E731
    assert torch.autograd.gradcheck(step, (out, x, noise))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", [int, lambda t: torch.tensor([t, t])])
def test_half_precision_is_computed_in_float32(dtype, form):
    ours = DDPMExtScheduler(prediction_type="v_prediction")
    x, out, noise = draws(2, 3, 8, 8, count=3, dtype=dtype)
    got = ours.step(out, form(3), x, variance_noise=noise)
    want = ours.step(out.float(), form(3), x.float(), variance_noise=noise.float())
    assert got.prev_sample.dtype == got.pred_original_sample.dtype == dtype
    assert torch.equal(got.prev_sample, want.prev_sample.to(dtype))
    drawn = ours.step(out, form(3), x, generator=seeded()).prev_sample
    stock = randn_tensor(x.shape, generator=seeded(), dtype=dtype)
    same = ours.step(out, form(3), x, variance_noise=stock).prev_sample
    assert torch.equal(drawn, same)


def test_mixed_precisions():
    """A float32 network with float64 samples, and a half-precision one with float32 samples."""
    ours = DDPMExtScheduler()
    (x,) = draws(2, 3, count=1, dtype=F64)
    assert ours.step(x.float(), 500, x).prev_sample.dtype == F64
    assert ours.step(x.to(torch.bfloat16), 500, x.float()).prev_sample.dtype == torch.float32


@pytest.mark.parametrize("clip_sample_range", [0.5, 1.0, 2.0])
def test_clipping(clip_sample_range):
    x, out = (4 * tensor for tensor in draws(2, 3, 4, 4))
    ours = DDPMExtScheduler(clip_sample_range=clip_sample_range)
    stock = DDPMScheduler(clip_sample_range=clip_sample_range)
    got, want = (s.step(out, 300, x, generator=seeded()).pred_original_sample for s in (ours, stock))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    assert got.abs().max() == clip_sample_range


@pytest.mark.parametrize("sample_max_value", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_thresholding(prediction_type, sample_max_value):
    kwargs = {"thresholding": True, "sample_max_value": sample_max_value, "dynamic_thresholding_ratio": 0.9}
    x, out = (3 * tensor for tensor in draws(2, 3, 4, 4))
    ours = DDPMExtScheduler(prediction_type=prediction_type, **kwargs)
    stock = DDPMScheduler(prediction_type=prediction_type, **kwargs)
    got, want = (s.step(out, 300, x, generator=seeded()) for s in (ours, stock))
    torch.testing.assert_close(got.pred_original_sample, want.pred_original_sample, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.prev_sample, want.prev_sample, rtol=1e-4, atol=1e-5)

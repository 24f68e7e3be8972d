"""Timestep samplers: the recorded resampler, unbiasedness, and a memory that nothing poisons."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers.paths import GOLDEN

from diffusers_ddpm_ext import DDPMExtScheduler, DDPMObjective
from diffusers_ddpm_ext.diffusion.timesteps import (
    SAMPLERS,
    LossSecondMomentSampler,
    TimestepSampler,
    log_snr_edges,
    make_sampler,
    stratify,
)
from diffusers_ddpm_ext.utils import host_reads

CASES = [case for case in json.loads((GOLDEN / "i_vlb.json").read_text())["cases"] if case["group"] == "resampler"]


def sampler_of(name: str, steps: int = 50, **options: float) -> TimestepSampler:
    return make_sampler(name, DDPMExtScheduler(num_train_timesteps=steps).schedule, **options)


def warm(steps: int = 50) -> LossSecondMomentSampler:
    """One that has seen losses falling by a factor of 30 over the chain."""
    sampler = LossSecondMomentSampler(steps)
    losses = torch.linspace(3.0, 0.1, steps).repeat(10)
    sampler.update(torch.arange(steps).repeat(10), losses)
    return sampler


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_recorded_resampler(case):
    with np.load(GOLDEN / "i_vlb.npz") as archive:
        given = {name: archive[key][row] for name, (key, row) in case["arrays"].items()}
    steps, history = given["loss_history"].shape
    share = case.get("uniform_prob", 0.001)
    sampler = LossSecondMomentSampler(steps, history, share)
    for k in range(len(given["ts"]) + 1):
        own = sampler.probabilities()
        recorded = given["weights"][k] / given["weights"][k].sum()
        np.testing.assert_allclose(np.full(steps, 1 / steps) if own is None else own, recorded, rtol=1e-12)
        assert sampler.is_warm == bool(given["warmed_up"][k])
        if k < len(given["ts"]):
            sampler.update(torch.from_numpy(given["ts"][k].copy()), torch.from_numpy(given["losses"][k].copy()))
    np.testing.assert_allclose(sampler.losses.numpy(), given["loss_history"], rtol=1e-12)
    np.testing.assert_array_equal(sampler.counts.numpy(), given["loss_counts"])
    p = sampler.probabilities()
    assert p is not None
    np.testing.assert_allclose(1 / (steps * p[given["sample_t"]]), given["sample_weights"], rtol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_weighted_means_are_those_of_uniform_draws(name):
    steps, count = 50, 10_000
    sampler = warm(steps) if name == "loss_second_moment" else sampler_of(name, steps)
    generator = torch.Generator().manual_seed(3)
    u = torch.rand(count, generator=generator, dtype=torch.float64)
    t, weights = sampler.draw(u)
    values = torch.randn(steps, generator=generator, dtype=torch.float64) + torch.linspace(0, 3, steps)
    seen = values[t] if weights is None else weights * values[t]
    error = float(seen.std() / count**0.5)
    assert abs(float(seen.mean() - values.mean())) < 4 * error
    p = sampler.probabilities()
    if p is not None:
        assert p.sum() == pytest.approx(1, abs=1e-12)
        assert float((weights * torch.from_numpy(p)[t] * steps - 1).abs().max()) < 1e-12
        frequencies = np.bincount(t.numpy(), minlength=steps) / count
        assert np.abs(frequencies - p).max() < 5 * (p.max() / count) ** 0.5


def test_second_moment_draws_what_is_large_more_often():
    p = warm().probabilities()
    assert p is not None
    assert p[0] / p[-1] == pytest.approx((3 * 0.999 / warm_total() + 0.001 / 50) / (0.1 * 0.999 / warm_total() + 2e-5))


def warm_total() -> float:
    return float(np.linspace(3.0, 0.1, 50, dtype=np.float32).astype(np.float64).sum())


def test_non_finite_losses_are_left_out():
    clean, dirty = warm(), warm()
    dirty.update(torch.tensor([3, 4, 5]), torch.tensor([float("nan"), float("inf"), -float("inf")]))
    assert torch.equal(clean.losses, dirty.losses)
    silent = LossSecondMomentSampler(4, history=2)
    silent.update(torch.arange(4).repeat(2), torch.zeros(8))
    assert silent.is_warm
    assert silent.probabilities() is None
    t, weights = silent.draw(torch.tensor([0.0, 0.3, 0.99], dtype=torch.float64))
    assert t.tolist() == [0, 1, 3]
    assert weights is None


def test_history_is_in_the_state_and_keeps_its_precision():
    sampler = warm()
    other = LossSecondMomentSampler(50)
    other.load_state_dict(sampler.state_dict())
    assert np.array_equal(other.probabilities(), sampler.probabilities())
    assert sampler.half().losses.dtype == torch.float64


@pytest.mark.parametrize("size", [1, 3, 40, 500])
def test_an_accelerator_learns_and_draws_without_reading(size, monkeypatch):
    """Against the host's own history, for steps that occur often, once and never, and losses that are not finite."""
    steps, generator = 6, torch.Generator().manual_seed(size)
    host, device = (LossSecondMomentSampler(steps, history=4) for _ in range(2))
    for _ in range(12):
        t = torch.randint(0, steps, (size,), generator=generator)
        losses = torch.rand(size, generator=generator).log()
        losses[torch.rand(size, generator=generator) < 0.2] = float("nan")
        host.update(t, losses)
        u = torch.rand(200, generator=generator, dtype=torch.float64)
        want, weights = host.draw(u)
        with monkeypatch.context() as patch:
            patch.setattr(host_reads, "FREE", frozenset())
            device.update(t, losses)
            got, own = device.draw(u)
        assert torch.equal(host.losses, device.losses)
        assert torch.equal(host.counts, device.counts)
        assert torch.equal(want, got)
        torch.testing.assert_close(own, torch.ones_like(u) if weights is None else weights, rtol=1e-12, atol=0)
    assert host.is_warm == (size > 3)


def test_draws_follow_an_update_and_a_loaded_state():
    sampler, state = warm(), warm().state_dict()
    u = torch.tensor([0.5], dtype=torch.float64)
    before = sampler.draw(u)[1].item()
    sampler.update(torch.arange(50), torch.linspace(0.1, 3.0, 50))
    assert sampler.draw(u)[1].item() != before
    sampler.load_state_dict(state)
    assert sampler.draw(u)[1].item() == before


@pytest.mark.parametrize("size", [1, 7, 64, 130])
def test_stratified_steps_cover_the_chain(size):
    steps = 50
    generator = torch.Generator().manual_seed(size)
    u = torch.rand(size, generator=generator, dtype=torch.float64)
    places = stratify(u, torch.arange(size), torch.randperm(size, generator=generator))
    t, weights = sampler_of("stratified", steps).draw(places)
    assert weights is None
    counts = np.bincount(t.numpy(), minlength=steps)
    assert counts.max() <= size // steps + 2
    assert sorted((places * size).long().tolist()) == list(range(size))


def test_log_snr_densities_have_their_shape():
    schedule = DDPMExtScheduler(num_train_timesteps=1000).schedule
    edges = log_snr_edges(schedule)
    abar = schedule.alphas_cumprod
    levels = np.log(abar / (1 - abar))
    assert ((edges[:-1] > levels) & (edges[1:] < levels)).all()
    even = make_sampler("log_snr_uniform", schedule).probabilities()
    np.testing.assert_allclose(even, 0.9 * -np.diff(edges) / (edges[0] - edges[-1]) + 1e-4, rtol=1e-12)
    normal = make_sampler("log_snr_normal", schedule, log_snr_mean=1.0, log_snr_std=0.5).probabilities()
    mean = ((normal - 1e-4) / 0.9 * levels).sum()
    spread_of = ((normal - 1e-4) / 0.9 * (levels - mean) ** 2).sum() ** 0.5
    assert mean == pytest.approx(1.0, abs=0.01)
    assert spread_of == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("steps", "rescaled"), [(1, False), (2, False), (2, True), (10, False), (10, True)])
@pytest.mark.parametrize("name", SAMPLERS)
def test_short_chains_and_zero_terminal_snr(name, steps, rescaled):
    scheduler = DDPMExtScheduler(
        num_train_timesteps=steps, rescale_betas_zero_snr=rescaled, prediction_type="v_prediction"
    )
    t, weights = make_sampler(name, scheduler.schedule, log_snr_std=5.0).draw(torch.rand(100).double())
    assert int(t.min()) >= 0
    assert int(t.max()) < steps
    assert weights is None or bool(torch.isfinite(weights).all())


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("importance", {}, "timestep_sampler='importance' is unknown: choose one of uniform"),
        ("log_snr_normal", {"log_snr_std": 0.0}, "log_snr_std"),
        ("log_snr_normal", {"log_snr_mean": float("nan")}, "log_snr_mean"),
        ("log_snr_normal", {"log_snr_mean": 500.0}, "is outside the chain's log-SNR"),
    ],
)
def test_bad_options_are_refused(name, options, match):
    with pytest.raises(ValueError, match=match):
        sampler_of(name, **options)


@pytest.mark.parametrize("name", SAMPLERS)
def test_weighted_gradients_are_those_of_uniform_steps(name):
    """The objective's own gradient, one draw a step: its mean over 10,000 is the even one, to its standard error."""
    steps, count = 50, 10_000
    scheduler = DDPMExtScheduler(num_train_timesteps=steps, prediction_type="v_prediction")
    objective = DDPMObjective(scheduler)
    sampler = warm(steps) if name == "loss_second_moment" else make_sampler(name, scheduler.schedule)
    source = torch.Generator().manual_seed(4)
    x0 = torch.linspace(-1, 1, 4, dtype=torch.float64).reshape(1, 1, 2, 2)
    noise = torch.linspace(1, -0.5, 4, dtype=torch.float64).reshape(1, 1, 2, 2)

    def gradients(t: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """Of a network that returns one number, for each sample by itself."""
        outputs = torch.full((len(t), 1, 2, 2), 0.2, dtype=torch.float64, requires_grad=True)
        many = (x0.expand(len(t), -1, -1, -1), noise.expand(len(t), -1, -1, -1))
        objective(outputs, *many, t, weights).loss.backward()
        return len(t) * outputs.grad.flatten(1).sum(1)

    even = gradients(torch.arange(steps), None).mean()
    u = torch.rand(count, generator=source, dtype=torch.float64)
    got = gradients(*sampler.draw(u))
    assert abs(float(got.mean() - even)) < 4 * float(got.std()) / count**0.5


@pytest.mark.parametrize("u", [[-0.5], [1.0], [float("nan")], [0.5, 2.0]])
@pytest.mark.parametrize("name", SAMPLERS)
def test_quantiles_out_of_range_are_refused(name, u):
    """A number below 0 would become a step counted from the end."""
    sampler = make_sampler(name, DDPMExtScheduler(100).schedule)
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        sampler.draw(torch.tensor(u, dtype=torch.float64))
    with pytest.raises(ValueError, match="floating tensor"):
        sampler.draw([0.5])


@pytest.mark.parametrize(("steps", "losses"), [([-1], [5.0]), ([100], [5.0]), ([1, 2], [5.0]), ([1.5], [5.0])])
def test_losses_of_steps_that_do_not_exist_are_refused(steps, losses):
    sampler = make_sampler("loss_second_moment", DDPMExtScheduler(100).schedule)
    with pytest.raises(ValueError, match="timesteps must"):
        sampler.update(torch.tensor(steps), torch.tensor(losses))
    assert int(sampler.counts.sum()) == 0


@pytest.mark.parametrize("probabilities", [[1.0, -1.0, 1.0], [0.5, 0.5], [0.5, 0.5, 0.5], [0.5, 0.5, 0.0]])
def test_probabilities_are_those_of_the_steps(probabilities):
    with pytest.raises(ValueError, match="3 numbers above 0 whose sum is 1"):
        TimestepSampler(np.array(probabilities), 3)

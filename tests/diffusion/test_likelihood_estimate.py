"""Estimates from a few steps of each image: strata, unbiasedness, and intervals that cover what they promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from diffusers_ddpm_ext import DDPMExtScheduler
from diffusers_ddpm_ext.diffusion.likelihood import bound_terms, prior_bits
from diffusers_ddpm_ext.diffusion.likelihood_estimate import Strata, estimate, step_table
from diffusers_ddpm_ext.diffusion.schedule import NoiseSchedule
from diffusers_ddpm_ext.utils.random_keys import generator


def chain(length: int, **options) -> NoiseSchedule:
    return NoiseSchedule(length, **options)


CUTS = [(1000, 10), (1000, 2), (1000, 400), (7, 7), (7, 3), (10, 9), (1, None), (5, None), (3, 2)]


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2", "zero"])
@pytest.mark.parametrize(("length", "count"), CUTS)
def test_strata_cut_the_chain(length, count, schedule):
    zero = {"rescale_betas_zero_snr": True} if length > 1 else {}
    options = zero if schedule == "zero" else {"beta_schedule": schedule}
    strata = Strata.from_schedule(chain(length, **options), count)
    assert len(strata) == (length if count is None else count)
    assert strata.sizes.sum() == length
    assert strata.starts[0] == 0
    assert strata.sizes[0] == 1
    np.testing.assert_array_equal(strata.starts[1:], np.cumsum(strata.sizes)[:-1])
    assert (strata.sizes >= 1).all()
    drawn = np.stack([strata.draw(torch.Generator().manual_seed(seed)) for seed in range(200)])
    assert ((drawn >= strata.starts) & (drawn < strata.starts + strata.sizes)).all()


def test_every_step_of_a_stratum_is_drawn_alike():
    strata = Strata.from_schedule(chain(11), 3)
    source = torch.Generator().manual_seed(0)
    drawn = np.stack([strata.draw(source) for _ in range(20_000)])
    counts = np.bincount(drawn.ravel(), minlength=11)
    assert counts[0] == 20_000
    for start, size in zip(strata.starts[1:], strata.sizes[1:], strict=True):
        assert stats.chisquare(counts[start : start + size]).pvalue > 1e-4


@pytest.mark.parametrize(("length", "count"), [(10, 1), (10, 11), (10, 0), (1, 2)])
def test_counts_out_of_range(length, count):
    with pytest.raises(ValueError, match=rf"num_timesteps={count} must be in \[2, {length}\]"):
        Strata.from_schedule(chain(length), count)


def test_an_estimate_is_its_parts_and_scipys_interval():
    rng = np.random.default_rng(0)
    strata = Strata.from_schedule(chain(20), 4)
    bits, prior = rng.normal(1, 0.2, (9, 4)), rng.uniform(0, 0.1, 9)
    got = estimate(bits, prior, strata, 0.9)
    totals = (bits * strata.sizes).sum(1) + prior
    low, high = stats.t.interval(0.9, 8, loc=totals.mean(), scale=stats.sem(totals))
    assert (got.low, got.high) == (pytest.approx(low, rel=1e-12), pytest.approx(high, rel=1e-12))
    assert got.bits_per_dim == pytest.approx(totals.mean(), rel=1e-12)
    assert got.prior + got.steps + got.decoder == pytest.approx(got.bits_per_dim, rel=1e-12)
    assert got.decoder == pytest.approx(bits[:, 0].mean(), rel=1e-12)
    assert got.num_images == 9


def test_a_single_image_has_no_interval():
    got = estimate(np.ones((1, 3)), np.zeros(1), Strata.from_schedule(chain(3)))
    assert (got.low, got.high) == (None, None)
    with pytest.raises(ValueError, match="confidence"):
        estimate(np.ones((1, 3)), np.zeros(1), Strata.from_schedule(chain(3)), 1.0)


def test_the_table_of_steps():
    bits, places = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]]), np.array([[0, 2], [0, 2], [0, 3]])
    rows = step_table(bits, places, np.array([0, 10, 20, 30]))
    assert rows == [(0, 3.0, pytest.approx(2 / 3**0.5), 3), (20, 3.0, pytest.approx(1.0), 2), (30, 9.0, None, 1)]


def gaussian_bits(scheduler, x0, places, noise, s2=0.5):
    """The bound's terms of Gaussian data of variance s2 under the exact posterior mean, at (image, place)."""
    steps = torch.from_numpy(scheduler.kept.timesteps.copy())[places]
    abar = torch.from_numpy(scheduler.schedule.alphas_cumprod.copy())[steps].reshape(-1, 1, 1, 1)
    xt = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
    clean = s2 * abar.sqrt() / (s2 * abar + 1 - abar) * xt
    return bound_terms(scheduler, clean, x0, xt, steps, decoder="continuous").bits


def population(scheduler, s2=0.5) -> float:
    """The bound's expectation, by nodes +-1 for data and noise, which are exact for quadratic terms."""
    count = len(scheduler.kept)
    total = 0.0
    for a in (-1.0, 1.0):
        for b in (-1.0, 1.0):
            x0 = torch.full((count, 1, 1, 1), a * s2**0.5, dtype=torch.float64)
            noise = torch.full((count, 1, 1, 1), b, dtype=torch.float64)
            bits = gaussian_bits(scheduler, x0, torch.arange(count), noise, s2)
            total += float(bits.sum() + prior_bits(scheduler, x0[:1])[0]) / 4
    return total


def test_intervals_cover_the_population():
    """8x8 Gaussian images, 64 of them, 10 steps each: 95 % intervals cover in 93 to 97 % of 1,000 repetitions."""
    scheduler = DDPMExtScheduler(num_train_timesteps=1000, prediction_type="sample")
    truth = population(scheduler)
    strata, images, repetitions = Strata.from_schedule(scheduler.schedule, 10), 64, 1000
    source = torch.Generator().manual_seed(11)
    covered = misses_high = 0
    for _ in range(repetitions):
        x0 = 0.5**0.5 * torch.randn(images, 1, 8, 8, generator=source, dtype=torch.float64)
        places = torch.from_numpy(np.stack([strata.draw(source) for _ in range(images)]))
        noise = torch.randn(images * 10, 1, 8, 8, generator=source, dtype=torch.float64)
        bits = gaussian_bits(scheduler, x0.repeat_interleave(10, 0), places.flatten(), noise)
        got = estimate(bits.reshape(images, 10), prior_bits(scheduler, x0), strata)
        covered += got.low <= truth <= got.high
        misses_high += truth > got.high
    assert 0.93 <= covered / repetitions <= 0.97
    assert misses_high < 0.05 * repetitions


def test_keys_make_draws_independent_of_their_neighbours():
    strata = Strata.from_schedule(chain(100), 5)
    first = [strata.draw(generator("bound", 0, image, "steps")) for image in range(4)]
    again = strata.draw(generator("bound", 0, 2, "steps"))
    np.testing.assert_array_equal(first[2], again)
    assert len({tuple(row) for row in np.stack(first)}) == 4

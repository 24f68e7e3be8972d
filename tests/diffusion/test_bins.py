"""Bins of the decoder for data of any depth: those of 16 bits tile those of 8 bits, and floats have a density."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from diffusers_ddpm_ext.diffusion.levels import choose_bins, discretized_gaussian_log_likelihood
from diffusers_ddpm_ext.diffusion.likelihood import normal_kl
from diffusers_ddpm_ext.training.data.pixel_values import full_range, to_pixels


def log_mass(levels: np.ndarray, mean: torch.Tensor, log_scale: float) -> torch.Tensor:
    """Log-probability of stored levels with the bins of their dtype, in nats."""
    pixel_format = full_range(levels.dtype.name)
    decoder, bin_width = choose_bins(None, None, pixel_format.num_levels)
    x = to_pixels(torch.from_numpy(levels), pixel_format).double()
    return discretized_gaussian_log_likelihood(x, mean, log_scale, bin_width=bin_width, decoder=decoder)


@pytest.mark.parametrize("std", [0.02, 0.3])
def test_bins_of_16_bits_tile_those_of_8_bits(std):
    """Level v of 8 bits is 257 v of 16: its bin is that of the levels 257 v - 128 to 257 v + 128."""
    levels, mean = np.arange(256), torch.linspace(-1.1, 1.1, 256, dtype=torch.float64)
    eight = log_mass(levels.astype(np.uint8), mean, np.log(std))
    tiles = levels[:, None] * 257 + np.arange(-128, 129)
    sixteen = log_mass(tiles.clip(0, 65535).astype(np.uint16), mean[:, None].expand(tiles.shape), np.log(std))
    inside = torch.from_numpy((tiles >= 0) & (tiles <= 65535))
    total = sixteen.masked_fill(~inside, -torch.inf).logsumexp(1)
    likely = eight > -500  # the float32 of a pixel moves a bin by 1e-8, which counts far out in the tail
    torch.testing.assert_close(total[likely], eight[likely], rtol=2e-5, atol=2e-5)
    assert likely.sum() > 50


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "uint32"])
def test_the_probabilities_of_all_levels_are_those_of_scipy(dtype):
    limits = np.iinfo(dtype)
    count = limits.max - limits.min
    levels = np.linspace(limits.min, limits.max, 64).round().astype(dtype)[1:-1]
    x = 2 * (levels.astype(np.float64) - limits.min) / count - 1
    mean = torch.from_numpy(x + 0.1)
    expected = norm.logcdf(x + 1 / count, x + 0.1, 0.3) + np.log1p(
        -np.exp(norm.logcdf(x - 1 / count, x + 0.1, 0.3) - norm.logcdf(x + 1 / count, x + 0.1, 0.3))
    )
    np.testing.assert_allclose(log_mass(levels, mean, np.log(0.3)).numpy(), expected, rtol=2e-6)


def test_floats_have_a_density_unless_bins_are_given():
    assert choose_bins(None, None, None)[0] == "continuous"
    assert choose_bins(None, 0.01, None) == ("exact", 0.01)
    assert choose_bins("improved_diffusion", None, 17) == ("improved_diffusion", 2 / 16)
    assert choose_bins("continuous", None, 256)[0] == "continuous"
    for decoder in ("exact", "improved_diffusion"):
        with pytest.raises(ValueError, match="floats have no levels: use continuous"):
            choose_bins(decoder, None, None)


@pytest.mark.parametrize(
    ("x", "mean", "log_scale", "match"),
    [
        (torch.zeros(4, 1, 8), torch.zeros(4, 8), -1.0, "shapes must be equal"),
        (torch.zeros(4), torch.zeros(4), torch.zeros(4, 1), r"log_scale has shape \(4, 1\)"),
        (torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(2), r"log_scale has shape \(2,\)"),
        (torch.zeros(4, dtype=torch.uint8), torch.zeros(4), -1.0, "floating"),
        (0.5, 0.5, -1.0, "x must be a tensor"),
    ],
)
def test_likelihoods_of_other_shapes_are_refused(x, mean, log_scale, match):
    """What would broadcast is the likelihood of nothing."""
    with pytest.raises(ValueError, match=match):
        discretized_gaussian_log_likelihood(x, mean, log_scale)


def test_a_divergence_of_integers_and_numbers():
    """KL of N(0, e^0.5) and N(0.5, 1), in closed form: the integer does not round the others."""
    expected = 0.5 * (math.exp(0.5) - 1 - 0.5 + 0.25)
    assert float(normal_kl(torch.tensor(0), 0.5, 0.5, 0.0)) == pytest.approx(expected, rel=1e-12)

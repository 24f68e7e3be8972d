"""Quantiles of long rows: those of torch, and a closed form where torch refuses."""

from __future__ import annotations

import math

import pytest
import torch

from diffusers_ddpm_ext import DDPMExtScheduler
from diffusers_ddpm_ext.utils import quantiles
from diffusers_ddpm_ext.utils.quantiles import row_quantiles


@pytest.mark.parametrize("share", [0.0, 0.3, 0.995, 1.0])
@pytest.mark.parametrize("limit", [2**24, 40, 7], ids=["at once", "row by row", "by order"])
def test_every_way_is_that_of_torch(share, limit, monkeypatch):
    values = torch.randn(5, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.quantile(values, share, dim=1, keepdim=True)
    monkeypatch.setattr(quantiles, "MAX_VALUES", limit)
    torch.testing.assert_close(row_quantiles(values, share), expected, rtol=1e-12, atol=0)


def test_a_row_that_torch_refuses():
    """0 to N - 1 in any order: the quantile is share (N - 1)."""
    count = 2**24 + 7
    values = torch.arange(count, dtype=torch.float64).roll(5)[None]
    assert float(row_quantiles(values, 0.25)) == pytest.approx(0.25 * (count - 1), rel=1e-12)
    values[0, 3] = math.nan
    assert math.isnan(float(row_quantiles(values, 0.25)))


@pytest.mark.parametrize("shape", [(0, 1, 4), (3,), (2, 3), (2, 1, 3, 4, 5)])
def test_thresholding_of_any_shape(shape):
    """A large sample is divided by its quantile, so that it ends in [-1, 1]."""
    scheduler = DDPMExtScheduler(10, prediction_type="sample", thresholding=True, sample_max_value=1e9)
    scheduler.set_timesteps(10)
    x0 = 100 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = scheduler.step(x0, 0, torch.zeros(shape))
    assert result.pred_original_sample.shape == shape
    assert bool((result.pred_original_sample.abs() <= 1).all())

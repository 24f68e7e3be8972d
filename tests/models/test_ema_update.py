"""Averages in bfloat16 against closed forms and float64, and updates in chunks against the fused one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from diffusers_ddpm_ext.models import ema_update
from diffusers_ddpm_ext.models.ema import LitEMA

NEIGHBORS = 2.0**-7  # distance of two bfloat16 numbers in [1, 2)


def filled(value: float, *shape: int) -> nn.Module:
    module = nn.Module()
    module.w = nn.Parameter(torch.full(shape, value))
    return module


def test_small_updates_count_on_average():
    """s starts at 1, p stays at 1.5: after n updates the distance is 0.5 (1 - w)^n. To nearest nothing would move.

    Each update that is cut off adds a variance of u w |p - s|, of which (1 - w)^2 per update remains; u is the
    distance of two neighbors.
    """
    updates, count = 500, 10_000
    ema = LitEMA(filled(1.0, count), 0.999, use_num_updates=False, dtype=torch.bfloat16)
    module, weight = filled(1.5, count), ema._weight(0)
    nearest = torch.ones(1, dtype=torch.bfloat16)
    variance = 0.0
    for update in range(updates):
        distance = 0.5 * (1 - weight) ** update
        variance = variance * (1 - weight) ** 2 + NEIGHBORS * weight * distance
        ema.step(module)
        nearest = nearest.float().lerp(torch.tensor(1.5), weight).bfloat16()
    shadow = ema.shadow["w"].double()
    assert float(nearest) == 1.0
    assert ema.shadow["w"].dtype == torch.bfloat16
    expected = 1.5 - 0.5 * (1 - weight) ** updates
    assert float(shadow.mean()) == pytest.approx(expected, abs=5 * math.sqrt(variance / count))
    assert float(shadow.std()) == pytest.approx(math.sqrt(variance), rel=0.1)


def test_a_wandering_parameter_is_followed_as_in_float64():
    """The error against a float64 average is noise: without a bias, and a few neighbors large."""
    generator = torch.Generator().manual_seed(0)
    module = filled(1.5, 4000)
    ema = LitEMA(module, 0.99, dtype=torch.bfloat16)
    exact = torch.full((4000,), 1.5, dtype=torch.float64)
    for _ in range(300):
        with torch.no_grad():
            module.w.add_(torch.randn(4000, generator=generator), alpha=0.003)
        ema.step(module)
        exact.lerp_(module.w.detach().double(), ema._weight(ema.num_updates))
    error = ema.shadow["w"].double() - exact
    assert float(error.mean()) == pytest.approx(0, abs=5 * float(error.std()) / math.sqrt(4000))
    assert float(error.std()) < 2 * NEIGHBORS


def test_rounding_takes_neighbors_and_keeps_the_mean():
    values = torch.tensor([0.0, 1.0, 1.001, -1.007, 3e38, -2e-30, 1e-40]).repeat(20_000, 1).T.contiguous()
    rounded = values.flatten().clone()
    ema_update.round_stochastically(rounded, torch.Generator().manual_seed(0))
    assert torch.equal(rounded, rounded.bfloat16().float())
    for value, row in zip(values[:, 0].tolist(), rounded.view_as(values).double(), strict=True):
        low, high = float(row.min()), float(row.max())
        assert low <= value <= high
        width = high - low
        assert len(row.unique()) == (2 if width else 1)
        assert float(row.mean()) == pytest.approx(value, abs=5 * width / 2 / math.sqrt(len(row)), rel=1e-12)
        assert width <= max(abs(value) * NEIGHBORS, 1e-40)


def test_values_that_are_not_finite_stay_so():
    """The largest NaN by its bits is what CUDA computes: one more bit would make it a zero."""
    largest = torch.tensor(2**31 - 1, dtype=torch.int32).view(torch.float32)
    values = torch.stack([largest, torch.tensor(math.inf), torch.tensor(-math.inf)]).repeat(1000)
    ema_update.round_stochastically(values, torch.Generator().manual_seed(0))
    assert values[::3].isnan().all()
    assert (values[1::3] == math.inf).all()
    assert (values[2::3] == -math.inf).all()


@pytest.mark.parametrize("chunk", [1, 40, 10**6])
def test_chunks_give_the_fused_update_to_the_bit(chunk, monkeypatch):
    """Also of channels-last weights, of mixed dtypes, and of a weight that is larger than a chunk."""
    monkeypatch.setattr(ema_update, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 3, 3), (5,), (), (4, 7), (0,)]
    shadows = [torch.randn(shape, generator=generator) for shape in shapes]
    shadows[0] = shadows[0].contiguous(memory_format=torch.channels_last)
    shadows[3] = shadows[3].double()
    sources = [torch.randn(shape, generator=generator) for shape in shapes]
    expected = [shadow.lerp(source.to(shadow.dtype), 0.1) for shadow, source in zip(shadows, sources, strict=True)]
    ema_update.update_in_chunks(shadows, sources, 0.1, step=0)
    assert all(torch.equal(a, b) for a, b in zip(shadows, expected, strict=True))
    assert shadows[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("warms_up", [True, False])
def test_an_average_in_bfloat16_resumes_to_the_bit(warms_up):
    def run(ema: LitEMA, steps: range) -> LitEMA:
        for step in steps:
            ema.step(filled(1 + step / 7, 50))
        return ema

    def new() -> LitEMA:
        return LitEMA(filled(1.0, 50), 0.9, warms_up, dtype=torch.bfloat16)

    straight, resumed = run(new(), range(9)), new()
    resumed.load_state_dict(run(new(), range(4)).state_dict())
    run(resumed, range(4, 9))
    assert torch.equal(straight.shadow["w"], resumed.shadow["w"])
    assert straight.scalars == resumed.scalars
    assert len(straight.shadow["w"].unique()) > 1  # it rounds by chance, and not all values alike


def test_a_half_average_reaches_a_network_in_float32():
    module = nn.Linear(3, 3)
    ema = LitEMA(module, dtype=torch.bfloat16)
    with ema.scope(module):
        assert module.weight.dtype == torch.float32
        assert torch.equal(module.weight, module.weight.bfloat16().float())
    assert not torch.equal(module.weight, module.weight.bfloat16().float())


def test_an_offloaded_average_has_the_same_values():
    """In main memory it stays there; the copies to a device and back are those of the test of chunks."""
    plain, offloaded = LitEMA(filled(1.0, 9), 0.9), LitEMA(filled(1.0, 9), 0.9, offload=True)
    for step in range(5):
        for ema in (plain, offloaded):
            ema.step(filled(1 + step / 3, 9))
    assert torch.equal(plain.shadow["w"], offloaded.shadow["w"])
    assert offloaded.scalars == plain.scalars


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, "bfloat16", torch.int8])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=r"dtype=.* must be torch.bfloat16, or None"):
        LitEMA(filled(1.0, 3), dtype=dtype)

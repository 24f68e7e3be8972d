"""Optimizer, clipping and learning-rate schedules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from diffusers_ddpm_ext.training.factory.optimizer import (
    LR_SCHEDULERS,
    adamw,
    clip_gradients,
    lr_schedule,
    parameter_groups,
)


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    made = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5, 3), (7,), (2, 2, 2))]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return made


@pytest.mark.parametrize("max_norm", [0.3, 1.0, 1000.0])
def test_clipping_equals_torchs(max_norm):
    ours, theirs = parameters(), parameters()
    norm = clip_gradients(ours, max_norm)
    expected = nn.utils.clip_grad_norm_(theirs, max_norm)
    torch.testing.assert_close(norm, expected)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_clipping_leaves_small_gradients_bit_for_bit():
    clipped, untouched = parameters(), parameters()
    clip_gradients(clipped, 1000.0)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(clipped, untouched, strict=True))


def test_clipping_keeps_a_gradient_non_finite():
    broken = parameters()
    broken[1].grad[2] = math.nan
    assert math.isnan(clip_gradients(broken, 1.0))
    assert all(torch.isnan(parameter.grad).all() for parameter in broken)


def test_fused_adamw_equals_adamw():
    """20 steps of the same gradients, with decay, against torch's plain loop."""
    ours, theirs = parameters(), parameters()
    fused = adamw(parameter_groups(ours, [], 0.1, 1.0), 1e-2, (0.9, 0.99), 1e-8)
    plain = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, foreach=False)
    for _ in range(20):
        fused.step()
        plain.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_logvar_has_its_own_rate_and_no_decay():
    """An entry that never gets a gradient does not change at all; a weight decays."""
    network, table = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))
    optimizer = adamw(parameter_groups([network], [table], 0.5, 2e-2), 1e-3, (0.9, 0.999), 1e-8)
    network.grad, table.grad = torch.zeros(3), torch.tensor([0.0, 0.0, 1.0, 0.0])
    for _ in range(3):
        optimizer.step()
    torch.testing.assert_close(network.detach(), torch.full((3,), (1 - 1e-3 * 0.5) ** 3))
    assert torch.equal(table.detach()[[0, 1, 3]], torch.ones(3))
    torch.testing.assert_close(table.detach()[2], torch.tensor(1 - 3 * 2e-2), rtol=1e-4, atol=0)


def rates(name: str, steps: int, **options: object) -> list[list[float]]:
    """Rates of both groups before each of the steps, and after the last."""
    network, table = parameters()[:2]
    optimizer = adamw(parameter_groups([network], [table], 0.0, 2e-2), 1e-3, (0.9, 0.999), 1e-8)
    schedule = lr_schedule(name, optimizer, steps, **options)
    seen = [schedule.get_last_lr()]
    for _ in range(steps):
        optimizer.step()
        schedule.step()
        seen.append(schedule.get_last_lr())
    return seen


def test_cosine_in_optimizer_steps():
    seen = rates("cosine", 10, warmup_steps=2)
    for n, (network, logvar) in enumerate(seen):
        factor = n / 2 if n < 2 else 0.5 * (1 + math.cos(math.pi * (n - 2) / 8))
        assert network == pytest.approx(1e-3 * factor, abs=1e-12)
        assert logvar == pytest.approx(2e-2 * factor, abs=1e-12), "logvar follows the run's schedule"


def test_compvis_lambda_by_class_name():
    arguments = {"warm_up_steps": [4], "f_min": [0.1], "f_max": [1.0], "f_start": [0.0], "cycle_lengths": [10]}
    seen = [network for network, _ in rates("LambdaLinearScheduler", 12, arguments=arguments)]
    assert seen[:5] == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4, 1e-3 * (0.1 + 0.9 * 0.6)])
    assert seen[10] == seen[12] == pytest.approx(1e-4)


@pytest.mark.parametrize("name", [n for n in LR_SCHEDULERS if not n.startswith("Lambda")])
def test_every_schedule_of_diffusers(name):
    arguments = {"step_rules": "1:3,0.5"} if name == "piecewise_constant" else {}
    assert len(rates(name, 5, arguments=arguments)) == 6


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cosin", {}, "choose from"),
        ("cosine", {"arguments": {"cycles": 2}}, "'cycles': cosine takes no arguments"),
        ("cosine_with_restarts", {"arguments": {"cycles": 2}}, "num_cycles"),
        ("LambdaLinearScheduler", {"arguments": {"f_min": [1]}}, "lr_scheduler_args"),
        ("LambdaLinearScheduler", {"warmup_steps": 5}, "lr_warmup_steps"),
        ("piecewise_constant", {}, "lr_scheduler"),
    ],
)
def test_invalid_schedules_raise(name, options, message):
    optimizer = torch.optim.SGD(parameters(), lr=1.0)
    with pytest.raises(ValueError, match="lr_scheduler") as raised:
        lr_schedule(name, optimizer, 10, **options)
    assert message in str(raised.value)

"""The task: noise, network, loss, with nothing but the network in low precision."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.losses.objective import DDPMObjective
from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler
from diffusers_ddpm_ext.training.factory.task import DenoisingTask


class Scale(nn.Module):
    """A network that multiplies, and remembers what it was given."""

    def __init__(self, factor: float = 0.5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, 1), factor))
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, xt: Tensor, t: Tensor) -> SimpleNamespace:
        self.seen.append((xt.detach(), t))
        flat = xt.reshape(-1, 1) @ self.weight  # a product, so that autocast has something to cast
        return SimpleNamespace(sample=flat.reshape(xt.shape))


def draws(batch: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x0, noise = (torch.randn(batch, 1, 4, 4, generator=generator) for _ in range(2))
    return x0, noise, torch.tensor([0, 0, 1, 30, 98, 99])[:batch]


def test_loss_is_the_formula():
    """eps-prediction by ``xt / 2``: mean over samples of mean((xt / 2 - eps)^2), written out in NumPy."""
    scheduler = DDPMExtScheduler(num_train_timesteps=100)
    x0, noise, t = draws()
    output = DenoisingTask(Scale(), DDPMObjective(scheduler))(x0, noise, t)
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 100))[t.numpy()][:, None, None, None]
    xt = np.sqrt(abar) * x0.numpy().astype(float) + np.sqrt(1 - abar) * noise.numpy().astype(float)
    expected = ((0.5 * xt - noise.numpy()) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(output.per_sample_simple.detach().numpy(), expected, rtol=2e-6)
    np.testing.assert_allclose(output.loss.item(), expected.mean(), rtol=2e-6)


def test_only_the_network_runs_in_bfloat16():
    """In bfloat16 the first steps of the chain would have no noise at all."""
    task = DenoisingTask(Scale(), DDPMObjective(DDPMExtScheduler(num_train_timesteps=100, beta_end=2e-3)))
    x0, noise, t = draws()
    plain = task(x0, noise, t)
    with torch.autocast("cpu", torch.bfloat16):
        low = task(x0, noise, t)
    assert torch.equal(task.denoiser.seen[0][0], task.denoiser.seen[1][0])
    assert task.denoiser.seen[1][0].dtype == torch.float32
    assert not torch.equal(task.denoiser.seen[1][0][:2], x0[:2]), "step 0 has a little noise"
    assert low.loss.dtype == low.per_sample_loss.dtype == torch.float32
    assert not torch.equal(low.loss, plain.loss), "the network did run in bfloat16"
    torch.testing.assert_close(low.loss, plain.loss, rtol=0.02, atol=0)


def test_one_module_holds_network_and_logvar():
    """Data-parallel wrappers average the gradients of what they are given, and of nothing else."""
    objective = DDPMObjective(DDPMExtScheduler(num_train_timesteps=100), learn_logvar=True)
    task = DenoisingTask(Scale(), objective)
    assert {name for name, _ in task.named_parameters()} == {"denoiser.weight", "objective.logvar"}
    task(*draws()).loss.backward()
    touched = objective.logvar.grad.nonzero().flatten().tolist()
    assert set(touched) <= {0, 1, 30, 98, 99}
    assert len(touched) >= 4

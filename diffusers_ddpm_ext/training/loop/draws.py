"""Noise and timesteps of a micro-batch: drawn on the host where reading is free, else on the device that uses them.

Both are functions of the seed, the step and the position in the effective batch. They are different numbers: torch's
generator, which a CPU makes fast, and Philox, which needs no transfer to an accelerator.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_ddpm_ext.diffusion.timesteps import TimestepSampler, stratify
from diffusers_ddpm_ext.training.data.batches import Batch
from diffusers_ddpm_ext.training.loop.setup import Setup
from diffusers_ddpm_ext.utils import device_random
from diffusers_ddpm_ext.utils import random_keys as keys
from diffusers_ddpm_ext.utils.host_reads import reads_are_free

ORDER = f"{keys.TIMESTEP}/order"


@dataclass(frozen=True)
class Draws:
    """What is random in the loss of a micro-batch, on the run's device.

    Attributes:
        noise: standard normal, (b, C, H, W), float32.
        timesteps: (b,), int64.
        weights: of the timesteps, (b,), float64; None where they are drawn uniformly.
        positions: of the samples in the effective batch, (b,).
    """

    noise: Tensor
    timesteps: Tensor
    weights: Tensor | None
    positions: Tensor


def draw(setup: Setup, step: int, batch: Batch) -> Draws:
    """The draws of a micro-batch of step ``step``."""
    shape, positions = setup.trained.noise_shape(batch.pixels.shape[1:]), batch.positions
    if reads_are_free(setup.accelerator.device):
        uniform, noise = keys.sample_draws(setup.seed, step, positions, shape, setup.num_train_timesteps)
        return Draws(noise, *_draw_on_host(setup, step, positions, uniform), positions)
    positions = positions.to(setup.accelerator.device, non_blocking=True)
    noise = device_random.normal_draws(setup.seed, step, positions, shape)
    return Draws(noise, *_draw_on_device(setup, step, positions), positions)


def _draw_on_host(setup: Setup, step: int, positions: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor | None]:
    """Timesteps and weights; ``uniform`` are the timesteps that were drawn uniformly together with the noise."""
    sampler = setup.trained.sampler
    if sampler is None or sampler.is_uniform:
        return uniform, None
    u = keys.uniform_draws(setup.seed, step, positions)
    if sampler.stratified:
        order = torch.randperm(
            setup.plan.effective_batch, generator=keys.generator(keys.TIMESTEP, setup.seed, step, "order")
        )
        u = stratify(u, positions, order)
    return sampler.draw(u)


def _draw_on_device(setup: Setup, step: int, positions: Tensor) -> tuple[Tensor, Tensor | None]:
    sampler = setup.trained.sampler or TimestepSampler(None, setup.num_train_timesteps)
    u = device_random.uniform_draws(setup.seed, step, positions)
    if sampler.stratified:
        order = device_random.permutation(setup.seed, step, setup.plan.effective_batch, positions.device, ORDER)
        u = stratify(u, positions, order)
    return sampler.draw(u)

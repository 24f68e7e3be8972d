"""One optimizer step, over all its micro-batches and processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from diffusers_ddpm_ext.diffusion.timesteps import TimestepSampler, stratify
from diffusers_ddpm_ext.training.data.batches import Batch
from diffusers_ddpm_ext.training.distributed import any_rank, gather_rows
from diffusers_ddpm_ext.training.factory.optimizer import clip_gradients, gradient_norms
from diffusers_ddpm_ext.training.loop.setup import Setup
from diffusers_ddpm_ext.training.tracking.step_losses import StepOutput, StepTrace
from diffusers_ddpm_ext.utils import random_keys as keys


@dataclass(frozen=True)
class MicroBatchResult:
    """A micro-batch after its backward pass.

    Attributes:
        output: losses.
        images: which images of the training set it holds, (b,).
        positions: of its samples in the effective batch, (b,).
        timesteps: (b,), int64, on the CPU.
    """

    output: StepOutput
    images: Tensor
    positions: Tensor
    timesteps: Tensor


def train_step(setup: Setup, step: int, batches: Iterator[Batch]) -> StepTrace:
    """Take one optimizer step. Collective call: every process must make it.

    Args:
        setup: whose weights, optimizer, learning rate and average are updated.
        step: optimizer steps done before.
        batches: this process's micro-batches.

    Returns:
        The trace of the step. Its ``applied`` is the same in all processes: False where ``on_nonfinite`` checks every
        step and this one was not finite. Then weights, optimizer and average are unchanged and the learning rate
        advances.
    """
    optimizer, ema = setup.optimizer, setup.ema
    learning_rate = float(setup.lr_scheduler.get_last_lr()[0])
    every_micro_batch = setup.config.ema.ema_every == "micro_batch"
    check_each_step = setup.config.loop.on_nonfinite != "stop"
    results: list[MicroBatchResult] = []
    applied = True
    norms = torch.empty(0)
    for micro in range(setup.plan.accumulation):
        with setup.accelerator.accumulate(setup.task):
            results.append(forward_backward(setup, step, micro, next(batches)))
            if setup.accelerator.sync_gradients:
                norms = clip(setup)
                outputs = [result.output for result in results]
                applied = not check_each_step or is_finite(setup.accelerator, outputs, norms)
                if applied:
                    optimizer.step()
                elif setup.accelerator.scaler is not None:
                    setup.accelerator.scaler.update()  # or it would mistake the next step for this one
            optimizer.zero_grad()
        if ema is not None and every_micro_batch and applied:
            ema.step(setup.trained.network)
    if applied and setup.trained.sampler is not None and setup.trained.sampler.learns:
        update_sampler(setup.trained.sampler, setup.accelerator, results)
    setup.lr_scheduler.step()
    if ema is not None and not every_micro_batch and applied:
        ema.step(setup.trained.network)
    return StepTrace(
        step + 1,
        learning_rate,
        [result.output for result in results],
        [result.images for result in results],
        [result.timesteps for result in results],
        norms,
        applied,
    )


def forward_backward(setup: Setup, step: int, micro: int, batch: Batch) -> MicroBatchResult:
    """Forward and backward pass of a micro-batch, number ``micro`` of its step."""
    device = setup.accelerator.device
    if setup.latents is not None:
        batch = setup.latents.encode_batch(batch)
    shape = setup.trained.noise_shape(batch.pixels.shape[1:])
    t, noise = keys.sample_draws(setup.seed, step, batch.positions, shape, setup.num_train_timesteps)
    t, weights = draw_timesteps(setup, step, batch.positions, t)
    seed_dropout(setup.accelerator, setup.seed, step, micro)
    draws = (noise.to(device, non_blocking=True), t.to(device, non_blocking=True))
    conditions = () if setup.trained.conditioning.conditioning_key is None else (batch.conditions,)
    kwargs = {} if weights is None else {"weights": weights.to(device, non_blocking=True)}
    output = setup.task(batch.pixels, *draws, *conditions, **kwargs)
    setup.accelerator.backward(output.loss)
    return MicroBatchResult(output, batch.indices, batch.positions, t)


def draw_timesteps(setup: Setup, step: int, positions: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor | None]:
    """Timesteps (B,) of a micro-batch by the run's sampler, and their weights (B,); None where all weights are 1.

    ``uniform`` are the timesteps that were drawn uniformly together with the noise.
    """
    sampler = setup.trained.sampler
    if sampler is None or (sampler.probabilities() is None and not sampler.stratified):
        return uniform, None
    u = keys.uniform_draws(setup.seed, step, positions)
    if sampler.stratified:
        order = torch.randperm(
            setup.plan.effective_batch, generator=keys.generator(keys.TIMESTEP, setup.seed, step, "order")
        )
        u = stratify(u, positions, order)
    return sampler.draw(u)


@torch.no_grad()
def update_sampler(sampler: TimestepSampler, accelerator: Accelerator, results: Sequence[MicroBatchResult]) -> None:
    """Update a sampler that learns from the losses of all processes, in the order of the effective batch."""
    positions = torch.cat([result.positions for result in results]).double()
    timesteps = torch.cat([result.timesteps for result in results]).double()
    losses = torch.cat([result.output.per_sample_loss.detach().double().cpu() for result in results])
    rows = gather_rows(accelerator, torch.stack([positions, timesteps, losses], 1))
    rows = rows[torch.argsort(rows[:, 0], stable=True)]
    sampler.update(rows[:, 1].long(), rows[:, 2])


def seed_dropout(accelerator: Accelerator, seed: int, step: int, micro: int) -> None:
    """Make dropout a function of the seed, the step, the micro-batch and the process."""
    number = keys.key(keys.DROPOUT, seed, step, micro, accelerator.process_index)
    if accelerator.device.type == "cpu":
        torch.default_generator.manual_seed(number)  # torch.manual_seed searches for every kind of device each time
    else:
        torch.manual_seed(number)


def clip(setup: Setup) -> Tensor:
    """Clip the gradients of network and log-variances separately: neither must shrink the other's steps.

    Returns the norms of the gradients of the network's parameters before clipping, (n,), on its device.
    """
    setup.accelerator.unscale_gradients()
    max_norm = setup.config.optim.max_grad_norm
    if setup.learns_logvar:
        clip_gradients(setup.logvar_parameters, max_norm)
    norms = gradient_norms(setup.network_parameters)
    clip_gradients(setup.network_parameters, max_norm, norms)
    return norms


def is_finite(accelerator: Accelerator, outputs: Sequence[StepOutput], norms: Tensor) -> bool:
    """Whether every loss and gradient of a step is finite in all processes. Collective call.

    ``norms``, from `clip`, are ignored under a loss scaler, which skips steps with non-finite gradients itself.
    """
    losses = torch.stack([output.loss.detach() for output in outputs])
    values = losses if accelerator.scaler is not None else torch.cat([losses, norms.to(losses)])
    return not any_rank(accelerator, not bool(torch.isfinite(values).all()))

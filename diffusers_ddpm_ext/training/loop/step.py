"""One optimizer step, over all its micro-batches and processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from diffusers_ddpm_ext.diffusion.levels import exact_dtype
from diffusers_ddpm_ext.diffusion.timesteps import TimestepSampler
from diffusers_ddpm_ext.training.data.batches import Batch
from diffusers_ddpm_ext.training.distributed import gather_rows
from diffusers_ddpm_ext.training.factory.optimizer import clip_gradients, gradient_norms
from diffusers_ddpm_ext.training.loop.draws import draw
from diffusers_ddpm_ext.training.loop.setup import Setup
from diffusers_ddpm_ext.training.loop.verdict import APPLIED, Verdict, judge, step_optimizer
from diffusers_ddpm_ext.training.tracking.step_losses import StepOutput, StepTrace
from diffusers_ddpm_ext.utils import random_keys as keys
from diffusers_ddpm_ext.utils.host_reads import reads_are_free


@dataclass(frozen=True)
class MicroBatchResult:
    """A micro-batch after its backward pass.

    Attributes:
        output: losses.
        images: which images of the training set it holds, (b,).
        positions: of its samples in the effective batch, (b,).
        timesteps: (b,), int64; with the positions on the CPU, or on an accelerator there.
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
        The trace of the step. Its verdict is the same in all processes: not applied where ``on_nonfinite`` checks
        every step and this one was not finite. Then weights, optimizer and average are unchanged and the learning rate
        advances.
    """
    ema, network = setup.ema, setup.trained.network
    learning_rate = float(setup.lr_scheduler.get_last_lr()[0])
    every_micro_batch = setup.config.ema.ema_every == "micro_batch"
    check_each_step = setup.config.loop.on_nonfinite != "stop"
    results: list[MicroBatchResult] = []
    verdict, norms = APPLIED, torch.empty(0)
    for micro in range(setup.plan.accumulation):
        with setup.accelerator.accumulate(setup.task):
            results.append(forward_backward(setup, step, micro, next(batches)))
            if setup.accelerator.sync_gradients:
                norms = clip(setup)
                if check_each_step:
                    outputs = [result.output for result in results]
                    verdict = judge(setup.accelerator, setup.optimizer, outputs, norms)
                step_optimizer(setup.accelerator, setup.optimizer, verdict)
                drop_gradients(setup.optimizer)
        if ema is not None and every_micro_batch:
            verdict.step_average(ema, network)
    if verdict.applied and setup.trained.sampler is not None and setup.trained.sampler.learns:
        update_sampler(setup.trained.sampler, setup.accelerator, results, verdict)
    setup.lr_scheduler.step()
    if ema is not None and not every_micro_batch:
        verdict.step_average(ema, network)
    return StepTrace(
        step + 1,
        learning_rate,
        [result.output for result in results],
        [result.images for result in results],
        [result.timesteps for result in results],
        norms,
        verdict.applied,
        verdict.skipped,
    )


def forward_backward(setup: Setup, step: int, micro: int, batch: Batch) -> MicroBatchResult:
    """Forward and backward pass of a micro-batch, number ``micro`` of its step."""
    if setup.latents is not None:
        batch = setup.latents.encode_batch(batch)
    draws = draw(setup, step, batch)
    seed_dropout(setup.accelerator, setup.seed, step, micro)
    conditions = () if setup.trained.conditioning.conditioning_key is None else (batch.conditions,)
    kwargs = {} if draws.weights is None else {"weights": draws.weights}
    output = setup.task(batch.pixels, draws.noise, draws.timesteps, *conditions, **kwargs)
    setup.accelerator.backward(output.loss)
    return MicroBatchResult(output, batch.indices, draws.positions, draws.timesteps)


@torch.no_grad()
def update_sampler(
    sampler: TimestepSampler, accelerator: Accelerator, results: Sequence[MicroBatchResult], verdict: Verdict
) -> None:
    """Update a sampler that learns from the losses of all processes, in the order of the effective batch."""
    losses = verdict.without_skipped(torch.cat([result.output.per_sample_loss.detach() for result in results]))
    dtype = exact_dtype(losses.device)
    positions = torch.cat([result.positions for result in results]).to(dtype)
    timesteps = torch.cat([result.timesteps for result in results]).to(dtype)
    rows = torch.stack([positions, timesteps, losses.to(dtype)], 1)
    if reads_are_free(losses.device):
        rows = gather_rows(accelerator, rows)
    elif accelerator.num_processes > 1:
        rows = accelerator.gather(rows)
    rows = rows[torch.argsort(rows[:, 0], stable=True)]
    sampler.update(rows[:, 1].long(), rows[:, 2])


def seed_dropout(accelerator: Accelerator, seed: int, step: int, micro: int) -> None:
    """Make dropout a function of the seed, the step, the micro-batch and the process."""
    number = keys.key(keys.DROPOUT, seed, step, micro, accelerator.process_index)
    if accelerator.device.type == "cpu":
        torch.default_generator.manual_seed(number)  # torch.manual_seed searches for every kind of device each time
    else:
        torch.manual_seed(number)


def drop_gradients(optimizer: torch.optim.Optimizer) -> None:
    """What ``optimizer.zero_grad()`` does, which inspects signatures and opens a profiler's scope at every step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


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

"""One optimizer step, over all its micro-batches and processes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from diffusers_ddpm_ext.diffusion.timesteps import stratify
from diffusers_ddpm_ext.losses.objective import ObjectiveOutput
from diffusers_ddpm_ext.training.data.batches import Batch
from diffusers_ddpm_ext.training.distributed import any_rank, gather_rows
from diffusers_ddpm_ext.training.factory.optimizer import clip_gradients, gradient_norms
from diffusers_ddpm_ext.training.loop.run import Run
from diffusers_ddpm_ext.training.tracking.step_losses import StepTrace
from diffusers_ddpm_ext.utils import random_keys as keys


def train_step(run: Run, batches: Iterator[Batch]) -> bool:
    """Take one optimizer step.

    Args:
        run: its step is one higher afterwards.
        batches: this process's micro-batches.

    Returns:
        Whether the weights moved; the same in all processes. False where ``on_nonfinite`` looks at every step and this
        one was not finite: weights, optimizer and average are as they were, the learning rate went on.
    """
    accelerator, device = run.accelerator, run.accelerator.device
    learning_rate = float(run.lr_scheduler.get_last_lr()[0])
    each_forward = run.config.ema.ema_every == "micro_batch"
    taken: list[tuple[ObjectiveOutput, Tensor, Tensor]] = []
    places: list[Tensor] = []
    applied = True
    norms = torch.empty(0)
    for micro in range(run.plan.accumulation):
        batch = next(batches)
        t, noise = keys.sample_draws(
            run.seed, run.step, batch.positions, batch.pixels.shape[1:], run.num_train_timesteps
        )
        t, weights = chosen_steps(run, batch.positions, t)
        seed_dropout(run, micro)
        with accelerator.accumulate(run.task):
            draws = (noise.to(device, non_blocking=True), t.to(device, non_blocking=True))
            conditions = () if run.parts.conditioning.conditioning_key is None else (batch.conditions,)
            named = {} if weights is None else {"weights": weights.to(device, non_blocking=True)}
            output = run.task(batch.pixels, *draws, *conditions, **named)
            accelerator.backward(output.loss)
            taken.append((output, batch.indices, t))
            places.append(batch.positions)
            if accelerator.sync_gradients:
                norms = clip(run)
                applied = run.config.loop.on_nonfinite == "stop" or is_finite(run, [out for out, *_ in taken], norms)
                if applied:
                    run.optimizer.step()
                elif accelerator.scaler is not None:
                    accelerator.scaler.update()  # or it would take the next step for this one
            run.optimizer.zero_grad()
        if run.ema is not None and each_forward and applied:
            run.ema.step(run.denoiser)
    if applied:
        tell_sampler(run, taken, places)
    run.lr_scheduler.step()
    if run.ema is not None and not each_forward and applied:
        run.ema.step(run.denoiser)
    run.step += 1
    outputs, images, timesteps = (list(part) for part in zip(*taken, strict=True))
    run.meter.add(StepTrace(run.step, learning_rate, outputs, images, timesteps, norms, applied))
    return applied


def chosen_steps(run: Run, positions: Tensor, even: Tensor) -> tuple[Tensor, Tensor | None]:
    """The steps of a micro-batch by the run's sampler.

    Args:
        run: before a step.
        positions: of the samples in the effective batch.
        even: the steps that were drawn evenly with the noise.

    Returns:
        Steps (B,), and their weights (B,); None where all are 1.
    """
    sampler = run.parts.sampler
    if sampler is None or (sampler.probabilities() is None and not sampler.stratified):
        return even, None
    u = keys.uniform_draws(run.seed, run.step, positions)
    if sampler.stratified:
        order = torch.randperm(
            run.plan.effective_batch, generator=keys.generator(keys.TIMESTEP, run.seed, run.step, "order")
        )
        u = stratify(u, positions, order)
    return sampler.draw(u)


@torch.no_grad()
def tell_sampler(run: Run, taken: list[tuple[ObjectiveOutput, Tensor, Tensor]], places: list[Tensor]) -> None:
    """Tell a sampler that learns the losses of a step, those of all processes, in the order of the effective batch.

    Args:
        run: after a step that was applied.
        taken: of its micro-batches: losses, images and steps.
        places: of their samples in the effective batch.
    """
    sampler = run.parts.sampler
    if sampler is None or not sampler.learns:
        return
    losses = torch.cat([output.per_sample_loss.detach().double().cpu() for output, *_ in taken])
    steps = torch.cat([t for *_, t in taken])
    whole = gather_rows(run.accelerator, torch.stack([torch.cat(places).double(), steps.double(), losses], 1))
    whole = whole[torch.argsort(whole[:, 0], stable=True)]
    sampler.update(whole[:, 1].long(), whole[:, 2])


def seed_dropout(run: Run, micro: int) -> None:
    """Make dropout a function of the seed, the step, the micro-batch and the process.

    Args:
        run: before a forward pass.
        micro: number of the micro-batch in its step.
    """
    number = keys.key(keys.DROPOUT, run.seed, run.step, micro, run.accelerator.process_index)
    if run.accelerator.device.type == "cpu":
        torch.default_generator.manual_seed(number)  # torch.manual_seed looks for every kind of device each time
    else:
        torch.manual_seed(number)


def clip(run: Run) -> Tensor:
    """Limit the gradients, the network's and the log-variances' apart: one must not shrink the other's steps.

    Args:
        run: after the last backward pass of a step.

    Returns:
        The norms of the gradients of the network's parameters before, (n,), on its device.
    """
    run.accelerator.unscale_gradients()
    max_norm = run.config.optim.max_grad_norm
    if run.learns_logvar:
        clip_gradients(run.logvar_parameters, max_norm)
    norms = gradient_norms(run.network)
    clip_gradients(run.network, max_norm, norms)
    return norms


def is_finite(run: Run, outputs: list[ObjectiveOutput], norms: Tensor) -> bool:
    """Whether a step may move the weights; all processes enter and agree.

    Args:
        run: after the last backward pass of a step.
        outputs: of its micro-batches.
        norms: from `clip`; they do not count under a loss scaler, which leaves such steps out itself.

    Returns:
        Whether every loss and gradient is finite.
    """
    losses = torch.stack([output.loss.detach() for output in outputs])
    values = losses if run.accelerator.scaler is not None else torch.cat([losses, norms.to(losses)])
    return not any_rank(run.accelerator, not bool(torch.isfinite(values).all()))

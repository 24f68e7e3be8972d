"""A small run with every object that has state, for tests in one process and in two."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.losses.objective import DDPMObjective
from diffusers_ddpm_ext.models.ema import LitEMA
from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler
from diffusers_ddpm_ext.training.checkpoints.snapshot import Progress, Snapshot, read_snapshot, write_snapshot
from diffusers_ddpm_ext.training.checkpoints.state import TrainingObjects
from diffusers_ddpm_ext.training.factory.optimizer import adamw, clip_gradients, lr_schedule, parameter_groups
from diffusers_ddpm_ext.training.factory.task import DenoisingTask
from diffusers_ddpm_ext.utils import random_keys as keys
from helpers.tiny import tiny_unet

T = 20
BATCH = 4
CYCLE = {"warm_up_steps": [3], "f_min": [0.1], "f_max": [1.0], "f_start": [0.01], "cycle_lengths": [9]}


@dataclass
class SmallRun:
    """A run: the objects with state, and the task without wrappers."""

    objects: TrainingObjects
    task: DenoisingTask
    step: int = 0

    @property
    def progress(self) -> Progress:
        return Progress(self.step, 0, self.step * BATCH, 7, 1, {"seed": 7}, "digits", {"metrics_size": self.step})


def small_task(
    prediction_type: str = "epsilon", learn_logvar: bool = True, channels: int = 1, **network: int
) -> DenoisingTask:
    denoiser = tiny_unet(channels).train()
    scheduler = DDPMExtScheduler(num_train_timesteps=T, prediction_type=prediction_type)
    return DenoisingTask(denoiser, DDPMObjective(scheduler, learn_logvar=learn_logvar, **network))


def small_run(
    task: DenoisingTask, wrapped: nn.Module | None = None, schedule: str = "LambdaLinearScheduler"
) -> SmallRun:
    """Optimizer, LR scheduler and EMA for a task that is already wrapped or sharded."""
    arguments = CYCLE if schedule == "LambdaLinearScheduler" else {}
    groups = parameter_groups(task.denoiser.parameters(), task.objective.parameters(), 0.01, 2e-2)
    optimizer = adamw(groups, 1e-3, (0.9, 0.999), 1e-8)
    warmup_steps = 0 if arguments or schedule == "constant" else 2
    lr_scheduler = lr_schedule(schedule, optimizer, 9, warmup_steps, arguments)
    return SmallRun(TrainingObjects(wrapped or task, optimizer, lr_scheduler, LitEMA(task.denoiser, 0.99)), task)


def draws(step: int, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Images, timesteps and noise as functions of the step and the position in the effective batch."""
    t, noise = keys.sample_draws(7, step, positions, torch.Size((1, 8, 8)), T)
    _, images = keys.sample_draws(8, step, positions, torch.Size((1, 8, 8)), T)
    return images.tanh(), noise, t


def advance(run: SmallRun, steps: int, accumulation: int = 1, rank: int = 0, world: int = 1) -> None:
    """Train, with this process's share of the effective batch."""
    share = BATCH // accumulation // world
    for _ in range(steps):
        for micro in range(accumulation):
            start = (micro * world + rank) * share
            images, noise, t = draws(run.step, torch.arange(start, start + share))
            (run.objects.task(images, noise, t).loss / accumulation).backward()
        if run.task.objective.learn_logvar:
            clip_gradients([run.task.objective.logvar], 1.0)
        clip_gradients(list(run.task.denoiser.parameters()), 1.0)
        run.objects.optimizer.step()
        run.objects.optimizer.zero_grad()
        run.objects.lr_scheduler.step()
        assert run.objects.ema is not None
        run.objects.ema.step(run.task.denoiser)
        run.step += 1


def through_files(snapshot: Snapshot, folder: Path) -> Snapshot:
    folder.mkdir(exist_ok=True)
    write_snapshot(snapshot, folder)
    return read_snapshot(folder)


def bits(tensor: Tensor) -> Tensor:
    """Bytes, so that 0.0 and -0.0 differ and NaN equals itself."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_same(one: Snapshot, other: Snapshot) -> None:
    """Bit-identical tensors, equal files, keys and scalars."""
    assert one.files.keys() == other.files.keys()
    for name, tensors in one.files.items():
        assert tensors.keys() == other.files[name].keys(), name
        for key, tensor in tensors.items():
            expected = other.files[name][key]
            assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape), key
            assert torch.equal(bits(tensor), bits(expected)), key
    # JSON has no tuples.
    for one_group, other_group in zip(one.scalars.groups, other.scalars.groups, strict=True):
        assert {k: list(v) if isinstance(v, tuple) else v for k, v in one_group.items()} == {
            k: list(v) if isinstance(v, tuple) else v for k, v in other_group.items()
        }
    assert one.scalars.lr_scheduler == other.scalars.lr_scheduler
    assert one.scalars.ema == other.scalars.ema
    assert one.scalars.scaler == other.scalars.scaler


def largest_difference(one: Snapshot, other: Snapshot) -> float:
    """The largest difference between tensors of two snapshots, relative to 1 where they are smaller."""
    largest = 0.0
    for name, tensors in one.files.items():
        for key, tensor in tensors.items():
            difference = (tensor - other.files[name][key]).abs() / other.files[name][key].abs().clamp_min(1)
            largest = max(largest, float(difference.max()))
    return largest

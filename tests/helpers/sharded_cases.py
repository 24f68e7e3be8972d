"""Cases of test_sharded.py, run by two processes that torchrun starts."""

from __future__ import annotations

import copy
import faulthandler
import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from diffusers_ddpm_ext.models.ema import LitEMA
from diffusers_ddpm_ext.training.checkpoints.restore import restore_snapshot
from diffusers_ddpm_ext.training.checkpoints.snapshot import Progress, Snapshot, read_snapshot, write_snapshot
from diffusers_ddpm_ext.training.checkpoints.state import TrainingObjects, capture_snapshot
from diffusers_ddpm_ext.training.factory.optimizer import clip_gradients
from diffusers_ddpm_ext.training.factory.task import DenoisingTask
from diffusers_ddpm_ext.utils.dtensor import full_tensor, is_sharded, local_tensor, reshard
from helpers.state_cases import (
    SmallRun,
    advance,
    assert_same,
    draws,
    largest_difference,
    small_run,
    small_task,
    through_files,
)

SECONDS_PER_CASE = 180
"""A case that takes longer ends the process with a traceback."""

CASES: dict[str, Callable[[Path], None]] = {}


def case(function: Callable[[Path], None]) -> Callable[[Path], None]:
    CASES[function.__name__] = function
    return function


def rank() -> int:
    return dist.get_rank()


def shard(task: DenoisingTask) -> DenoisingTask:
    """Each block by itself, then the task around them, whose log-variances are sharded, too."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in [*task.denoiser.down_blocks, task.denoiser.mid_block, *task.denoiser.up_blocks]:
        fully_shard(block, mesh=mesh)
    return fully_shard(task, mesh=mesh)


def sharded_run() -> SmallRun:
    return small_run(shard(small_task()))


def ddp_run() -> SmallRun:
    task = small_task()
    return small_run(task, DistributedDataParallel(task))


def train(run: SmallRun, steps: int) -> None:
    advance(run, steps, rank=rank(), world=2)


def saved_snapshot(run: SmallRun, folder: Path) -> Snapshot | None:
    """A snapshot after a round trip through its files."""
    snapshot = capture_snapshot(run.objects, run.progress)
    assert (snapshot is None) == (rank() > 0)
    return None if snapshot is None else through_files(snapshot, folder)


@case
def sharded_to_plain_to_sharded(folder: Path) -> None:
    """State is bit-identical both ways, and so are further steps of the sharded run."""
    run, again = sharded_run(), sharded_run()
    train(run, 3)
    empty = {local_tensor(p).numel() == 0 for p in run.task.parameters()}
    assert empty == ({False} if rank() == 0 else {False, True}), "the case needs a process with an empty shard"
    saved = saved_snapshot(run, folder / "a")
    middle = None
    if saved is not None:
        middle = plain_copy(saved)
        assert_same(saved, middle)
    progress = restore_snapshot(middle, again.objects)
    assert progress.step == 3, "every process gets the progress"
    again.step = progress.step
    loaded = saved_snapshot(again, folder / "b")
    if saved is not None and loaded is not None:
        assert_same(saved, loaded)
    for each in (run, again):
        train(each, 2)
    one, other = saved_snapshot(run, folder / "c"), saved_snapshot(again, folder / "d")
    if one is not None and other is not None:
        assert_same(one, other)


def plain_copy(snapshot: Snapshot) -> Snapshot:
    """Restored and captured again by a run of one process, which ignores the process group."""
    single = small_run(small_task())
    single.step = restore_in_one_process(snapshot, single.objects).step
    return capture_in_one_process(single)


def restore_in_one_process(snapshot: Snapshot, objects: TrainingObjects) -> Progress:
    with without_process_group():
        return restore_snapshot(snapshot, objects)


def capture_in_one_process(run: SmallRun) -> Snapshot:
    with without_process_group():
        snapshot = capture_snapshot(run.objects, run.progress)
    assert snapshot is not None
    return snapshot


class without_process_group:
    """Hide the process group, as in a run of one process."""

    def __enter__(self) -> None:
        self.real = dist.is_initialized
        dist.is_initialized = lambda: False

    def __exit__(self, *_: object) -> None:
        dist.is_initialized = self.real


@case
def capturing_changes_nothing(folder: Path) -> None:
    watched, straight = sharded_run(), sharded_run()
    for _ in range(3):
        capture_snapshot(watched.objects, watched.progress)  # the first time before the optimizer has state
        train(watched, 1)
        train(straight, 1)
    one, other = saved_snapshot(watched, folder / "a"), saved_snapshot(straight, folder / "b")
    if one is not None and other is not None:
        assert_same(one, other)


@case
def before_the_first_step(folder: Path) -> None:
    run, late, straight = sharded_run(), sharded_run(), sharded_run()
    train(late, 1)
    saved = saved_snapshot(run, folder / "a")
    late.step = restore_snapshot(saved, late.objects).step
    assert not late.objects.optimizer.state
    assert late.step == 0
    for each in (late, straight):
        train(each, 2)
    one, other = saved_snapshot(late, folder / "b"), saved_snapshot(straight, folder / "c")
    if one is not None and other is not None:
        assert_same(one, other)


@case
def data_parallel_to_sharded_and_back(folder: Path) -> None:
    run, sharded, again = ddp_run(), sharded_run(), ddp_run()
    train(run, 3)
    saved = saved_snapshot(run, folder / "a")
    restore_snapshot(saved, sharded.objects)
    sharded.step = 3
    between = saved_snapshot(sharded, folder / "b")
    restore_snapshot(between, again.objects)
    back = saved_snapshot(again, folder / "c")
    if saved is not None and between is not None and back is not None:
        assert_same(saved, between)
        assert_same(saved, back)
    train(run, 1)
    train(sharded, 1)
    one, other = saved_snapshot(run, folder / "d"), saved_snapshot(sharded, folder / "e")
    if one is not None and other is not None:
        assert largest_difference(one, other) < 1e-5


@case
def data_parallel_to_single(folder: Path) -> None:
    """Two processes and one agree up to the order of floating-point sums, before and after restoring."""
    run = ddp_run()
    train(run, 3)
    saved = saved_snapshot(run, folder / "a")
    train(run, 3)
    end = saved_snapshot(run, folder / "b")
    if saved is None or end is None:
        return
    single, straight = small_run(small_task()), small_run(small_task())
    single.step = restore_in_one_process(saved, single.objects).step
    advance(single, 3)
    advance(straight, 6)
    for other in (capture_in_one_process(single), capture_in_one_process(straight)):
        # Adam divides by a root that may be zero except for rounding: weights may differ by a few learning rates.
        assert largest_difference(end, other) < 2e-3
        losses = [float(loss_of(each)) for each in (end, other)]
        assert abs(losses[0] - losses[1]) < 1e-4 * abs(losses[1])


def loss_of(snapshot: Snapshot) -> Tensor:
    task = small_task()
    task.load_state_dict(snapshot.model)
    images, noise, t = draws(99, torch.arange(16))
    with torch.no_grad():
        return task(images, noise, t).loss


@case
def ema_and_clipping(folder: Path) -> None:
    """Equal weights and gradients give the same norm, clipped gradients and EMA, in one process or two."""
    plain, task = small_task(), shard(small_task())
    emas = [LitEMA(plain.denoiser, 0.9), LitEMA(task.denoiser, 0.9)]
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for (name, a), (other, b) in zip(plain.named_parameters(), task.named_parameters(), strict=True):
            assert name == other
            values = torch.randn(a.shape, generator=generator)
            with torch.no_grad():
                a.add_(values, alpha=0.1)
                a.grad = values
                shard_of_values = own_rows(values)
                local_tensor(b).add_(shard_of_values, alpha=0.1)
                b.grad = sharded_like(b, shard_of_values)
        for limit in (1.0, 1e6):
            for of in (lambda t: list(t.denoiser.parameters()), lambda t: [t.objective.logvar]):
                norms = [clip_gradients(of(each), limit) for each in (plain, task)]
                assert type(norms[1]) is Tensor
                torch.testing.assert_close(norms[1], norms[0], rtol=1e-6, atol=0)
        for a, b in zip(plain.parameters(), task.parameters(), strict=True):
            torch.testing.assert_close(full_tensor(b.grad), a.grad, rtol=1e-6, atol=1e-6)
        for ema, each in zip(emas, (plain, task), strict=True):
            ema.step(each.denoiser)
    state, expected = emas[1].state_dict(), emas[0].state_dict()
    assert state["num_updates"] == expected["num_updates"] == 3
    for name, shadow in expected["shadow"].items():
        assert type(state["shadow"][name]) is Tensor
        torch.testing.assert_close(state["shadow"][name], shadow, rtol=1e-6, atol=1e-6)


def own_rows(values: Tensor) -> Tensor:
    """This process's rows, as torch.chunk splits them."""
    chunks = values.chunk(2)
    return chunks[rank()] if rank() < len(chunks) else values[:0]


def sharded_like(parameter: Tensor, shard_of_values: Tensor) -> Tensor:
    gradient = torch.zeros_like(parameter)
    local_tensor(gradient).copy_(shard_of_values)
    return gradient


@case
def clipping_sharded_and_plain_parameters(folder: Path) -> None:
    """A parameter that is not sharded is clipped with the rest, which torch's own function refuses."""
    module = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    fully_shard(module[0])
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    norm = clip_gradients(list(module.parameters()), 1.0)
    torch.testing.assert_close(norm, torch.tensor(24.0).sqrt())
    for parameter in module.parameters():
        torch.testing.assert_close(full_tensor(parameter.grad), torch.full(parameter.shape, 1 / 24**0.5))


@case
def ema_created_before_sharding(folder: Path) -> None:
    """Created before sharding, updated after; its state loads into a plain module and the other way round."""
    task = small_task()
    plain = copy.deepcopy(task)
    early, expected = LitEMA(task.denoiser, 0.5), LitEMA(plain.denoiser, 0.5)
    shard(task)
    for parameter in task.parameters():
        local_tensor(parameter).detach().add_(1)
    for parameter in plain.parameters():
        parameter.detach().add_(1)
    early.step(task.denoiser)
    expected.step(plain.denoiser)
    assert all(is_sharded(shadow) for shadow in early.shadow.values())
    for name, shadow in early.state_dict()["shadow"].items():
        torch.testing.assert_close(shadow, expected.shadow[name], rtol=1e-6, atol=1e-6)
    target = small_task().denoiser
    early.copy_to(target)
    for name, parameter in target.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected.shadow[name], rtol=1e-6, atol=1e-6)
    late = LitEMA(task.denoiser, 0.1)
    late.load_state_dict(expected.state_dict())
    for name, shadow in late.shadow.items():
        assert torch.equal(full_tensor(shadow), expected.shadow[name])


@case
def ema_scope_and_back(folder: Path) -> None:
    """After a validation with EMA weights, the next step trains the raw ones: torch keeps the weights gathered by a
    forward pass and would use them again."""
    run, straight = sharded_run(), sharded_run()
    for each in (run, straight):
        train(each, 2)
    images, noise, t = draws(99, torch.arange(4))
    ema = run.objects.ema
    assert ema is not None
    plain = small_task()
    ema.copy_to(plain.denoiser)
    plain.objective.load_state_dict({"logvar": full_tensor(run.task.objective.logvar).detach()})
    with torch.no_grad(), ema.scope(run.task.denoiser):
        inside = run.task(images, noise, t).loss
        expected = plain(images, noise, t).loss
    torch.testing.assert_close(inside, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="reshard"):
        ema.step(run.task.denoiser)
    train(run, 1)
    reshard(run.task)
    train(straight, 1)
    one, other = saved_snapshot(run, folder / "a"), saved_snapshot(straight, folder / "b")
    if one is not None and other is not None:
        assert_same(one, other)


@case
def every_process_raises_a_mismatch(folder: Path) -> None:
    run = sharded_run()
    train(run, 1)
    saved = saved_snapshot(run, folder / "a")
    if saved is not None:
        write_snapshot(saved, folder)
        saved = read_snapshot(folder)
        saved.model.pop("denoiser.conv_in.bias")
    before = saved_snapshot(run, folder / "b")
    with pytest.raises(ValueError, match=r"denoiser\.conv_in\.bias"):
        restore_snapshot(saved, run.objects)
    after = saved_snapshot(run, folder / "c")
    if before is not None and after is not None:
        assert_same(before, after)


def main(folder: str, names: list[str]) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=SECONDS_PER_CASE))
    for name in names:
        place = Path(folder) / name
        place.mkdir(exist_ok=True)
        faulthandler.dump_traceback_later(SECONDS_PER_CASE, exit=True)
        CASES[name](place)
        dist.barrier()
        if rank() == 0:
            (Path(folder) / f"{name}.done").touch()
    faulthandler.cancel_dump_traceback_later()
    dist.destroy_process_group()


if __name__ == "__main__":
    assert os.environ.get("WORLD_SIZE") == "2"
    main(sys.argv[1], sys.argv[2:] or list(CASES))

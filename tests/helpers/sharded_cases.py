"""What two connected processes do in test_sharded.py, where torchrun starts them."""

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
from helpers.state_cases import Small, advance, assert_same, draws, farthest, small_run, small_task, through_files

LIMIT = 60
"""Seconds a case may take; one that hangs ends the process and says where."""

CASES: dict[str, Callable[[Path], None]] = {}


def case(function: Callable[[Path], None]) -> Callable[[Path], None]:
    CASES[function.__name__] = function
    return function


def rank() -> int:
    return dist.get_rank()


def shard(task: DenoisingTask) -> DenoisingTask:
    """Blocks on their own, and the task around them: its log-variances are sharded and averaged with the rest."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in [*task.denoiser.down_blocks, task.denoiser.mid_block, *task.denoiser.up_blocks]:
        fully_shard(block, mesh=mesh)
    return fully_shard(task, mesh=mesh)


def sharded_run() -> Small:
    return small_run(shard(small_task()))


def ddp_run() -> Small:
    task = small_task()
    return small_run(task, DistributedDataParallel(task))


def train(run: Small, steps: int) -> None:
    advance(run, steps, rank=rank(), world=2)


def carried(run: Small, folder: Path) -> Snapshot | None:
    """A snapshot, through its files."""
    snapshot = capture_snapshot(run.live, run.progress)
    assert (snapshot is None) == (rank() > 0)
    return None if snapshot is None else through_files(snapshot, folder)


@case
def sharded_to_plain_to_sharded(folder: Path) -> None:
    """Saved and loaded state is equal to the bit both ways, and so are further steps of the sharded run."""
    run, again = sharded_run(), sharded_run()
    train(run, 3)
    parts = {local_tensor(p).numel() == 0 for p in run.task.parameters()}
    assert parts == ({False} if rank() == 0 else {False, True}), "the case needs a process with an empty part"
    saved = carried(run, folder / "a")
    middle = None
    if saved is not None:
        middle = plain_copy(saved)
        assert_same(saved, middle)
    progress = restore_snapshot(middle, again.live)
    assert progress.step == 3, "every process knows where the run stands"
    again.step = progress.step
    loaded = carried(again, folder / "b")
    if saved is not None and loaded is not None:
        assert_same(saved, loaded)
    for each in (run, again):
        train(each, 2)
    one, other = carried(run, folder / "c"), carried(again, folder / "d")
    if one is not None and other is not None:
        assert_same(one, other)


def plain_copy(snapshot: Snapshot) -> Snapshot:
    """Through a run of one process, which does not know that it is one of two."""
    single = small_run(small_task())
    single.step = apply_alone(snapshot, single.live).step
    return gather_alone(single)


def apply_alone(snapshot: Snapshot, live: TrainingObjects) -> Progress:
    with alone():
        return restore_snapshot(snapshot, live)


def gather_alone(run: Small) -> Snapshot:
    with alone():
        snapshot = capture_snapshot(run.live, run.progress)
    assert snapshot is not None
    return snapshot


class alone:
    """One process without the group: what a run of one process sees."""

    def __enter__(self) -> None:
        self.real = dist.is_initialized
        dist.is_initialized = lambda: False

    def __exit__(self, *_: object) -> None:
        dist.is_initialized = self.real


@case
def a_snapshot_changes_nothing(folder: Path) -> None:
    watched, straight = sharded_run(), sharded_run()
    for _ in range(3):
        capture_snapshot(watched.live, watched.progress)  # the first one before there is any state
        train(watched, 1)
        train(straight, 1)
    one, other = carried(watched, folder / "a"), carried(straight, folder / "b")
    if one is not None and other is not None:
        assert_same(one, other)


@case
def before_the_first_step(folder: Path) -> None:
    run, late, straight = sharded_run(), sharded_run(), sharded_run()
    train(late, 1)
    saved = carried(run, folder / "a")
    late.step = restore_snapshot(saved, late.live).step
    assert not late.live.optimizer.state
    assert late.step == 0
    for each in (late, straight):
        train(each, 2)
    one, other = carried(late, folder / "b"), carried(straight, folder / "c")
    if one is not None and other is not None:
        assert_same(one, other)


@case
def data_parallel_to_sharded_and_back(folder: Path) -> None:
    run, sharded, again = ddp_run(), sharded_run(), ddp_run()
    train(run, 3)
    saved = carried(run, folder / "a")
    restore_snapshot(saved, sharded.live)
    sharded.step = 3
    between = carried(sharded, folder / "b")
    restore_snapshot(between, again.live)
    back = carried(again, folder / "c")
    if saved is not None and between is not None and back is not None:
        assert_same(saved, between)
        assert_same(saved, back)
    train(run, 1)
    train(sharded, 1)
    one, other = carried(run, folder / "d"), carried(sharded, folder / "e")
    if one is not None and other is not None:
        assert farthest(one, other) < 1e-5


@case
def data_parallel_to_single(folder: Path) -> None:
    """Two processes and one agree to the order of floating-point sums, before and after the change."""
    run = ddp_run()
    train(run, 3)
    saved = carried(run, folder / "a")
    train(run, 3)
    end = carried(run, folder / "b")
    if saved is None or end is None:
        return
    single, straight = small_run(small_task()), small_run(small_task())
    single.step = apply_alone(saved, single.live).step
    advance(single, 3)
    advance(straight, 6)
    for other in (gather_alone(single), gather_alone(straight)):
        # Adam divides by a root that may be zero but for rounding: weights may differ by some learning rates.
        assert farthest(end, other) < 2e-3
        losses = [float(loss_of(each)) for each in (end, other)]
        assert abs(losses[0] - losses[1]) < 1e-4 * abs(losses[1])


def loss_of(snapshot: Snapshot) -> Tensor:
    task = small_task()
    task.load_state_dict(snapshot.model)
    images, noise, t = draws(99, torch.arange(16))
    with torch.no_grad():
        return task(images, noise, t).loss


@case
def average_and_clipping(folder: Path) -> None:
    """From equal weights and gradients: the same norm, clipped gradients and averages, one process or two."""
    plain, task = small_task(), shard(small_task())
    averages = [LitEMA(plain.denoiser, 0.9), LitEMA(task.denoiser, 0.9)]
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for (name, a), (other, b) in zip(plain.named_parameters(), task.named_parameters(), strict=True):
            assert name == other
            values = torch.randn(a.shape, generator=generator)
            with torch.no_grad():
                a.add_(values, alpha=0.1)
                a.grad = values
                part = spread_by_hand(values, b)
                local_tensor(b).add_(part, alpha=0.1)
                b.grad = part_like(b, part)
        for limit in (1.0, 1e6):
            for of in (lambda t: list(t.denoiser.parameters()), lambda t: [t.objective.logvar]):
                norms = [clip_gradients(of(each), limit) for each in (plain, task)]
                assert type(norms[1]) is Tensor
                torch.testing.assert_close(norms[1], norms[0], rtol=1e-6, atol=0)
        for a, b in zip(plain.parameters(), task.parameters(), strict=True):
            torch.testing.assert_close(full_tensor(b.grad), a.grad, rtol=1e-6, atol=1e-6)
        for average, each in zip(averages, (plain, task), strict=True):
            average.step(each.denoiser)
    state, expected = averages[1].state_dict(), averages[0].state_dict()
    assert state["num_updates"] == expected["num_updates"] == 3
    for name, shadow in expected["shadow"].items():
        assert type(state["shadow"][name]) is Tensor
        torch.testing.assert_close(state["shadow"][name], shadow, rtol=1e-6, atol=1e-6)


def spread_by_hand(values: Tensor, like: Tensor) -> Tensor:
    """This process's rows, as torch.chunk gives them."""
    chunks = values.chunk(2)
    return chunks[rank()] if rank() < len(chunks) else values[:0]


def part_like(parameter: Tensor, part: Tensor) -> Tensor:
    gradient = torch.zeros_like(parameter)
    local_tensor(gradient).copy_(part)
    return gradient


@case
def clipping_of_a_mixture(folder: Path) -> None:
    """A parameter left out of the sharding is clipped with the rest, which torch's own function refuses."""
    module = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    fully_shard(module[0])
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    norm = clip_gradients(list(module.parameters()), 1.0)
    torch.testing.assert_close(norm, torch.tensor(24.0).sqrt())
    for parameter in module.parameters():
        torch.testing.assert_close(full_tensor(parameter.grad), torch.full(parameter.shape, 1 / 24**0.5))


@case
def average_follows_into_shards(folder: Path) -> None:
    """Made before the sharding, stepped after; its state opens in a plain module and the other way round."""
    task = small_task()
    plain = copy.deepcopy(task)
    early, expected = LitEMA(task.denoiser, 0.5), LitEMA(plain.denoiser, 0.5)
    shard(task)
    for part in task.parameters():
        local_tensor(part).detach().add_(1)
    for part in plain.parameters():
        part.detach().add_(1)
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
def scope_and_back(folder: Path) -> None:
    """After a validation with EMA weights, the next step trains the raw ones: torch keeps the weights that a forward
    pass gathered, and would use them again."""
    run, straight = sharded_run(), sharded_run()
    for each in (run, straight):
        train(each, 2)
    images, noise, t = draws(99, torch.arange(4))
    ema = run.live.ema
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
    one, other = carried(run, folder / "a"), carried(straight, folder / "b")
    if one is not None and other is not None:
        assert_same(one, other)


@case
def a_misfit_is_named_by_all(folder: Path) -> None:
    run = sharded_run()
    train(run, 1)
    saved = carried(run, folder / "a")
    if saved is not None:
        write_snapshot(saved, folder)
        saved = read_snapshot(folder)
        saved.model.pop("denoiser.conv_in.bias")
    before = carried(run, folder / "b")
    with pytest.raises(ValueError, match=r"denoiser\.conv_in\.bias"):
        restore_snapshot(saved, run.live)
    after = carried(run, folder / "c")
    if before is not None and after is not None:
        assert_same(before, after)


def main(folder: str, names: list[str]) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=LIMIT))
    for name in names:
        place = Path(folder) / name
        place.mkdir(exist_ok=True)
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        CASES[name](place)
        dist.barrier()
        if rank() == 0:
            (Path(folder) / f"{name}.done").touch()
    faulthandler.cancel_dump_traceback_later()
    dist.destroy_process_group()


if __name__ == "__main__":
    assert os.environ.get("WORLD_SIZE") == "2"
    main(sys.argv[1], sys.argv[2:] or list(CASES))

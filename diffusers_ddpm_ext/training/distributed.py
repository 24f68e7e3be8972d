"""The processes of one run: how they are found, how many cores each may use, and how they fail together."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    InitProcessGroupKwargs,
    ProjectConfiguration,
    gather_object,
)
from torch import Tensor

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.signals import was_launched

PATIENCE = timedelta(hours=2)
"""How long a process waits for the others: previews and the final pictures are made by the first one alone."""

SECONDS_TO_SPEAK = 10
"""A failing process that has nothing to say lives so much longer, or the launcher would end the one that speaks."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def make_accelerator(mixed_precision: str | None, accumulation: int, trackers: list[str]) -> Accelerator:
    """The Accelerator of a run.

    Args:
        mixed_precision: ``no``, ``fp16``, ``bf16``, or None for what the launcher says.
        accumulation: micro-batches of an optimizer step.
        trackers: by their names in Accelerate.

    Returns:
        One process of the run. Started by ``torchrun`` on a machine without accelerators, the processes are connected,
        which Accelerate alone leaves out unless it is told to use the CPU.

    Raises:
        ConfigError: a precision or a tracker that is not to be had here.
    """
    refuse_engines()
    no_accelerator = not torch.accelerator.is_available()
    try:
        accelerator = Accelerator(
            cpu=no_accelerator,
            mixed_precision=mixed_precision,
            gradient_accumulation_steps=accumulation,
            log_with=trackers or None,
            project_config=ProjectConfiguration(logging_dir="."),  # where it really goes is known later
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
    except ValueError as error:
        option = "--report_to" if "logging" in str(error).lower() else "--mixed_precision"
        raise ConfigError(f"{option}: {' '.join(str(error).split())}") from error
    found = {str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with}
    missing = [name for name in trackers if name not in found and not (name == "all" and found)]
    if missing:
        raise ConfigError(f"--report_to {missing[0]}: this tracker is not installed (`pip install {missing[0]}`).")
    if (plugin := getattr(accelerator.state, "fsdp_plugin", None)) is not None:
        # Its policy would cast the images and the noise to bfloat16 before they meet; autocast leaves them alone.
        plugin.mixed_precision_policy = None
    if accelerator.device.type == "cpu":
        if accelerator.mixed_precision == "fp16":  # Accelerate would take it and train in float32
            raise ConfigError("--mixed_precision fp16 needs an accelerator: on a CPU say bf16, or no.")
        use_all_cores()
        keep_memory()
    return accelerator


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")


def fsdp_was_asked_for() -> bool:
    """Whether the launcher's configuration says FSDP."""
    return _is_on("ACCELERATE_USE_FSDP")


def refuse_engines() -> None:
    """Refuse what Accelerate can be configured to and this trainer cannot do.

    Raises:
        ConfigError: DeepSpeed, Megatron-LM, or the first version of FSDP.
    """
    way = "use training/accelerate/fsdp2.yaml or multi_gpu.yaml"
    for variable, name in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")):
        if _is_on(variable):
            raise ConfigError(f"accelerate's configuration asks for {name}, which is not supported yet: {way}")
    # On a CPU Accelerate makes DDP of both versions, which the run then says.
    if fsdp_was_asked_for() and torch.accelerator.is_available() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(f"accelerate's configuration asks for FSDP 1, whose weights have no names: {way}")


def use_all_cores() -> None:
    """Undo the one thread that ``accelerate launch`` and ``torchrun`` give a process by default.

    They set OMP_NUM_THREADS to 1 where the user has said nothing. Any other number, and a 1 that no launcher is there
    to have set, is the user's own and stays; so does ``--num_cpu_threads_per_process`` above 1.
    """
    if was_launched() and os.environ.get("OMP_NUM_THREADS") == "1":
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, cores() // processes))


def keep_memory() -> None:
    """Let freed memory stay with the process, where the C library is glibc.

    It gives large blocks back to the system at once, so that each step of a small network touches thousands of new
    pages (measured: 4,900 page faults and a seventh of a step of the digits' network).
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 1024**2)  # the most that glibc takes
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def cores() -> int:
    """Cores that this process may use: of its affinity, and of a container's quota where there is one."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup of version 2, or the quota says `max`
        return count


def mean_over_ranks(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """Average a tensor over the processes, all of which call this."""
    return tensor if accelerator.num_processes == 1 else accelerator.reduce(tensor, reduction="mean")


def sum_over_ranks(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """Add a tensor over the processes, all of which call this."""
    return tensor if accelerator.num_processes == 1 else accelerator.reduce(tensor, reduction="sum")


def gather_rows(accelerator: Accelerator, rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks; all call this, with any numbers of rows.

    Args:
        accelerator: of the run.
        rows: (n, k), on the CPU; k and dtype are the same everywhere.

    Returns:
        (N, k), the same in all processes.
    """
    if accelerator.num_processes == 1:
        return rows
    group = _cpu_group(dist.group.WORLD)
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(accelerator.num_processes)]
    dist.all_gather(counts, torch.tensor([len(rows)]), group=group)
    most = max(int(count) for count in counts)
    padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


@cache
def _cpu_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of these processes for numbers that live on the CPU: asking an accelerator for one would stall it."""
    return dist.new_group(backend="gloo")


def largest_over_ranks(accelerator: Accelerator, number: int) -> int:
    """The largest of the processes' numbers, in all of them; all call this."""
    if accelerator.num_processes == 1:
        return number
    tensor = torch.tensor(number)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_cpu_group(dist.group.WORLD))
    return int(tensor)


@contextmanager
def same_fate(accelerator: Accelerator) -> Iterator[None]:
    """Let the processes fail together in a part of the run that each of them does for itself.

    Without it a process whose image cannot be read would leave the others waiting in their first exchange.

    Args:
        accelerator: of the run.

    Yields:
        Nothing.

    Raises:
        Exception: what the work raised, in the first process that failed; the others leave silently, with status 2.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if accelerator.num_processes > 1:
        failed = [rank for rank, fails in enumerate(gather_object([failure is not None])) if fails]
        if failed and failed[0] != accelerator.process_index:
            leave_silently(2)
    if failure is not None:
        raise failure


def leave_silently(status: int) -> None:
    """End a process whose failure another one reports.

    Args:
        status: exit status.

    Raises:
        SystemExit: always.
    """
    time.sleep(SECONDS_TO_SPEAK)
    raise SystemExit(status)

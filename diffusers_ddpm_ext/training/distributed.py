"""The processes of a distributed run: the Accelerator, collective calls, and failing together."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import NoReturn

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, ProjectConfiguration, gather_object
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.threads import use_all_cores

COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""How long a process waits for the others: only the main process draws the previews and the final plots."""

EXIT_DELAY = 10
"""Seconds before a process exits without a message: at once, the launcher would end the one that reports the error."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def make_accelerator(mixed_precision: str | None, accumulation: int, trackers: list[str]) -> Accelerator:
    """The Accelerator of this process.

    Processes that ``torchrun`` started on a machine without accelerators are connected too, which Accelerate does only
    with ``cpu=True``.

    Args:
        mixed_precision: ``no``, ``fp16``, ``bf16``, or None for `default_precision`.
        accumulation: micro-batches per optimizer step.
        trackers: by their names in Accelerate.

    Raises:
        ConfigError: a precision or a tracker that is not available here.
    """
    refuse_unsupported_engines()
    no_accelerator = not torch.accelerator.is_available()
    try:
        accelerator = Accelerator(
            cpu=no_accelerator,
            mixed_precision=mixed_precision or default_precision(),
            gradient_accumulation_steps=accumulation,
            log_with=trackers or None,
            project_config=ProjectConfiguration(logging_dir="."),  # replaced once the folder is known
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # gradients are in memory once
            ],
        )
    except ValueError as error:
        option = "--report_to" if "logging" in str(error).lower() else "--mixed_precision"
        raise ConfigError(f"{option}: {' '.join(str(error).split())}") from error
    available = {str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with}
    missing = [name for name in trackers if name not in available and not (name == "all" and available)]
    if missing:
        raise ConfigError(f"--report_to {missing[0]}: this tracker is not installed (`pip install {missing[0]}`).")
    if (plugin := getattr(accelerator.state, "fsdp_plugin", None)) is not None:
        # Its policy would cast the images and the noise to bfloat16 before they are mixed; autocast does not.
        plugin.mixed_precision_policy = None
    if accelerator.device.type == "cpu":
        if accelerator.mixed_precision == "fp16":  # Accelerate would accept it and train in float32
            raise ConfigError("--mixed_precision fp16 needs an accelerator: on a CPU use bf16 or no.")
        use_all_cores()
        keep_freed_memory()
    return accelerator


def keep_own_buffers(task: nn.Module) -> None:
    """Do not broadcast buffers in every forward pass, as DDP does by default: every process computes the same ones."""
    if isinstance(task, DistributedDataParallel):
        task.broadcast_buffers = False  # as an argument it is deprecated, and buffers would also differ at the start


def default_precision() -> str | None:
    """``bf16`` on an NVIDIA GPU that computes in it; None, for Accelerate's choice, elsewhere or after a launcher."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ or not torch.cuda.is_available():
        return None
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else None


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")


def fsdp_requested() -> bool:
    """Whether the launcher's configuration requests FSDP."""
    return _is_on("ACCELERATE_USE_FSDP")


def refuse_unsupported_engines() -> None:
    """Refuse DeepSpeed, Megatron-LM and FSDP 1, which Accelerate can be configured to use, as a ConfigError."""
    advice = "use training/accelerate/fsdp2.yaml or multi_gpu.yaml"
    for variable, name in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")):
        if _is_on(variable):
            raise ConfigError(f"accelerate's configuration requests {name}, which is not supported yet: {advice}")
    # On a CPU Accelerate replaces both versions with DDP, of which the run warns.
    if fsdp_requested() and torch.accelerator.is_available() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(f"accelerate's configuration requests FSDP 1, whose weights have no names: {advice}")


def keep_freed_memory() -> None:
    """Keep freed memory in the process, where the C library is glibc.

    By default glibc returns large blocks to the system at once, so that each step of a small network touches thousands
    of new pages (measured: 4,900 page faults and a seventh of a step of the digits' network).
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 1024**2)  # the maximum of glibc
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def mean_over_ranks(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """Average a tensor over the processes. Collective call: every process must make it."""
    return tensor if accelerator.num_processes == 1 else accelerator.reduce(tensor, reduction="mean")


def sum_over_ranks(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """Sum a tensor over the processes. Collective call: every process must make it."""
    return tensor if accelerator.num_processes == 1 else accelerator.reduce(tensor, reduction="sum")


def gather_rows(accelerator: Accelerator, rows: Tensor) -> Tensor:
    """Concatenate the rows of all processes in the order of their ranks. Collective call: every process must make it.

    ``rows`` is (n, k), on the CPU; only n may differ between processes. The result is (N, k) everywhere.
    """
    if accelerator.num_processes == 1:
        return rows
    group = _cpu_group(dist.group.WORLD)
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(accelerator.num_processes)]
    dist.all_gather(counts, torch.tensor([len(rows)]), group=group)
    longest = max(int(count) for count in counts)
    padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


@cache
def _cpu_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of these processes for values on the CPU: exchanging them on an accelerator would stall it."""
    return dist.new_group(backend="gloo")


def max_over_ranks(accelerator: Accelerator, *values: int) -> list[int]:
    """The maximum of each value over the processes. Collective call: every process must make it."""
    return start_max_over_ranks(accelerator, *values)()


def start_max_over_ranks(accelerator: Accelerator, *values: int) -> Callable[[], list[int]]:
    """Begin `max_over_ranks` without waiting for the other processes. Collective call: every process must make it.

    Returns a function that waits for them, and returns the maxima; it is called once.
    """
    if accelerator.num_processes == 1:
        return lambda: list(values)
    tensor = torch.tensor(values, dtype=torch.int64)
    work = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_cpu_group(dist.group.WORLD), async_op=True)

    def wait() -> list[int]:
        work.wait()
        maxima: list[int] = tensor.tolist()
        return maxima

    return wait


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Whether a flag is set in any process. Collective call: every process must make it."""
    return bool(max_over_ranks(accelerator, int(flag))[0])


@contextmanager
def fail_together(accelerator: Accelerator) -> Iterator[None]:
    """End all processes when one of them fails inside a ``with`` block. Collective call: every process must make it.

    Without it, if one process cannot read an image, the others would wait for it in their next collective call.

    Raises:
        Exception: what the block raised, in the failed process of the lowest rank; the others exit with status 2.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if accelerator.num_processes > 1:
        failed = [rank for rank, fails in enumerate(gather_object([failure is not None])) if fails]
        if failed and failed[0] != accelerator.process_index:
            exit_without_message(2)
    if failure is not None:
        raise failure


def exit_without_message(status: int) -> NoReturn:
    """End a process whose failure another one reports."""
    time.sleep(EXIT_DELAY)
    raise SystemExit(status)


def leave_process_group() -> None:
    """Destroy the default process group, if there is one; otherwise a process may abort while it exits."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@atexit.register
def end_group_threads() -> None:
    """End the threads of destroyed process groups, before Python exits.

    A thread of gloo that releases the tensors of its last exchange while Python exits aborts the process. The threads
    end with the last reference to their group: `_cpu_group` has one, and so has every model in
    DistributedDataParallel, whose references are circular and unreachable by now. A group that was not destroyed,
    after an error, stays as it is.
    """
    if dist.is_available() and not dist.is_initialized() and _cpu_group.cache_info().currsize:
        _cpu_group.cache_clear()
        gc.collect()

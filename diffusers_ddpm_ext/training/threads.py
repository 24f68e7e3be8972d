"""Number of CPU threads of a run: who has chosen it, and the search for the fastest one.

The last bits of a network's results depend on the number of threads. So a choice by measurement is stored in every
checkpoint, and a resumed run uses it again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from diffusers_ddpm_ext.training.signals import was_launched

THREADS_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
LAUNCHER_FLAG = b"num_cpu_threads_per_process"
HOPELESS = 1.5
"""Fewer threads than those that took this many times as long as the fastest are not measured."""
CLOSE = 1.25
"""Those within this factor of the fastest are measured again."""
TIE = 1.03
"""Of those within this factor of the fastest, the fewest are used: the other cores may load data."""
ROUNDS = 3


@dataclass(frozen=True)
class ThreadChoice:
    """Number of threads of a run on a CPU.

    Attributes:
        count: of threads per process.
        reason: who has chosen it, for the printed plan.
        cores: that each process may use; with the count it is stored in checkpoints.
    """

    count: int
    reason: str
    cores: int

    def describe(self) -> str:
        """The choice in the printed plan."""
        return f"{self.count} on {self.cores} core{'s' if self.cores > 1 else ''} ({self.reason})"

    def record(self) -> dict[str, int]:
        """The choice in a checkpoint."""
        return {"count": self.count, "cores": self.cores}


def cores() -> int:
    """Number of cores that this process may use, by its affinity and by a container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup of version 2, or the quota is `max`
        return count


def cores_per_process() -> int:
    """Number of cores for each process of this machine, at least 1."""
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, cores() // max(1, int(processes) if processes.isdecimal() else 1))


def users_variable() -> str | None:
    """Name of the environment variable by which the user has chosen the number of threads; None without one.

    ``accelerate launch`` and ``torchrun`` set OMP_NUM_THREADS themselves if the user has not. Where the system shows
    what they were started with, that decides; elsewhere a 1 under a launcher is taken as the launcher's.
    """
    name = next((name for name in THREADS_VARIABLES if os.environ.get(name)), None)
    if name != THREADS_VARIABLES[0] or not was_launched():
        return name
    started_with = launcher_start()
    if started_with is None:
        return None if os.environ[name] == "1" else name
    command, variables = started_with
    is_users = LAUNCHER_FLAG in command.replace(b"-", b"_") or f"\0{name}=".encode() in b"\0" + variables
    return name if is_users else None


def launcher_start() -> tuple[bytes, bytes] | None:
    """Command line and environment that the parent process was started with; None where the system hides them."""
    try:
        folder = Path(f"/proc/{os.getppid()}")
        return (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
    except OSError:
        return None


def use_all_cores() -> None:
    """Undo the one thread that a launcher gives a process on a CPU by default."""
    if was_launched() and os.environ.get(THREADS_VARIABLES[0]) == "1" and users_variable() is None:
        torch.set_num_threads(cores_per_process())


def candidates(most: int) -> list[int]:
    """Numbers of threads to measure: all cores, then the powers of two below, the largest first."""
    return [most, *(2**power for power in reversed(range(most.bit_length())) if 2**power < most)]


def fastest(counts: Sequence[int], measure: Callable[[int], float], time_left: Callable[[], bool]) -> int:
    """The number of threads with the shortest time; of nearly equal ones the smallest.

    Args:
        counts: numbers of threads, the largest first.
        measure: seconds of the work on a number of threads; called in turns.
        time_left: whether there is time for another round; the first one is always complete.
    """
    best: dict[int, float] = {}
    for count in counts:
        best[count] = measure(count)
        if best[count] > HOPELESS * min(best.values()):
            break
    for number in range(1, ROUNDS):
        close = [count for count in best if best[count] <= CLOSE * min(best.values())]
        if len(close) == 1 or not time_left():
            break
        for count in close if number % 2 == 0 else reversed(close):
            best[count] = min(best[count], measure(count))
    return min(count for count, seconds in best.items() if seconds <= TIE * min(best.values()))

"""Main memory of this machine, so that what cannot fit is refused before it is computed."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_bytes() -> int | None:
    """Main memory that this process can use at most, in bytes: the machine's, or its container's limit if it is lower.

    None where the system does not tell.
    """
    limits = []
    with suppress(AttributeError, OSError, ValueError):  # not on Windows
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # "max", or no such file
            limits.append(int(Path(path).read_text(encoding="ascii")))
    return min((limit for limit in limits if limit > 0), default=None)


def free_memory_bytes(device: Any) -> int:
    """Bytes that this process can still allocate on a device, a ``torch.device``: of a CPU, main memory without swap.

    Where the system does not tell, a quarter of the main memory, or 1 GiB.
    """
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    limit = memory_bytes()
    with suppress(OSError, ValueError, StopIteration, IndexError):  # not on Linux
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
        return available if limit is None else min(available, limit)
    return 2**30 if limit is None else limit // 4

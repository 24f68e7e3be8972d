"""Settings of the process that a command runs in: how threads wait, and what becomes of freed memory."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress

SPINS = "2000"
"""Rounds that a waiting thread of GNU OpenMP spins before it sleeps."""
MALLOC_TRIM_THRESHOLD, MALLOC_MMAP_THRESHOLD = -1, -3  # numbers of mallopt(3)
KEPT = 2**31 - 1
"""Bytes at the end of the heap that are not given back."""
FROM_HEAP = (2**30, 2**25)
"""The largest piece that comes from the heap, in bytes; older versions of glibc accept the second number only."""


def tune_process() -> None:
    """Choose how this process waits and keeps memory, before torch is imported; what the user has set stays."""
    _set_wait_policy()
    _keep_freed_memory()


def _set_wait_policy() -> None:
    """Let OpenMP threads that wait for each other soon sleep, unless the user chose otherwise; torch reads it at once.

    GNU OpenMP's threads spin for milliseconds while they wait. With other programs on the machine, a spinning thread
    occupies the core that the awaited thread needs: small networks then train ten times slower. Threads that sleep at
    once must be woken for every operation: two then do no more than one. `SPINS` is a fraction of a millisecond.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ |= {"GOMP_SPINCOUNT": SPINS} if sys.platform == "linux" else {"OMP_WAIT_POLICY": "PASSIVE"}


def _keep_freed_memory() -> None:
    """Let glibc reuse what tensors free, unless the user has set its MALLOC_ or GLIBC_TUNABLES variables.

    By default it returns each larger tensor to the system at once, and every step gets its memory anew, page by page,
    each filled with zeros: 5 to 10 % of a step. The peak stays the same; between peaks up to `KEPT` bytes are kept.
    """
    if sys.platform == "linux" and not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        with suppress(OSError, AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            # The threshold of pieces first: with only the other one set, small tensors would be returned at once.
            if any(mallopt(MALLOC_MMAP_THRESHOLD, size) for size in FROM_HEAP):
                mallopt(MALLOC_TRIM_THRESHOLD, KEPT)

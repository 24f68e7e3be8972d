"""Freed memory stays in a training process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource, torch
from diffusers_ddpm_ext.training.distributed import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        blocks = [torch.ones(1 << 20) for _ in range(8)]  # 32 MiB: 8,192 pages
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def fewest():  # a system that takes pages away meanwhile adds some
    return min(faults() for _ in range(5))

libc = ctypes.CDLL(None)
for option in (-1, -3):  # trimming and mapping at their default thresholds: else the heap's layout decides
    libc.mallopt(option, 128 * 1024)
given_back = fewest()
keep_freed_memory()
faults()
print(given_back, fewest())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc is meant")
def test_freed_memory_is_reused():
    """Page faults, as the system counts them: thousands per round before, almost none after."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert after < 500
    assert before > 10 * after

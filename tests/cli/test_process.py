"""What a command sets for its process before torch is imported, and that the user's settings win."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from diffusers_ddpm_ext.cli import process

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MALLOC_", "GLIBC_TUNABLES")
SHOW = (
    "from diffusers_ddpm_ext.cli import main; import os; main(['--version']);"
    "print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'))"
)
FAULTS = (
    "from diffusers_ddpm_ext.cli import main; main(['--version'])\n"
    "import ctypes, resource\n"
    "malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free\n"
    "malloc.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]\n"
    "def once():\n"
    "    piece = malloc(8 * 2**20); ctypes.memset(ctypes.c_void_p(piece), 1, 8 * 2**20); free(piece)\n"
    "once(); before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
    "for _ in range(20): once()\n"
    "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
)


def run(code, **given):
    plain = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
    done = subprocess.run([sys.executable, "-c", code], env=plain | given, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({}, "None 2000" if sys.platform == "linux" else "PASSIVE None"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"),
        ({"GOMP_SPINCOUNT": "100"}, "None 100"),
    ],
)
def test_waiting_threads_soon_sleep_unless_somebody_has_set_it(given, seen):
    """Threads that wait must not keep the core that the awaited one needs for long."""
    assert run(SHOW, **given) == seen


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_freed_memory_is_kept_unless_somebody_has_set_it():
    """8 MiB are 2,048 pages, which are faults of the process each time that they come anew from the system."""
    assert int(run(FAULTS)) < 2000
    assert int(run(FAULTS, MALLOC_MMAP_THRESHOLD_="131072")) > 20 * 2000


@pytest.mark.parametrize(
    ("accepted", "calls"),
    [
        (2**30, [(-3, 2**30), (-1, 2**31 - 1)]),
        (2**25, [(-3, 2**30), (-3, 2**25), (-1, 2**31 - 1)]),
        (0, [(-3, 2**30), (-3, 2**25)]),
    ],
)
def test_each_version_of_glibc_gets_a_threshold_that_it_accepts(accepted, calls, monkeypatch):
    """Without one for pieces the other must stay, too: small tensors would be given back at once."""
    seen = []

    def mallopt(name, value):
        seen.append((name, value))
        return int(name == -1 or value <= accepted)

    monkeypatch.setattr(process.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    monkeypatch.setattr(process.os, "environ", {"GOMP_SPINCOUNT": "1"})
    monkeypatch.setattr(process.sys, "platform", "linux")
    process.tune_process()
    assert seen == calls


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(process.ctypes, "CDLL", lambda name: object())
    monkeypatch.setattr(process.os, "environ", {"GOMP_SPINCOUNT": "1"})
    process.tune_process()

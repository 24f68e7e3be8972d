"""Threads that wait must not keep the core that the awaited one needs for long."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SHOW = (
    "from diffusers_ddpm_ext.cli import main; import os; main(['--version']);"
    "print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'))"
)


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({}, "None 2000" if sys.platform == "linux" else "PASSIVE None"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"),
        ({"GOMP_SPINCOUNT": "100"}, "None 100"),
    ],
)
def test_the_command_line_sets_the_policy_unless_somebody_has(given, seen):
    plain = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run([sys.executable, "-c", SHOW], env=plain | given, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == seen

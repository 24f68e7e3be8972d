"""The garbage collector while a command imports torch."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
from helpers.paths import ROOT

from diffusers_ddpm_ext.cli.imports import garbage_collector_paused

FIRST_IMPORT = """
import gc
from diffusers_ddpm_ext.cli.imports import garbage_collector_paused
before = gc.get_stats()[0]["collections"]
try:
    with garbage_collector_paused():
        assert not gc.isenabled()
        objects = [[] for _ in range(5000)]
        raise ImportError
except ImportError:
    pass
print(gc.isenabled(), gc.get_stats()[0]["collections"] - before, gc.get_freeze_count() > 5000)
"""


def test_no_search_during_the_first_import():
    """5,000 new lists start several searches in Python's default; after the body, also after an error, it is on."""
    completed = subprocess.run([sys.executable, "-c", FIRST_IMPORT], cwd=ROOT, capture_output=True, text=True)
    assert completed.stdout.split() == ["True", "0", "True"], completed.stderr


@pytest.mark.parametrize("enabled", [True, False])
def test_a_program_that_has_torch_keeps_its_collector(enabled):
    import torch  # noqa: F401

    frozen, was = gc.get_freeze_count(), gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with garbage_collector_paused():
            assert gc.isenabled() is enabled
        assert gc.isenabled() is enabled
        assert gc.get_freeze_count() == frozen
    finally:
        (gc.enable if was else gc.disable)()

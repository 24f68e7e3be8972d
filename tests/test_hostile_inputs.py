"""Hostile input files of at most 1 MiB end within 20 s and 1 GiB, with a result or one `error:` line."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from helpers.paths import ROOT

SCRIPT = ROOT / "benchmarks" / "torture" / "hostile_inputs.py"
QUICK_PLACES = ["JSON", "proof", "metrics", "checkpoint-4", "YAML", "metadata", "npy", "safetensors"]


def run_script(tmp_path, *options):
    completed = subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=7200,
    )
    assert completed.returncode == 0, completed.stdout[-4000:] + completed.stderr[-2000:]
    return completed.stdout


def test_some_of_every_kind_of_text_and_array(tmp_path):
    assert "| all | 30 |" in run_script(tmp_path, "--place", *QUICK_PLACES, "--sample", "30")


@pytest.mark.slow
def test_intact_files_are_read(tmp_path):
    """Otherwise every hostile file would be refused for another reason than its own."""
    assert "| refused |" in run_script(tmp_path, "--intact")


@pytest.mark.slow
def test_every_file_at_every_place(tmp_path):
    assert "| all |" in run_script(tmp_path)

"""`benchmarks/gpu.sh` runs to its end, on the CPU where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from helpers.paths import ROOT

pytestmark = pytest.mark.slow


def test_runs_to_its_end(tmp_path):
    """Without a checkout of Diffusers: every part is there, its checks hold, and the table names the device."""
    variables = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "GPU_TIME_SCALE": "8"}
    completed = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path / "out")],
        env=os.environ | variables,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=2400,
    )
    assert completed.returncode == 0, completed.stdout[-3000:] + completed.stderr[-3000:]
    results = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert results["device"] in completed.stdout
    assert results["golden"]["same_random_words"]
    assert results["resume"]["resumed_is_equal"]
    assert {row["kind"] for row in results["rates"]["rows"]} >= {"eager"}
    assert all(row["steps_per_second"] > 0 for row in results["rates"]["rows"])
    assert all(row["images_per_second"] > 0 for row in results["sampling"]["rows"])


def test_a_part_that_fails_is_named(tmp_path):
    """Out of time at once: exit status 1, and the table says which parts are missing."""
    completed = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path / "out")],
        env=os.environ | {"PYTHON": "/bin/false"},
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 1
    table = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu" / "table.py"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert table.returncode == 1
    assert "failed or out of time: golden, resume, rates, sampling" in table.stderr

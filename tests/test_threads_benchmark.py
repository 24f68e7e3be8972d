"""`benchmarks/bench_threads.py` runs to its end, and its table says which numbers of threads were chosen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import PYTHONPATH, ROOT


@pytest.mark.slow
def test_a_choice_is_compared_with_one_thread_and_all_cores(tmp_path: Path):
    name = "tiny, 8 x 1 x 8 x 8"
    script = ROOT / "benchmarks" / "bench_threads.py"
    done = subprocess.run(
        [sys.executable, script, "--rounds", "2", "--models", name, "--json", "r.json"],
        env=os.environ | {"PYTHONPATH": PYTHONPATH}, cwd=tmp_path, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "r.json").read_text())[0]
    assert sum(result["choices"].values()) == 2
    assert {"1", *result["choices"], str(result["all"])} == result["seconds"].keys()
    assert all(seconds > 0 for seconds in result["seconds"].values())
    assert f"| {name} |" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json"]

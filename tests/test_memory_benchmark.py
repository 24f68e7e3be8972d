"""`benchmarks/bench_memory.py` runs, and measures what the tensors of a run hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT


@pytest.mark.slow
def test_the_parts_of_a_run_are_measured(tmp_path: Path):
    """20 bytes per parameter, and 2 less with an average in bfloat16; the table has each case."""
    cases = ["default", "EMA in bfloat16", "8-bit optimizer"]
    script, result = ROOT / "benchmarks" / "bench_memory.py", tmp_path / "memory.json"
    sizes = ["--widths", "64", "128", "--batch", "2"]
    command = [sys.executable, str(script), *sizes, "--cases", *cases, "--json", str(result)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = json.loads(result.read_text())
    assert all(f"| {case} |" in done.stdout for case in cases)
    planned = {case: row["planned"] / row["parameters"] for case, row in rows.items()}
    assert planned["default"] == pytest.approx(20, abs=0.05)
    assert planned["EMA in bfloat16"] == pytest.approx(18, abs=0.05)
    assert rows["default"]["optimizer"] == pytest.approx(8 * rows["default"]["parameters"], rel=0.5)

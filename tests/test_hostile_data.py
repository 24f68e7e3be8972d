"""Bad inputs of image data (arrays, ranges, sizes, mixtures, metrics, ...) end with one `error:` line and status 2."""

from __future__ import annotations

import importlib
import os
import random
import subprocess
import sys

import pytest
from helpers.accelerate_state import reset_accelerate
from helpers.paths import ROOT

TORTURE = ROOT / "benchmarks" / "torture"
QUICK_CASES = 60


@pytest.fixture(scope="module")
def torture():
    """The script, and the module of its cases."""
    sys.path.insert(0, str(TORTURE))
    yield importlib.import_module("hostile_data"), importlib.import_module("data_cases")
    sys.path.remove(str(TORTURE))
    reset_accelerate()


def test_there_are_500_different_ones(torture):
    cases = torture[1].all_cases()
    assert len(cases) >= 500
    assert len({(case.kind, case.name) for case in cases}) == len(cases)


def test_some_of_every_kind(torture, tmp_path):
    """In this process, and only those that read no parquet file, which takes longer."""
    script, module = torture
    inputs = module.build_inputs(tmp_path / "inputs")
    by_kind: dict[str, list] = {}
    for case in module.all_cases():
        if not any("parquet" in word for word in case.argv):
            by_kind.setdefault(case.kind, []).append(case)
    draw, count = random.Random(0), QUICK_CASES // len(by_kind)
    chosen = [case for cases in by_kind.values() for case in draw.sample(cases, min(count, len(cases)))]
    wrong = {case.name: script.check(case, inputs, tmp_path / "case") for case in chosen}
    assert not {name: faults for name, faults in wrong.items() if faults}


@pytest.mark.slow
def test_all_of_them(tmp_path):
    completed = subprocess.run(
        [sys.executable, str(TORTURE / "hostile_data.py")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert completed.returncode == 0, completed.stdout[-6000:] + completed.stderr[-2000:]

"""Short runs of the torture scripts, which kill and terminate the real command from outside."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from helpers.paths import ROOT

pytestmark = pytest.mark.slow

FOLDER = ROOT / "benchmarks" / "torture"


@pytest.mark.parametrize(
    ("script", "options", "summary"),
    [
        ("kill.py", ["--kills", "8", "--inside_saves", "3"], "0 torn, 0 backward, 0 differ"),
        ("kill.py", ["--latents", "--kills", "8", "--inside_saves", "2"], "0 torn, 0 backward, 0 differ"),
        ("signals.py", ["--times", "2"], "SIGKILL: 2 of 2"),
        ("faults.py", ["--count", "200"], "silent   0"),
        ("mutations.py", ["--count", "130"], "silent    0"),
        ("concurrency.py", ["--opens", "60", "--pairs", "4"], "4 pairs of samplings"),
    ],
)
def test_short_run(script, options, summary, tmp_path):
    completed = subprocess.run(
        [sys.executable, str(FOLDER / script), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert completed.returncode == 0, completed.stdout[-2000:] + completed.stderr[-2000:]
    assert summary in completed.stdout

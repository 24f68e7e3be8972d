"""The torture scripts in their short form: a real command, killed and ended from outside."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from helpers.paths import ROOT

pytestmark = pytest.mark.slow

FOLDER = ROOT / "benchmarks" / "torture"


@pytest.mark.parametrize(
    ("script", "options", "verdict"),
    [
        ("kill.py", ["--kills", "8", "--inside_saves", "3"], "0 torn, 0 backward, 0 differ"),
        ("signals.py", ["--times", "2"], "SIGKILL: 2 of 2"),
        ("faults.py", ["--count", "200"], "silent   0"),
    ],
)
def test_short_form(script, options, verdict, tmp_path):
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert verdict in done.stdout

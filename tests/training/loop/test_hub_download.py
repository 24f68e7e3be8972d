"""--resume_from_hub: which files are fetched, in which order, and kills in between."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.hub_server import LoopbackHub
from helpers.paths import TESTS

TOKEN = "hf_secretsecretsecret"


def kill_downloads(kills: int, folder: Path) -> str:
    """Resume from a pushed run with so many kills; what the helper prints."""
    with LoopbackHub({TOKEN: "write"}) as hub:
        environment = os.environ | hub.environment(str(folder / "home"), TOKEN)
        environment |= {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
        command = [sys.executable, str(TESTS / "helpers" / "killed_downloads.py"), str(kills)]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800, check=False
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_resume_from_the_hub_that_is_killed_anywhere_finishes_whole(tmp_path: Path):
    """The same command line is repeated after each of 30 kills; its results are those of a run without kills."""
    assert "30 kills" in kill_downloads(30, tmp_path)

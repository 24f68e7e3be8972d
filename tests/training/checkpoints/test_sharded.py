"""State, average and clipping in two connected processes: sharded ones, data-parallel ones, and between them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import TESTS
from helpers.sharded_cases import CASES


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One start for all cases, since importing takes longer than any of them.

    Cases that are left when a process is stopped from outside (a loaded machine) are started once more.
    """
    folder = tmp_path_factory.mktemp("sharded")
    errors = ""
    for _ in range(2):
        if left := [name for name in CASES if not (folder / f"{name}.done").exists()]:
            for name in left:
                shutil.rmtree(folder / name, ignore_errors=True)
            errors = start(folder, left)
    return {path.stem for path in folder.glob("*.done")}, errors


def start(folder: Path, names: list[str]) -> str:
    """Run cases in two processes; return what they print as errors."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [*command, str(TESTS / "helpers" / "sharded_cases.py"), str(folder), *names],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    return result.stderr


@pytest.mark.parametrize("case", CASES)
def test_two_processes(finished, case):
    """Cases run in this order, and the first one that fails ends both processes."""
    done, errors = finished
    assert case in done, errors[-6000:]

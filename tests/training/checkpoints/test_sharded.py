"""State, average and clipping in two connected processes: sharded ones, data-parallel ones, and between them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from helpers.paths import TESTS
from helpers.sharded_cases import CASES


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One start for all cases, since importing takes longer than any of them."""
    folder = tmp_path_factory.mktemp("sharded")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [*command, str(TESTS / "helpers" / "sharded_cases.py"), str(folder)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return {path.stem for path in folder.glob("*.done")}, result.stderr


@pytest.mark.parametrize("case", CASES)
def test_two_processes(finished, case):
    """Cases run in this order, and the first one that fails ends both processes; none may take a minute."""
    done, errors = finished
    assert case in done, errors[-6000:]

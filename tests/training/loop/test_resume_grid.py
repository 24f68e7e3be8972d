"""Bit-exact resume over a grid of options, each run in new processes.

32 uninterrupted runs keep all their checkpoints; 96 runs resume from them.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.paths import PYTHONPATH, TESTS

pytestmark = pytest.mark.slow

SCRIPT = TESTS / "helpers" / "run_list.py"
IMAGES, STEPS, EFFECTIVE_BATCH = 1600, 7, 400
MOMENTS = {"in mid-epoch": 2, "at an epoch's border": 4, "just before a validation": 6}
BASE: dict[str, Any] = {
    "validation_fraction": (1797 - IMAGES) / 1797,
    "max_train_steps": STEPS,
    "validation_steps": 3,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 99,  # the digits' recipe keeps two
    "save_top_k": 0,  # or the checkpoint before the validation would be replaced by the one after it
    "random_flip": True,
    "seed": 5,
}
GRID = [
    {
        "dataloader_num_workers": workers,
        "gradient_accumulation_steps": accumulation,
        "prediction_type": prediction,
        "learn_logvar": logvar,
    }
    for workers, accumulation, prediction, logvar in itertools.product(
        (0, 2), (1, 2), ("epsilon", "v_prediction"), (True, False)
    )
]


def start(processes: int, runs: list[tuple[Path, dict[str, Any]]]) -> None:
    """Train all of them in new processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
    runs_json = json.dumps([[str(folder), options] for folder, options in runs])
    command = [sys.executable, *(torchrun if processes > 1 else []), str(SCRIPT), runs_json]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]


def options_of(choice: dict[str, Any], processes: int) -> dict[str, Any]:
    share = EFFECTIVE_BATCH // processes // choice["gradient_accumulation_steps"]
    return BASE | choice | {"train_batch_size": share}


def cut_short(straight: Path, folder: Path, step: int) -> None:
    """Copy a run as if it was killed after a checkpoint: with later rows, and without its final files."""
    shutil.copytree(straight, folder)
    for path in folder.glob("checkpoint-*"):
        if int(path.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(path)
    for name in ("unet", "logvar", "best"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("finished.json", "model_index.json", "samples.png"):
        (folder / name).unlink()


@pytest.fixture(scope="module", params=[1, 2])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    processes, base = request.param, tmp_path_factory.mktemp("grid")
    straight = [(base / f"{number}-straight", options_of(choice, processes)) for number, choice in enumerate(GRID)]
    start(processes, straight)
    again = []
    for (folder, options), step in itertools.product(straight, MOMENTS.values()):
        resumed = folder.with_name(folder.name.replace("straight", str(step)))
        cut_short(folder, resumed, step)
        again.append((resumed, options | {"resume_from_checkpoint": "latest"}))
    start(processes, again)
    return processes, base


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("number", range(len(GRID)), ids=lambda n: "-".join(map(str, GRID[n].values())))
def test_resume_is_bit_exact(finished, number, moment):
    _, base = finished
    straight, resumed = base / f"{number}-straight", base / f"{number}-{MOMENTS[moment]}"
    state = json.loads((resumed / f"checkpoint-{MOMENTS[moment]}" / "state.json").read_text())
    assert ("validation" in state["progress"]["records"]["todo"]) == (moment == "just before a validation")
    files = [
        "metrics.jsonl",
        "samples.png",
        *(path.relative_to(straight) for path in straight.glob("unet/*.safetensors")),
        *(path.relative_to(straight) for path in straight.glob(f"checkpoint-{STEPS}/*.safetensors")),
    ]
    assert len(files) >= 7
    for name in files:
        assert (resumed / name).read_bytes() == (straight / name).read_bytes(), name

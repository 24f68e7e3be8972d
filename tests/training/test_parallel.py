"""The same run for every split over micro-batches and over processes that `torchrun` starts (gloo)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.caption_runs import caption_inputs
from helpers.paths import PYTHONPATH, TESTS
from helpers.runs import losses, rows
from helpers.text_models import save_text_model
from helpers.tiny import tiny_autoencoder
from safetensors.torch import load_file

SCRIPT = TESTS / "helpers" / "parallel_run.py"
STEPS = 20


@dataclass(frozen=True)
class Finished:
    """What a run left."""

    folder: Path
    gradients: list[torch.Tensor]
    output: str


def launch(
    folder: Path, batch: int, accumulation: int, processes: int, failing: int = -1, **options: Any
) -> subprocess.CompletedProcess:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    arguments = [folder / "run", folder / "gradients.pt", failing, batch, accumulation, STEPS]
    arguments.append(json.dumps(options))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
    return subprocess.run(
        [*launcher, str(SCRIPT), *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=240
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    made = {}
    for name, batch, accumulation, processes in (("1 x 8", 8, 1, 1), ("1 x 4 x 2", 4, 2, 1), ("2 x 4", 4, 1, 2)):
        folder = tmp_path_factory.mktemp("parallel")
        done = launch(folder, batch, accumulation, processes)
        assert done.returncode == 0, done.stderr[-3000:]
        made[name] = Finished(folder / "run", torch.load(folder / "gradients.pt"), done.stdout)
    return made


@pytest.mark.parametrize("split", ["1 x 4 x 2", "2 x 4"])
def test_the_first_gradients_agree(runs: dict[str, Finished], split: str):
    unsplit, parts = runs["1 x 8"].gradients, runs[split].gradients
    norm = torch.nn.utils.get_total_norm(unsplit)
    assert norm > 0.1
    off = torch.nn.utils.get_total_norm([a - b for a, b in zip(unsplit, parts, strict=True)])
    assert off < 1e-5 * norm


@pytest.mark.parametrize("split", ["1 x 4 x 2", "2 x 4"])
def test_the_losses_agree(runs: dict[str, Finished], split: str):
    """What is logged is the mean over the effective batch, not one process's share."""
    unsplit, parts = losses(runs["1 x 8"].folder), losses(runs[split].folder)
    assert len(unsplit) == STEPS
    assert parts == pytest.approx(unsplit, abs=1e-3)
    assert parts[0] == pytest.approx(unsplit[0], abs=1e-6)


@pytest.mark.parametrize("split", ["1 x 4 x 2", "2 x 4"])
def test_validation_agrees(runs: dict[str, Finished], split: str):
    unsplit, parts = (rows(runs[name].folder) for name in ("1 x 8", split))
    assert [row["step"] for row in parts] == [row["step"] for row in unsplit], "no row twice, none missing"
    for a, b in zip(unsplit, parts, strict=True):
        for name in a:
            if name.startswith("val/"):
                assert b[name] == pytest.approx(a[name], rel=1e-3)


@pytest.mark.parametrize("split", ["1 x 4 x 2", "2 x 4"])
def test_logvar_and_average_agree(runs: dict[str, Finished], split: str):
    """Data-parallel training averages logvar's gradient too; the average of the weights counts optimizer steps."""
    for name in ("logvar/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        unsplit, parts = (load_file(runs[run].folder / name) for run in ("1 x 8", split))
        for key, tensor in unsplit.items():
            torch.testing.assert_close(parts[key], tensor, atol=2e-3, rtol=0)


def test_two_processes_print_once(runs: dict[str, Finished]):
    output = runs["2 x 4"].output
    assert output.count("= 8\n") == 1
    assert "2 processes" in output
    assert output.count("draw from it") == 1


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are listed in /proc on Linux only")
def test_no_thread_of_the_group_is_left(runs: dict[str, Finished]):
    """One that still releases an exchange while Python exits would abort the process after a finished run."""
    for rank in (0, 1):
        names = json.loads((runs["2 x 4"].folder.parent / f"threads-{rank}.json").read_text())
        assert names
        assert not [name for name in names if "gloo" in name]


def test_a_failing_process_ends_the_others(tmp_path: Path):
    """The second process cannot read its images: the first does not wait for it, and one of them reports why."""
    done = launch(tmp_path, 4, 1, 2, failing=1)
    assert done.returncode != 0
    assert done.stderr.count("rank 1 cannot read") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_in_latents_is_the_same_for_every_split(tmp_path: Path):
    """The scale to the last bit, since every process measures the same; gradients and losses as in pixels."""
    tiny_autoencoder("kl", channels=1, latent_channels=2).save_pretrained(tmp_path / "stage")
    scales, gradients, steps = [], [], []
    for name, batch, accumulation, processes in (("a", 8, 1, 1), ("b", 4, 2, 1), ("c", 4, 1, 2)):
        folder = tmp_path / name
        folder.mkdir()
        done = launch(folder, batch, accumulation, processes, vae=str(tmp_path / "stage"), scale_factor="data")
        assert done.returncode == 0, done.stderr[-3000:]
        state = json.loads((folder / "run" / f"checkpoint-{STEPS}" / "state.json").read_text())
        scales.append(state["progress"]["records"]["latent_scale"]["scaling_factor"])
        gradients.append(torch.load(folder / "gradients.pt"))
        steps.append(losses(folder / "run"))
    assert scales[0] == scales[1] == scales[2]
    norm = torch.nn.utils.get_total_norm(gradients[0])
    for parts, values in zip(gradients[1:], steps[1:], strict=True):
        off = torch.nn.utils.get_total_norm([a - b for a, b in zip(gradients[0], parts, strict=True)])
        assert off < 1e-5 * norm
        assert values[0] == pytest.approx(steps[0][0], abs=1e-6)
        assert values == pytest.approx(steps[0], abs=1e-3)


@pytest.mark.slow
def test_a_text_encoder_is_trained_alike_for_every_split(tmp_path: Path):
    """Weights that no token depends on (text_projection) do not keep two processes from averaging the gradients."""
    options = caption_inputs(tmp_path)
    options |= {"text_encoder": str(save_text_model(tmp_path / "text", "projection")), "train_text_encoder": True}
    for name in ("max_train_steps", "validation_steps"):
        del options[name]
    gradients, weights = [], []
    for name, batch, accumulation, processes in (("a", 8, 1, 1), ("b", 4, 2, 1), ("c", 4, 1, 2)):
        folder = tmp_path / name
        folder.mkdir()
        done = launch(folder, batch, accumulation, processes, **options)
        assert done.returncode == 0, done.stderr[-3000:]
        gradients.append(torch.load(folder / "gradients.pt"))
        weights.append(load_file(folder / "run" / f"checkpoint-{STEPS}" / "model.safetensors"))
    norm = torch.nn.utils.get_total_norm(gradients[0])
    for parts, others in zip(gradients[1:], weights[1:], strict=True):
        assert len(parts) == len(gradients[0])
        off = torch.nn.utils.get_total_norm([a - b for a, b in zip(gradients[0], parts, strict=True)])
        assert off < 1e-5 * norm
        for name in weights[0]:
            torch.testing.assert_close(others[name], weights[0][name], rtol=1e-2, atol=2e-3)

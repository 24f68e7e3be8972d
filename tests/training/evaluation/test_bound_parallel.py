"""Two processes: the same loss history for any batch sizes, and the same evaluation."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.paths import ROOT
from helpers.runs import tiny_flags, tiny_run
from safetensors.torch import load_file

from diffusers_ddpm_ext import cli
from diffusers_ddpm_ext.diffusion.timesteps import LossSecondMomentSampler
from diffusers_ddpm_ext.training.trainer import train


def launch(*command: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run([*launcher, *command], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_unequal_batches_give_the_same_loss_history_on_all_processes(tmp_path):
    launch(str(ROOT / "tests" / "helpers" / "bound_ranks.py"), str(tmp_path))
    first, second = (load_file(tmp_path / f"rank-{rank}.safetensors") for rank in (0, 1))
    alone = LossSecondMomentSampler(4, history=3)
    source = torch.Generator().manual_seed(0)
    for _ in range(4):
        batch = torch.rand(8, 2, generator=source, dtype=torch.float64)
        alone.update((batch[:, 0] * 4).floor().long(), batch[:, 1])
    for state in (first, second):
        assert all(torch.equal(state[name], tensor) for name, tensor in alone.state_dict().items())


@pytest.mark.slow
def test_training_is_the_same_on_two_processes(tmp_path):
    """One process with batches of 16 and two with 8: the same steps, and losses to rounding."""
    options = {"timestep_sampler": "loss_second_moment", "num_train_timesteps": 5, "max_train_steps": 8}
    options |= {"checkpointing_steps": 8, "validation_steps": 0}
    single = train(tiny_run(tmp_path / "single", **options, train_batch_size=16))
    flags = tiny_flags(**options, train_batch_size=8, output_dir=str(tmp_path / "parts"))
    launch(str(ROOT / "training" / "train.py"), *flags)
    ours, theirs = (
        load_file(folder / "checkpoint-8" / "model.safetensors") for folder in (single, tmp_path / "parts")
    )
    assert torch.equal(ours["timestep_sampler.counts"], theirs["timestep_sampler.counts"])
    assert int(ours["timestep_sampler.counts"].sum()) == 50  # full, so that the last steps were drawn by it
    torch.testing.assert_close(ours["timestep_sampler.losses"], theirs["timestep_sampler.losses"], rtol=1e-4, atol=0)


def test_an_evaluation_is_the_same_on_two_processes(tmp_path):
    folder = train(tiny_run(tmp_path / "run"))
    flags = ["--num_timesteps", "5", "--max_images", "9", "--batch_size", "8"]
    assert cli.main(["evaluate", str(folder), *flags, "--device", "cpu", "--json", str(tmp_path / "one.json")]) == 0
    launch("-m", "diffusers_ddpm_ext", "evaluate", str(folder), *flags, "--json", str(tmp_path / "two.json"))
    assert json.loads((tmp_path / "two.json").read_text()) == json.loads((tmp_path / "one.json").read_text())
    assert not list((folder / "evaluation").glob(".rows-*"))

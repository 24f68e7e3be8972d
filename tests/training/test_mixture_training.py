"""Runs on mixtures and balanced classes: resumed to the bit, the same for every split, evaluated by one command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.accelerate_state import fresh_accelerate, reset_accelerate  # noqa: F401
from helpers.paths import PYTHONPATH, TESTS
from helpers.runs import losses, tiny_run
from PIL import Image
from safetensors.torch import load_file

from diffusers_ddpm_ext.cli import main
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training import trainer

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[str]:
    """Two folders of noise, with two classes each."""
    root, draw = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    for name, classes, count in (("pets", ("cat", "dog"), 15), ("wild", ("dog", "fox"), 6)):
        for index in range(count):
            path = root / name / classes[index % 2] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (10, 12), dtype=np.uint8)).save(path)
    return [str(root / "pets"), str(root / "wild")]


def train(folder: Path, sources: list[str], **options) -> None:
    reset_accelerate()
    trainer.train(tiny_run(folder, train_data_dir=sources, save_model_epochs=None, **options))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"dataset_weights": [1, 3]}, {"class_balance": True, "conditioning_key": "adm"}])
def test_a_run_resumes_to_the_bit(options, sources, tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    options = {"norm_num_groups": 4, "random_flip": True, "checkpointing_steps": 1, "validation_steps": 0} | options
    train(straight, sources, **options)
    train(broken, sources, **options, resume_from_checkpoint="auto", max_train_minutes=1e-9)
    train(broken, sources, **options, resume_from_checkpoint="auto")
    ours, theirs = load_file(broken / WEIGHTS), load_file(straight / WEIGHTS)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert losses(broken) == losses(straight)
    name = next(iter(options.keys() & {"dataset_weights", "class_balance"}))
    with pytest.raises(ConfigError, match=f"--{name} is"):
        train(broken, sources, **(options | {name: None if name == "dataset_weights" else False}),
              resume_from_checkpoint="latest")  # fmt: skip


@pytest.mark.slow
def test_a_mixture_is_measured_without_repeating_it(sources, tmp_path, capsys):
    """`evaluate` finds the mixture in config.yaml, and takes one of its sources instead."""
    train(tmp_path, sources, dataset_weights=[1, 3])
    command = [
        "evaluate",
        str(tmp_path),
        "--num_timesteps",
        "3",
        "--split",
        "train",
        "--json",
        str(tmp_path / "x.json"),
    ]
    assert main(command) == 0
    assert json.loads((tmp_path / "x.json").read_text())["num_images"] == 18
    assert main(["evaluate", "--train_data_dir", sources[1], *command[1:]]) == 0
    assert json.loads((tmp_path / "x.json").read_text())["num_images"] == 5
    assert main(["report", str(tmp_path)]) == 0


@pytest.mark.slow
def test_two_processes_draw_the_same(sources, tmp_path):
    for options in ({"dataset_weights": [1, 3]}, {"class_balance": True}):
        gradients, steps = [], []
        for name, batch, accumulation, processes in (("a", 8, 1, 1), ("b", 4, 2, 1), ("c", 4, 1, 2)):
            folder = tmp_path / (name + next(iter(options)))
            folder.mkdir()
            launcher = [sys.executable]
            if processes > 1:
                launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            arguments = [folder / "run", folder / "gradients.pt", -1, batch, accumulation, 8]
            more = {"train_data_dir": sources, "random_flip": True} | options
            script = TESTS / "helpers" / "parallel_run.py"
            done = subprocess.run(
                [*launcher, str(script), *map(str, arguments), json.dumps(more)],
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH},
                capture_output=True, text=True, timeout=240,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-3000:]
            gradients.append(torch.load(folder / "gradients.pt"))
            steps.append(losses(folder / "run"))
        norm = torch.nn.utils.get_total_norm(gradients[0])
        for parts, values in zip(gradients[1:], steps[1:], strict=True):
            off = torch.nn.utils.get_total_norm([a - b for a, b in zip(gradients[0], parts, strict=True)])
            assert off < 1e-5 * norm
            assert values == pytest.approx(steps[0], abs=1e-3)

"""The commands `train` and `sample`, started as subprocesses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.paths import ROOT
from PIL import Image

SMALL = {"block_out_channels": "8 16", "attention_levels": "1", "attention_head_dim": "4", "norm_num_groups": "4"}
SHORT = {"ddpm_num_inference_steps": "5", "num_preview_images": "4", "lr_warmup_steps": "1", "layers_per_block": "1"}


def flags(options: dict[str, str]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", *value.split())]


def run_command(*command: str, folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def read_pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_train_and_sample_the_digits(tmp_path: Path):
    """With default options but a short length: each run has a new folder, named in its last line."""
    train = [sys.executable, str(ROOT / "training" / "train.py"), "--max_train_steps", "5", *flags(SHORT)]
    for name in ("runs/digits", "runs/digits-2"):
        done = run_command(*train, folder=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"ddpm-ext sample {name}" in done.stdout.splitlines()[-1]
    sample = [sys.executable, "-m", "diffusers_ddpm_ext.cli", "sample", "runs/digits", "--num_images", "3"]
    done = run_command(*sample, "--num_inference_steps", "4", "--out", "grid.png", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_pixels(tmp_path / "grid.png").ndim == 2, "grayscale, as the digits are"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """24 color images of mixed sizes and formats, in two folders."""
    folder = tmp_path / "photos"
    random = np.random.default_rng(0)
    for number in range(24):
        kind = ("png", "jpg", "bmp")[number % 3]
        size = 20 + number, 40 - number // 2
        path = folder / ("sea" if number % 2 else "land") / f"{number}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    return folder


def test_train_on_a_folder_under_accelerate(tmp_path: Path, photos: Path):
    """Color images that are not square, two micro-batches, flips, a tracker; the data's own channels."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    options = ["--train_data_dir", str(photos), "--resolution", "16", "24", "--random_flip", "--output_dir", "out"]
    options += ["--train_batch_size", "4", "--gradient_accumulation_steps", "2", "--max_train_steps", "6"]
    done = run_command(*launch, str(ROOT / "training" / "train.py"), *options, *flags(SMALL | SHORT), folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "22 " in done.stdout, "a tenth of 24 is held out"
    grid = read_pixels(tmp_path / "out" / "samples.png")
    assert grid.shape[2] == 3
    assert (tmp_path / "out" / "logs").is_dir()
    assert (tmp_path / "out" / "samples" / "diffusion_row.png").is_file()

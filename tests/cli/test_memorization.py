"""`ddpm-ext evaluate --memorization`: copies are flagged, held-out images are not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import tiny_run
from helpers.tiny import tiny_unet
from PIL import Image
from sklearn.datasets import load_digits

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, cli
from diffusers_ddpm_ext.training.trainer import train

TRAINED = 1617


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An untrained model of the digits."""
    path = tmp_path_factory.mktemp("model") / "model"
    DDPMExtPipeline(tiny_unet(1), DDPMExtScheduler(50)).save_pretrained(path)
    return path


def measure(folder: Path, out: Path, *flags: str) -> dict:
    assert cli.main(["evaluate", str(folder), "--device", "cpu", "--out", str(out), "--memorization", *flags]) == 0
    return json.loads((out / "sample_metrics.json").read_text())["memorization"]


def digits(path: Path, start: int, stop: int) -> str:
    np.save(path, (load_digits().images[start:stop] / 16).astype(np.float32))
    return str(path)


@pytest.mark.parametrize("extractor", ["digits", "pixels"])
def test_training_images_are_flagged_and_held_out_ones_are_not(extractor, folder, tmp_path, capsys):
    flags = ["--feature_extractor", extractor, "--samples"]
    copies = measure(folder, tmp_path / "copies", *flags, digits(tmp_path / "copies.npy", 0, 300))
    assert copies["rate"]["value"] >= 0.95
    assert copies["memorizes"]
    assert "repeats training images" in capsys.readouterr().out
    unseen = measure(folder, tmp_path / "unseen", *flags, digits(tmp_path / "unseen.npy", TRAINED, 1797))
    assert unseen["chance"]["low"] <= unseen["rate"]["value"] <= unseen["chance"]["high"]
    assert not unseen["memorizes"]
    assert "not more than chance gives" in capsys.readouterr().out
    with Image.open(tmp_path / "copies" / "copies.png") as sheet:
        assert sheet.width > sheet.height / 4


def test_samples_of_a_run_with_the_gap_of_its_loss(folder, tmp_path, capsys):
    """An untrained network has seen no image: no copies, and a gap whose interval is around 0 at most steps."""
    flags = ["--num_samples", "40", "--num_inference_steps", "3", "--metrics", "kid"]
    result = measure(folder, tmp_path / "out", *flags)
    assert not result["memorizes"]
    gap = result["loss_gap"]
    around = [low <= 0 <= high for low, high in zip(gap["low"], gap["high"], strict=True)]
    assert np.mean(around) > 0.6
    assert gap["timesteps"] == sorted(gap["timesteps"])
    assert (tmp_path / "out" / "loss_gap.png").is_file()
    printed = capsys.readouterr().out
    assert "N = 40 samples, 1,617 training images" in printed
    assert "kernel distance" in printed


def test_it_needs_held_out_images(folder, tmp_path, capsys):
    samples = digits(tmp_path / "some.npy", 0, 20)
    argv = ["evaluate", str(folder), "--memorization", "--samples", samples, "--validation_fraction", "0"]
    assert cli.main([*argv, "--out", str(tmp_path / "out")]) == 2
    assert "no images are held out" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_overfitted_to_32_images_is_flagged(tmp_path):
    """Trained on 32 digits for 1,200 epochs, with all others held out."""
    sizes = {"block_out_channels": [32, 64], "train_batch_size": 32, "max_train_steps": 1200, "ema_decay": 0.99}
    chain = {"num_train_timesteps": 200, "beta_schedule": "squaredcos_cap_v2", "validation_steps": 0}
    run = tiny_run(tmp_path / "run", validation_fraction=1765 / 1797, logging_steps=100, **sizes, **chain)
    folder = train(run)
    assert folder is not None
    result = measure(folder, tmp_path / "out", "--num_samples", "200", "--num_inference_steps", "50")
    assert result["num_training"] == 32
    assert result["memorizes"]
    assert result["rate"]["low"] > 0.3
    gap = result["loss_gap"]
    assert sum(low > 0 for low in gap["low"]) > len(gap["low"]) / 3

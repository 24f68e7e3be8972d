"""`ddpm-ext evaluate --memorization`: copies are flagged, held-out images are not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny import tiny_unet
from PIL import Image
from sklearn.datasets import load_digits

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, cli

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

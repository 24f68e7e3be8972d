"""What `benchmarks/bench_train.py` rests on: the clock in the script's process, and the stand-in for torchvision."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers.paths import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "benchmarks"))

from stock import contenders, processes

STEPS = """
import sys, torch
weight = torch.nn.Parameter(torch.zeros(3))
optimizer = torch.optim.SGD([weight], lr=1.0)
for step in range(int(sys.argv[1])):
    weight.grad = torch.ones(3)
    optimizer.step()
    print(step + 1, flush=True)
"""

STAND_IN = """
import importlib.util
from torchvision import transforms
assert transforms.ToTensor
from diffusers import UNet2DModel
from transformers.utils import is_torchvision_available
print(is_torchvision_available(), transforms.__file__)
"""


@pytest.fixture(scope="module")
def transforms():
    """The stand-in, also where torchvision is installed."""
    spec = contenders.importlib.util.spec_from_file_location(
        "stand_in_transforms", ROOT / "benchmarks" / "stock" / "stand_in" / "torchvision" / "transforms.py"
    )
    module = contenders.importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_stand_in_scales_and_normalizes(transforms):
    """ToTensor and Normalize([0.5], [0.5]) are x / 127.5 - 1 in the order (channels, height, width)."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    both = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])
    expected = torch.from_numpy(pixels.transpose(2, 0, 1) / 127.5 - 1).float()
    torch.testing.assert_close(both(Image.fromarray(pixels)), expected, rtol=0, atol=1e-6)


def test_stand_in_resizes_the_short_side_and_crops(transforms):
    image = Image.new("RGB", (90, 60))
    assert transforms.Resize(20, transforms.InterpolationMode.BILINEAR)(image).size == (30, 20)
    ramp = Image.fromarray(np.tile(np.arange(7, dtype=np.uint8), (5, 1)))
    assert np.asarray(transforms.CenterCrop(3)(ramp)).tolist() == [[2, 3, 4]] * 3
    crops = {tuple(np.asarray(transforms.RandomCrop(5)(ramp))[0]) for _ in range(60)}
    assert crops == {(0, 1, 2, 3, 4), (1, 2, 3, 4, 5), (2, 3, 4, 5, 6)}


def test_both_commands_name_the_same_network_and_pictures(tmp_path):
    """All flags but the stock script's and ours are the same text, and the network is one that Diffusers builds."""
    from diffusers import UNet2DModel

    network = contenders.Network("tiny", 8, (16, 32), 1, 4, layers=1, groups=8)
    contenders.save_images(tmp_path / "images", 8, 4)
    job = contenders.Job(network, 1, tmp_path / "images")
    stock = contenders.stock_command(job, tmp_path / "train_unconditional.py", tmp_path / "out")
    ours = contenders.our_command(job, tmp_path / "out")
    assert set(stock[2:]) - set(ours) == {"--use_ema", "--num_epochs=1"}
    model = UNet2DModel.from_config(json.loads((tmp_path / "images.json").read_text()))
    assert model(torch.zeros(4, 3, 8, 8), 0).sample.shape == (4, 3, 8, 8)


@pytest.mark.slow
def test_script_stops_after_each_turn(tmp_path):
    """Three steps per turn, of which the first includes the start; a stopped script takes no step."""
    script, env = tmp_path / "steps.py", contenders.environment(1, stock=False)
    script.write_text(STEPS)
    with processes.Script([sys.executable, str(script), "1000"], env, tmp_path / "log", 3) as running:
        for turns in (2, 3, 4):
            turn = running.turn()
            assert turn.wall > 0
            assert turn.threads == 1
            time.sleep(0.3)
            assert len(running.log.read_text().split()) == 3 * turns - 1  # the hook runs inside the last step
    assert running.process.returncode == -9


@pytest.mark.slow
def test_script_that_ends_early_is_an_error(tmp_path):
    script = tmp_path / "steps.py"
    script.write_text(STEPS)
    env = contenders.environment(1, stock=False)
    with (
        processes.Script([sys.executable, str(script), "4"], env, tmp_path / "log", 3) as running,
        pytest.raises(SystemExit, match="ended with status 0"),
    ):
        running.turn()


@pytest.mark.slow
@pytest.mark.skipif(contenders.has_torchvision(), reason="torchvision is installed, and no stand-in is used")
def test_stand_in_is_imported_but_not_reported_as_installed(tmp_path):
    env = contenders.environment(1, stock=True)
    completed = subprocess.run([sys.executable, "-c", STAND_IN], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    answer, path = completed.stdout.split()
    assert answer == "False"
    assert os.path.dirname(path) == str(ROOT / "benchmarks" / "stock" / "stand_in" / "torchvision")

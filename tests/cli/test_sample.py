"""`ddpm-ext sample`: every scheduler, every kind of file, and going on where it was cut off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from helpers.paths import ROOT
from helpers.tiny import EXACT, tiny_unet
from PIL import Image

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, cli
from diffusers_ddpm_ext.models import fast_attention
from diffusers_ddpm_ext.utils.random_keys import generator

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pipe")
    DDPMExtPipeline(tiny_unet(), DDPMExtScheduler(100, prediction_type="v_prediction")).save_pretrained(place)
    return place


@pytest.fixture
def sample(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def command(*flags: str) -> int:
        line = [
            "sample",
            str(folder),
            "--device",
            "cpu",
            *EXACT,
            "--num_inference_steps",
            "6",
            "--num_images",
            "5",
            *flags,
        ]
        return cli.main(line)

    return command


def test_the_scheduler_of_a_name(folder, sample):
    """What the pipeline draws with that scheduler, by hand."""
    assert (
        sample(
            "--scheduler",
            "EulerAncestralDiscreteScheduler",
            "--scheduler_args",
            "timestep_spacing=trailing",
            "--out",
            "a.npy",
        )
        == 0
    )
    pipeline = DDPMExtPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    config = pipeline.scheduler.config
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(config, timestep_spacing="trailing")
    each = [generator("sample", 0, index) for index in range(5)]
    expected = pipeline(5, each, 6, "np").images
    assert np.array_equal(np.load("a.npy"), expected)


def test_calls_are_told(sample, capsys):
    assert sample("--scheduler", "HeunDiscreteScheduler", "--out", "a.png") == 0
    assert "(11 calls of the network each)" in capsys.readouterr().out


def test_other_schedulers_take_fifty_steps(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = ["sample", str(folder), "--scheduler", "DDIMScheduler", "--num_images", "1", "--out", "a.png"]
    assert cli.main(line) == 0
    assert "(50 calls of the network each)" in capsys.readouterr().out


def test_every_kind_of_file_holds_the_same_images(sample):
    for out in ("a.npy", "a.npz", "a.png", "a.gif", "each"):
        assert sample("--out", out, "--batch_size", "2") == 0
    images = np.load("a.npy")
    assert images.shape == (5, 8, 8, 3)
    levels = np.load("a.npz")["arr_0"]
    assert levels.dtype == np.uint8
    assert np.abs(levels / 255 - images).max() <= 0.5 / 255 + 1e-6
    for index, image in enumerate(levels):
        with Image.open(f"each/{index:05d}.png") as picture:
            assert np.array_equal(np.asarray(picture), image)
    assert sorted(path.name for path in Path().iterdir()) == ["a.gif", "a.npy", "a.npz", "a.png", "each"]


def test_sixteen_bits_keep_what_eight_cut(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    DDPMExtPipeline(tiny_unet(channels=1), DDPMExtScheduler(100)).save_pretrained("grey")
    line = ["sample", "grey", "--device", "cpu", "--num_inference_steps", "3", "--num_images", "2"]
    assert cli.main([*line, "--out", "a.npy"]) == 0
    assert cli.main([*line, "--bit_depth", "16", "--out", "each"]) == 0
    assert cli.main([*line, "--bit_depth", "16", "--out", "a.npz", "--individual", "beside"]) == 0
    images, levels = np.load("a.npy"), np.load("a.npz")["arr_0"]
    assert levels.dtype == np.uint16
    assert np.abs(levels / 65535 - images).max() <= 0.5 / 65535 + 1e-6
    for place in ("each", "beside"):
        for index, image in enumerate(levels):
            with Image.open(f"{place}/{index:05d}.png") as picture:
                assert picture.mode == "I;16"
                assert np.array_equal(np.asarray(picture), image[..., 0])
    assert cli.main([*line, "--bit_depth", "16", "--out", "each"]) == 0  # they are there
    capsys.readouterr()
    assert cli.main([*line, "--out", "each"]) == 2
    assert "bit_depth 16, not 8" in capsys.readouterr().err


def test_a_video_goes_from_noise_to_images(sample):
    assert sample("--out", "a.gif") == 0
    assert sample("--out", "a.png") == 0
    with Image.open("a.gif") as video, Image.open("a.png") as last:
        assert video.n_frames == 7  # what the network saw at each of 6 steps, and what came out
        assert video.info["loop"] == 0
        video.seek(6)
        off = np.abs(np.asarray(video.convert("RGB"), dtype=float) - np.asarray(last.convert("RGB"), dtype=float))
        assert off.mean() < 6  # a palette of 256 colours
        assert video.info["duration"] == 2000


class Cut(Exception):
    """Whatever ends a process in the middle."""


def cut_after(monkeypatch, batches):
    """The process dies in a batch."""
    call, done = DDPMExtPipeline.__call__, []

    def dying(self, *args, **kwargs):
        if len(done) == batches:
            raise Cut
        done.append(kwargs["batch_size"])
        return call(self, *args, **kwargs)

    monkeypatch.setattr(DDPMExtPipeline, "__call__", dying)
    return done


@pytest.mark.parametrize("out", ["a.npy", "each"])
def test_it_goes_on_where_it_was_cut_off(sample, out, monkeypatch, capsys):
    flags = ("--out", out, "--batch_size", "2")
    with monkeypatch.context() as context:
        cut_after(context, 1)
        with pytest.raises(Cut):
            sample(*flags)
    assert not Path("a.npy").exists()
    with monkeypatch.context() as context:
        done = cut_after(context, 9)
        assert sample(*flags) == 0
        assert done == [2, 1]
    assert "2 of 5 images exist already" in capsys.readouterr().err
    assert sample("--out", "whole.npy") == 0
    whole = np.load("whole.npy")
    if out == "a.npy":
        assert np.allclose(np.load(out), whole, atol=1e-5)
    else:
        for index in range(5):
            with Image.open(f"each/{index:05d}.png") as picture:
                assert np.abs(np.asarray(picture) / 255 - whole[index]).max() < 0.51 / 255
    assert not list(Path().glob(".*.part"))


def test_what_waits_of_other_settings_is_not_used(sample, monkeypatch):
    with monkeypatch.context() as context:
        cut_after(context, 1)
        with pytest.raises(Cut):
            sample("--out", "a.npy", "--batch_size", "2")
    assert sample("--out", "a.npy", "--seed", "1") == 0
    assert sample("--out", "b.npy", "--seed", "1") == 0
    assert np.array_equal(np.load("a.npy"), np.load("b.npy"))


def test_a_folder_grows_and_mends(sample, folder, monkeypatch):
    assert sample("--out", "each") == 0
    before = {path.name: path.read_bytes() for path in Path("each").glob("*.png")}
    Path("each/00003.png").write_bytes(b"torn")
    done = cut_after(monkeypatch, 9)
    assert sample("--out", "each", "--num_images", "7") == 0
    assert done == [3]
    after = {path.name: path.read_bytes() for path in Path("each").glob("*.png")}
    assert len(after) == 7
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--seed", "1"], "seed 0, not 1"),
        (["--scheduler", "DDIMScheduler"], "scheduler DDPMExtScheduler, not DDIMScheduler"),
        (["--temperature", "0.5"], "temperature 1.0, not 0.5"),
    ],
)
def test_a_folder_of_other_images(sample, flags, told, capsys):
    assert sample("--out", "each", "--num_images", "1") == 0
    assert sample("--out", "each", "--num_images", "1", *flags) == 2
    assert told in capsys.readouterr().err
    assert sorted(path.name for path in Path("each").iterdir()) == ["00000.png", "samples.json"]


def test_another_model_in_the_same_folder(sample, folder, tmp_path, capsys):
    """A run that was trained further is another model, although its folder is the same."""
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    line = ["sample", str(copy), "--device", "cpu", "--num_inference_steps", "3", "--num_images", "1", "--out", "each"]
    assert cli.main(line) == 0
    pipeline = DDPMExtPipeline.from_pretrained(copy)
    with torch.no_grad():
        pipeline.unet.conv_in.weight.add_(0.01)
    pipeline.save_pretrained(copy)
    assert cli.main(line) == 2
    assert "holds images with model" in capsys.readouterr().err


def test_torchsde_is_asked_for(folder, tmp_path):
    code = (
        "import sys\nsys.modules['torchsde'] = None\n"
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'torchsde' else find(name, *a)\n"
        "from diffusers_ddpm_ext.cli import main\n"
        f"sys.exit(main(['sample', {str(folder)!r}, '--scheduler', 'DPMSolverSDEScheduler', '--out', 'a.png']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.strip() == "error: --scheduler DPMSolverSDEScheduler needs torchsde: pip install torchsde"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_draw_the_same(folder, tmp_path):
    code = [
        "-m",
        "diffusers_ddpm_ext",
        "sample",
        str(folder),
        "--device",
        "cpu",
        "--num_images",
        "5",
        "--batch_size",
        "2",
    ]
    flags = ["--num_inference_steps", "4", "--scheduler", "DDIMScheduler", "--out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "check": False}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for line in ([*torchrun, *code, *flags, "two.npy"], [*torchrun, *code, *flags, "two"]):
        done = subprocess.run(line, **run)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("5 images of 8x8x3") == 1
    done = subprocess.run([sys.executable, *code, *flags, "one.npy"], **run)
    assert done.returncode == 0, done.stderr
    assert np.allclose(np.load(tmp_path / "two.npy"), np.load(tmp_path / "one.npy"), atol=1e-5)
    assert len(list((tmp_path / "two").glob("*.png"))) == 5


def test_a_compiled_network_gets_batches_of_one_size(sample, monkeypatch):
    """The last batch is filled up, and what fills it is not written."""
    assert sample("--out", "plain.npy", "--batch_size", "2", "--memory_format", "channels_last") == 0
    compiled, call, sizes = [], DDPMExtPipeline.__call__, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(type(self).__name__))
    monkeypatch.setattr(torch, "compile", lambda module: module)

    def counting(self, *args, **kwargs):
        sizes.append(kwargs["batch_size"])
        return call(self, *args, **kwargs)

    monkeypatch.setattr(DDPMExtPipeline, "__call__", counting)
    assert sample("--out", "compiled.npy", "--batch_size", "2", "--compile") == 0
    assert compiled == ["UNet2DModel"]
    assert sizes == [2, 2, 2]
    assert np.allclose(np.load("compiled.npy"), np.load("plain.npy"), rtol=0, atol=1e-5)


def test_as_many_images_at_a_time_as_fit(sample, monkeypatch, capsys):
    monkeypatch.setattr("diffusers_ddpm_ext.pipelines.acceleration.free_memory_bytes", lambda device: 0)
    assert sample("--out", "one.npy", "--num_images", "2") == 0
    assert "(6 calls of the network each), 1 at a time" in capsys.readouterr().out


def test_fast_attention_changes_images_by_rounding_only(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = ["sample", str(folder), "--device", "cpu", "--num_inference_steps", "6", "--num_images", "2"]
    calls: list[str] = []
    project = fast_attention._project
    monkeypatch.setattr(fast_attention, "_project", lambda *inputs: calls.append("fast") or project(*inputs))
    assert cli.main([*line, "--out", "never.npy", *EXACT]) == 0
    assert not calls
    assert cli.main([*line, "--out", "auto.npy"]) == 0
    assert bool(calls) == fast_attention.has_onednn()
    np.testing.assert_allclose(np.load("auto.npy"), np.load("never.npy"), atol=1e-4)

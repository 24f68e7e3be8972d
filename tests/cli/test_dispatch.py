"""`ddpm-ext`: its commands, what they print, how they end."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from helpers.paths import ROOT
from helpers.tiny import EXACT
from PIL import Image

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, __version__, cli
from diffusers_ddpm_ext.cli import dispatch, sample
from diffusers_ddpm_ext.cli.dispatch import USAGE
from diffusers_ddpm_ext.errors import RunError

STEPS = 5


def network(channels: int, seed: int = 0) -> UNet2DModel:
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=(8, 16),
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    DDPMExtPipeline(network(1), DDPMExtScheduler(STEPS)).save_pretrained(root / "grey")
    network(1, seed=1).save_pretrained(root / "grey" / "unet", variant="raw")
    DDPMPipeline(network(3), DDPMScheduler(STEPS)).save_pretrained(root / "stock")
    DDPMExtPipeline(network(2), DDPMExtScheduler(STEPS)).save_pretrained(root / "two")
    return root


@pytest.fixture
def drawn(folder, tmp_path, monkeypatch):
    """Samples of a pipeline as an array, by the command."""
    monkeypatch.chdir(tmp_path)

    def draw(name: str, *flags: str) -> np.ndarray:
        assert cli.main(["sample", str(folder / name), "--out", "drawn.npy", "--device", "cpu", *EXACT, *flags]) == 0
        return np.load("drawn.npy")

    return draw


def test_version_and_help(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"ddpm-ext {__version__}\n"
    for argv in (["--help"], ["-h"], ["help"]):
        assert cli.main(argv) == 0
        told = capsys.readouterr().out
        assert "train" in told
        assert "sample" in told
    assert cli.main(["sample", "--help"]) == 0
    assert "--num_images" in capsys.readouterr().out


def test_module_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "diffusers_ddpm_ext.cli", "--version"],
        capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True,
    )  # fmt: skip
    assert done.stdout == f"ddpm-ext {__version__}\n"


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (RunError("the loss is not finite\nat step 5"), 1, "error: the loss is not finite at step 5\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (SystemExit(7), 7, ""),
        (SystemExit("no more"), 1, "error: no more\n"),
        (BrokenPipeError(32, "Broken pipe"), 141, "error: the output was closed before all of it was written\n"),
        (MemoryError(), 1, "error: the memory does not suffice: use smaller batches or images\n"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. Error code 12"),
            1,
            "error: the memory does not suffice (DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 "
            "bytes): use smaller batches or images\n",
        ),
        (
            PermissionError(13, "Permission denied", "/root/a\x1b[31m"),
            2,
            "error: /root/a\\x1b[31m: Permission denied\n",
        ),
        (IsADirectoryError(21, "Is a directory", b"/a\xff"), 2, "error: /a\ufffd: Is a directory\n"),
        (OSError(28, "No space left on device", "a.png"), 1, "error: cannot write a.png: No space left on device\n"),
        (OSError(28, "No space left on device"), 1, "error: cannot write: No space left on device\n"),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            2,
            "error: a package cannot be imported (No module named 'torch'): ddpm-ext doctor says what is missing\n",
        ),
    ],
)
def test_how_a_run_ends(raised, status, line, monkeypatch, capsys):
    def command(argv: list[str]) -> str:
        raise raised

    monkeypatch.setattr(sample, "sample_command", command)
    assert cli.main(["sample"]) == status
    assert capsys.readouterr().err == line


OWN_FILE = str(ROOT / "diffusers_ddpm_ext" / "recipes.yaml")


@pytest.mark.parametrize(
    "bug",
    [
        ZeroDivisionError(),
        ValueError("of a library"),
        RuntimeError("shapes do not fit"),
        KeyError("x"),
        OSError("without a file"),
        FileNotFoundError(2, "No such file", OWN_FILE),
        ImportError("cannot import name", name="diffusers_ddpm_ext.cli.gone"),
    ],
)
def test_our_own_mistakes_show_their_traceback(bug, monkeypatch):
    def command(argv: list[str]) -> str:
        raise bug

    monkeypatch.setattr(sample, "sample_command", command)
    with pytest.raises(type(bug)):
        cli.main(["sample"])


def test_a_recursion_of_a_library_is_the_input_and_of_ours_a_bug(monkeypatch, capsys):
    import json

    monkeypatch.setattr(sample, "sample_command", lambda argv: json.loads("[" * 200_000))
    assert cli.main(["sample"]) == 2
    assert capsys.readouterr().err == "error: an input is nested too deeply to be read\n"
    source = "def recurse(argv):\n    return recurse(argv)\n"
    names: dict = {}
    exec(compile(source, str(ROOT / "diffusers_ddpm_ext" / "cli" / "sample.py"), "exec"), names)
    monkeypatch.setattr(sample, "sample_command", names["recurse"])
    with pytest.raises(RecursionError):
        cli.main(["sample"])


def test_without_a_command_help_is_printed(capsys):
    assert cli.main([]) == 0
    printed = capsys.readouterr()
    assert printed.out == USAGE
    assert printed.err == ""
    assert cli.main(["help", "fit-variance"]) == 0
    assert "usage: ddpm-ext fit-variance" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("smaple", "did you mean sample?"),
        ("Train", "did you mean train?"),
        ("fit_variance", "did you mean fit-variance?"),
        ("convertconfig", "did you mean convert-config?"),
        ("eval", "did you mean evaluate?"),
        ("upload", "did you mean push?"),
        ("xyzzy", "the commands are train, train-vae, sample, "),
        ("--seed", "stands before the command"),
        ("model.ckpt", "ddpm-ext convert --from compvis --checkpoint model.ckpt"),
        ("model.YAML", "ddpm-ext convert-config model.YAML"),
        (".", ". is a folder: ddpm-ext sample ."),
        ("a\x1b[2J", "a\\x1b[2J is not a command"),
        ("", "is not a command"),
    ],
)
def test_an_unknown_command(word, answer, capsys):
    assert cli.main([word]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert answer in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    ["sample", "evaluate", "fit-variance", "fit-steps", "plot", "report", "push", "verify", "train", "doctor"],
)
@pytest.mark.parametrize("name", ["model.ckpt", "gone/last.CKPT", "unet.safetensors"])
def test_a_checkpoint_names_convert(command, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.ckpt").write_bytes(b"PK")
    assert cli.main([command, name]) == 2
    assert f"ddpm-ext convert --from compvis --checkpoint {name}" in capsys.readouterr().err


def test_an_output_that_is_closed_or_full():
    """`ddpm-ext --help | head`, and a full disk."""
    command = [sys.executable, "-m", "diffusers_ddpm_ext", "--help"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    os.close(writer)
    assert done.returncode == 141
    assert done.stderr == "error: the output was closed before all of it was written\n"
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: cannot write: No space left on device\n"
    done = subprocess.run(
        ["/bin/sh", "-c", f"{sys.executable} -m diffusers_ddpm_ext --help >&- 2>&-"], env=environment, check=False
    )
    assert done.returncode == 0


def test_grid_shows_single_pixels(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sample", str(folder / "grey"), "--num_images", "3", "--out", "grid.png"]) == 0
    told = capsys.readouterr().out
    assert "3 images of 8x16" in told
    assert "grid.png" in told
    with Image.open("grid.png") as sheet:
        assert sheet.mode == "L"
        assert sheet.width * sheet.height > 3 * 8 * 16 * 9
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_default_place_is_the_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sample", str(folder / "stock"), "--num_images", "1", "--seed", "3"]) == 0
    with Image.open(folder / "stock" / "samples-seed3.png") as sheet:
        assert sheet.mode == "RGB"
    assert list(tmp_path.iterdir()) == []


def test_image_i_is_the_same_whatever_the_batch(drawn):
    whole = drawn("grey", "--num_images", "5")
    assert whole.shape == (5, 8, 16, 1)
    assert whole.dtype == np.float32
    assert 0 <= whole.min() <= whole.max() <= 1
    np.testing.assert_allclose(drawn("grey", "--num_images", "5", "--batch_size", "2"), whole, atol=1e-5)
    np.testing.assert_allclose(drawn("grey", "--num_images", "2"), whole[:2], atol=1e-5)
    assert np.abs(drawn("grey", "--num_images", "5", "--seed", "1") - whole).max() > 0.1
    assert np.abs(whole[1] - whole[0]).max() > 0.1


def test_sample_is_what_the_pipeline_draws(folder, drawn):
    """The same generators handed to the pipeline by hand."""
    from diffusers_ddpm_ext.utils.random_keys import generator

    pipeline = DDPMExtPipeline.from_pretrained(folder / "grey")
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        batch_size=2, generator=[generator("sample", 7, i) for i in range(2)], num_inference_steps=3, output_type="np"
    ).images
    ours = drawn("grey", "--num_images", "2", "--seed", "7", "--num_inference_steps", "3")
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_raw_weights_and_other_numbers(drawn):
    averaged = drawn("grey", "--num_images", "2")
    assert np.abs(drawn("grey", "--num_images", "2", "--variant", "raw") - averaged).max() > 1e-3
    assert np.abs(drawn("grey", "--num_images", "2", "--temperature", "0") - averaged).max() > 1e-3
    half = drawn("grey", "--num_images", "2", "--dtype", "bfloat16")
    assert half.dtype == np.float32
    assert 0 < np.abs(half - averaged).max() < 0.2


def test_nothing_but_the_result_is_told(drawn, capfd):
    """Away from a terminal there is no bar, and Diffusers' warnings about casts are not the user's business."""
    drawn("grey", "--num_images", "1", "--dtype", "bfloat16")
    told = capfd.readouterr()
    assert told.err == ""
    assert told.out.count("\n") == 1


def test_images_one_by_one(folder, drawn, tmp_path):
    images = drawn("stock", "--num_images", "3", "--individual", "apart/each")
    files = sorted((tmp_path / "apart" / "each").iterdir())
    assert [file.name for file in files] == ["00000.png", "00001.png", "00002.png"]
    for file, image in zip(files, images, strict=True):
        with Image.open(file) as picture:
            assert np.abs(np.asarray(picture) / 255 - image).max() < 0.5 / 255 + 1e-6


def test_two_channels_are_written_as_arrays(folder, drawn, tmp_path, capsys):
    """No PNG file holds two channels."""
    assert cli.main(["sample", str(folder / "two"), "--out", "x.npy", "--individual", "apart", "--device", "cpu"]) == 2
    assert "--format npy, npz or tif" in capsys.readouterr().err
    assert not (tmp_path / "apart").exists()
    shown = drawn("two", "--num_images", "1", "--individual", "apart", "--format", "npy")
    assert shown.shape == (1, 8, 16, 2)
    assert np.load(tmp_path / "apart" / "00000.npy").shape == (8, 16, 2)


def test_sample_runs_on_the_base_install(folder, tmp_path):
    """Nothing of the extra `train` is there."""
    code = (
        "import sys\n"
        "for name in ('accelerate', 'matplotlib', 'transformers', 'datasets', 'sklearn', 'tensorboard'):\n"
        "    sys.modules[name] = None\n"
        "from diffusers_ddpm_ext.cli import main\n"
        f"sys.exit(main(['sample', {str(folder / 'grey')!r}, '--num_images', '2', '--out', 'grid.png']))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "grid.png").is_file()


def test_train_door_and_dry_run(tmp_path, monkeypatch, capsys):
    """The plan is told, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--dry_run"]) == 0
    told = capsys.readouterr().out
    for words in ("digits", "v_prediction", "1800"):
        assert words in told.replace(",", "")
    assert list(tmp_path.iterdir()) == []


def test_a_current_folder_that_was_deleted(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for command in ("sample", "doctor", "train"):
        assert cli.main([command, "x"]) == 2
        assert capsys.readouterr().err.startswith("error: the current folder does not exist any more")
    assert cli.main([]) == 0


def test_a_system_that_cannot_lock_folders(monkeypatch, capsys):
    """Windows has no fcntl; help and version need none."""
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None if name == "fcntl" else object())
    monkeypatch.setattr(sys, "platform", "win32")
    assert cli.main(["--version"]) == 0
    assert cli.main(["doctor"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: win32 is not supported, since it has no fcntl to lock folders with: use WSL 2"

"""`ddpm-ext train-vae` at the command line: a run, what other commands say of its folder, and wrong input."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.runs import TINY_VAE, tiny_vae_run
from PIL import Image

from diffusers_ddpm_ext import cli
from diffusers_ddpm_ext.training.trainer import train


def flags(**options: object) -> list[str]:
    """Flags of a tiny run."""
    result: list[str] = []
    for name, value in (TINY_VAE | options).items():
        values = value if isinstance(value, list) else ["none" if value is None else value]
        result += [f"--{name}", *map(str, values)]
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = train(tiny_vae_run(tmp_path_factory.mktemp("vae") / "run", max_train_steps=2, checkpointing_steps=2))
    assert folder is not None
    return folder


def test_a_run_on_a_folder(tmp_path, monkeypatch, capsys):
    """Color pictures of any size; without --output_dir a new folder that is named after them."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for index in range(6):
        Image.new("RGB", (20, 17), (40 * index, 10, 255 - 40 * index)).save(f"photos/{index}.png")
    assert cli.main(["train-vae", "--train_data_dir", "photos", *flags(max_train_steps=2, train_batch_size=2)]) == 0
    output = capsys.readouterr().out
    assert "train in its latents: ddpm-ext train --vae runs/photos-vae" in output
    assert Path("runs/photos-vae/diffusion_pytorch_model.safetensors").is_file()
    assert cli.main(["doctor", "runs/photos-vae", "--offline"]) == 0
    assert "AutoencoderKL" in capsys.readouterr().out


def test_a_model_trains_in_its_latents(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    network = ["--block_out_channels", "8", "16", "--norm_num_groups", "4", "--attention_head_dim", "4"]
    run = ["--max_train_steps", "1", "--validation_steps", "0", "--save_images_steps", "none"]
    run += ["--num_preview_images", "2", "--ddpm_num_inference_steps", "2", "--report_to", "none"]
    arguments = ["train", "--vae", str(trained), "--output_dir", "latent", *network, *run]
    assert cli.main(arguments) == 0
    assert cli.main(["sample", "latent", "--num_images", "1", "--num_inference_steps", "2", "--out", "x.png"]) == 0
    assert Path("x.png").is_file()
    assert "standard deviation 1" in capsys.readouterr().out, "the scale of the first stage is that of these images"


WRONG = {
    "--compression 16": "--resolution 8 is not divisible by --compression 16",
    "--norm_num_groups 3": "--norm_num_groups 3 does not divide the width 8: use 1",
    "--perceptual_model ./nowhere": "cannot be loaded as a vision model",
    "--learning_rate 0": "--learning_rate must be above 0",
    "--prediction_type epsilon": "is an option of `ddpm-ext train`",
    "--monitor val/fid": "--monitor val/fid is not logged in this run: choose one of train/psnr",
    "--config nothing.yaml": "--config nothing.yaml does not exist; name a YAML file",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_is_one_line(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    typed = line.split()
    options = {name: value for name, value in TINY_VAE.items() if f"--{name}" not in typed}
    if typed[0] == "--compression":
        del options["block_out_channels"]
    arguments: list[str] = []
    for name, value in options.items():
        values = value if isinstance(value, list) else ["none" if value is None else value]
        arguments += [f"--{name}", *map(str, values)]
    assert cli.main(["train-vae", *arguments, *typed]) == 2
    error = capsys.readouterr().err
    assert WRONG[line] in error
    assert error.count("error:") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["sample", "evaluate", "plot", "verify"])
def test_commands_of_pipelines_say_what_the_folder_is(command, trained, capsys):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    assert cli.main([command, str(trained)]) == 2
    assert "a first stage is for ddpm-ext train --vae" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def test_a_run_of_the_other_command_does_not_resume(trained, capsys):
    resuming = ["--output_dir", str(trained), "--resume_from_checkpoint", "latest"]
    assert cli.main(["train", *resuming]) == 2
    assert "it is a run of ddpm-ext train-vae" in capsys.readouterr().err
    assert cli.main(["train-vae", *flags(max_train_steps=2), *resuming]) == 0
    assert "is finished" in capsys.readouterr().out


def test_overwriting_deletes_what_the_run_wrote_and_nothing_else(trained, tmp_path):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    (folder / "notes.txt").write_text("mine")
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    (folder / "reconstructions.png").write_bytes(b"old")
    assert (
        cli.main(["train-vae", *flags(max_train_steps=1), "--output_dir", str(folder), "--overwrite_output_dir"]) == 0
    )
    assert (folder / "notes.txt").read_text() == "mine"
    now = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {name for name in names - now if "checkpoint-2/" not in name} <= {"samples/reconstructions-2.png"}
    assert (folder / "reconstructions.png").read_bytes() != b"old"

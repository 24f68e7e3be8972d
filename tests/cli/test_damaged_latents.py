"""Commands on damaged and odd folders of latent models: one line each, status 2, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.latent_cases import latent_pipeline, tiny_first_stage, write_pictures
from safetensors.torch import load_file, save_file

from diffusers_ddpm_ext import cli

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "latent"
    latent_pipeline("kl").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "latent"))


def slot_of(folder: Path) -> str:
    return next(slot for slot in ("vae", "vqvae") if (folder / slot).is_dir())


def remove(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        place = folder / slot_of(folder) / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()

    return damage


def config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / slot_of(folder) / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def text(content: str | bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = content if isinstance(content, bytes) else content.encode()
        (folder / slot_of(folder) / "config.json").write_bytes(data)

    return damage


def index(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file, slot = folder / "model_index.json", slot_of(folder)
        named = {slot if key == "slot" else key: value for key, value in changes.items()}
        file.write_text(json.dumps(json.loads(file.read_text()) | named))

    return damage


def both(folder: Path) -> None:
    shutil.copytree(folder / slot_of(folder), folder / ({"vae": "vqvae", "vqvae": "vae"}[slot_of(folder)]))
    index(vae=["diffusers", "AutoencoderKL"], vqvae=["diffusers", "AutoencoderKL"])(folder)


def truncated(folder: Path) -> None:
    file = folder / slot_of(folder) / WEIGHTS
    file.write_bytes(file.read_bytes()[:1000])


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / slot_of(folder) / WEIGHTS
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return damage


def other_channels(folder: Path) -> None:
    tiny_first_stage("kl", latent_channels=3).save_pretrained(folder / slot_of(folder))


DAMAGES = {
    "no folder": (remove("."), "first stage"),
    "no config": (remove("config.json"), "config.json"),
    "no weights": (remove(WEIGHTS), "no weights"),
    "no JSON": (text("{"), "config.json"),
    "a list": (text("[]"), "config.json"),
    "no text": (text(b"\xff\xfe"), "config.json"),
    "scale 0": (config(scaling_factor=0), "scaling_factor"),
    "negative scale": (config(scaling_factor=-0.2), "scaling_factor"),
    "scale NaN": (config(scaling_factor=float("nan")), "config.json"),
    "infinite scale": (config(scaling_factor=float("inf")), "config.json"),
    "scales": (config(scaling_factor=[0.2, 0.2, 0.2, 0.2]), "scaling_factor"),
    "scale as text": (config(scaling_factor="0.2"), "scaling_factor"),
    "no scale": (config(scaling_factor=None), "scaling_factor"),
    "mean alone": (config(latents_mean=[0.0] * 4), "latents_std"),
    "few means": (config(latents_mean=[0.0] * 3, latents_std=[1.0] * 3), "latents_mean"),
    "deviation 0": (config(latents_mean=[0.0] * 4, latents_std=[0.0] * 4), "latents_std"),
    "two shifts": (config(latents_mean=[0.5] * 4, latents_std=[1.0] * 4, shift_factor=0.1), "shift_factor"),
    "other channels in and out": (config(out_channels=4), "conv_out"),
    "no levels": (config(block_out_channels=[]), "config.json"),
    "a hundred levels": (config(block_out_channels=[8] * 100), "config.json"),
    "huge": (config(block_out_channels=[2**20, 2**20]), "config.json"),
    "both": (both, "vae"),
    "truncated": (truncated, "latent"),
    "NaN": (weights(lambda t: t["decoder.conv_in.weight"].fill_(torch.nan)), "not finite"),
    "a tensor less": (weights(lambda t: t.__delitem__("decoder.conv_in.weight")), "decoder.conv_in.weight"),
    "another shape": (weights(lambda t: t.update({"decoder.conv_in.weight": torch.zeros(8, 3, 3, 3)})), "latent"),
    "other latents": (other_channels, "channels"),
    "a network as first stage": (index(slot=["diffusers", "UNet2DModel"]), "UNet2DModel"),
    "an unknown class": (index(slot=["diffusers", "AutoencoderXYZ"]), "AutoencoderXYZ"),
    "another library": (index(slot=["os", "system"]), "os"),
    "conditions in an unknown way": (index(concat_through_vae="sometimes"), "concat_through_vae"),
    "conditions without a place": (index(concat_through_vae="mode"), "concat_through_vae"),
}


QUICK = ("no folder", "no config", "no weights", "scale 0", "scale NaN", "mean alone", "both", "other latents")
CASES = [
    pytest.param(command, name, marks=[] if command == "sample" and name in QUICK else [pytest.mark.slow])
    for command in ("sample", "evaluate")
    for name in DAMAGES
]


@pytest.mark.parametrize(("command", "name"), CASES)
def test_every_damage_is_one_line(command, name, folder, tmp_path, monkeypatch, capsys):
    damage, answer = DAMAGES[name]
    damage(folder)
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "photos", [f"{number}.png" for number in range(4)], (16, 16))
    more = {
        "sample": ("--num_images", "1", "--num_inference_steps", "1", "--out", "a.png"),
        "evaluate": ("--train_data_dir", "photos", "--validation_fraction", "0.5", "--num_timesteps", "2"),
    }
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert cli.main([command, str(folder), "--device", "cpu", *more[command]]) == 2
    printed = capsys.readouterr().err
    lines = [line for line in printed.splitlines() if line.strip()]
    assert len([line for line in lines if line.startswith("error: ")]) == 1, printed
    assert "Traceback" not in printed
    assert answer in printed
    assert len(lines[-1]) < 700
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

"""`ddpm-ext doctor FOLDER` finds from the files alone what loading them would refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.latent_cases import latent_pipeline, tiny_first_stage
from helpers.prompt_cases import text_pipeline
from safetensors.torch import load_file, save_file

from diffusers_ddpm_ext.cli.doctor_findings import Mark
from diffusers_ddpm_ext.cli.doctor_folder import check_folder

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    latent_pipeline("kl").save_pretrained(root / "latent")
    text_pipeline("clip").save_pretrained(root / "text")
    tiny_first_stage("kl").save_pretrained(root / "stage")
    return root


def found(folder: Path, mark: Mark, opens: bool = False) -> list[str]:
    return [finding.text for finding in check_folder(folder, opens) if finding.mark is mark]


def stage_of(folder: Path) -> Path:
    return next(folder / slot for slot in ("vae", "vqvae") if (folder / slot).is_dir())


def config(place: Path, **changes) -> None:
    file = place / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def index(folder: Path, **changes) -> None:
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def weights(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


LATENT = {
    "a mean alone": (lambda f: config(stage_of(f), latents_mean=[0.0] * 4), "latents_mean alone"),
    "few means": (lambda f: config(stage_of(f), latents_mean=[0.0] * 3, latents_std=[1.0] * 3), "4 numbers"),
    "deviation 0": (lambda f: config(stage_of(f), latents_mean=[0.0] * 4, latents_std=[0.0] * 4), "above 0"),
    "another model": (lambda f: tiny_first_stage("kl", latent_channels=3).save_pretrained(stage_of(f)), "3 channels"),
    "an unknown class": (lambda f: index(f, **{stage_of(f).name: ["diffusers", "AutoencoderX"]}), "AutoencoderX"),
    "no network": (lambda f: index(f, unet=[None, None]), "unet is [null, null]"),
    "half a scheduler": (lambda f: index(f, scheduler=["diffusers", {}]), "a list of a library and a class"),
    "an empty scheduler": (lambda f: index(f, scheduler=[]), "scheduler is []"),
    "conditions": (lambda f: index(f, concat_through_vae="mode"), "concat_through_vae"),
    "one tensor less": (
        lambda f: weights(stage_of(f) / WEIGHTS, lambda t: t.pop("decoder.conv_in.weight")),
        "decoder.conv_in.weight",
    ),
    "NaN": (lambda f: weights(f / "unet" / WEIGHTS, lambda t: t["conv_in.bias"].fill_(torch.nan)), "not finite"),
    "no weights": (lambda f: (f / "unet" / WEIGHTS).unlink(), "no weights"),
    "another network": (lambda f: config(f / "unet", block_out_channels=[16, 16]), "block_out_channels"),
}
TEXT = {
    "no vocabulary": (lambda f: [path.unlink() for path in (f / "tokenizer").iterdir()], "no vocabulary"),
    "half a tokenizer": (lambda f: (f / "tokenizer" / "tokenizer.json").write_text('{"version": '), "not JSON"),
    "an empty tokenizer": (lambda f: (f / "tokenizer" / "tokenizer.json").write_text("{}"), "not of a tokenizer"),
    "no encoder": (lambda f: shutil.rmtree(f / "text_encoder"), "text_encoder is missing"),
    "half an encoder": (
        lambda f: (f / "text_encoder" / "model.safetensors").write_bytes(b"\xff" * 100_000),
        "not a complete safetensors file",
    ),
}


@pytest.mark.parametrize("name", ["latent", "text", "stage"])
def test_intact_folders(made, name):
    assert found(made / name, Mark.WRONG) == found(made / name, Mark.ADVICE) == []
    assert any("complete" in text for text in found(made / name, Mark.FINE))


CASES = pytest.mark.parametrize(
    ("kind", "damage"), [*(("latent", name) for name in LATENT), *(("text", name) for name in TEXT)]
)


@CASES
def test_damage(made, tmp_path, kind, damage):
    folder = Path(shutil.copytree(made / kind, tmp_path / kind))
    change, answer = (LATENT if kind == "latent" else TEXT)[damage]
    change(folder)
    (text,) = found(folder, Mark.WRONG)
    assert answer in text
    assert "\n" not in text


@pytest.mark.slow
@CASES
def test_loading_refuses_the_same(made, tmp_path, kind, damage):
    folder = Path(shutil.copytree(made / kind, tmp_path / kind))
    (LATENT if kind == "latent" else TEXT)[damage][0](folder)
    assert found(folder, Mark.WRONG, opens=True)


def test_a_network_alone_that_is_no_first_stage(made, tmp_path):
    (text,) = found(made / "latent" / "unet", Mark.WRONG)
    assert "a first stage is one of" in text

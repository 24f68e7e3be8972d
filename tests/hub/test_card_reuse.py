"""The images of a card are drawn once: again only where something that they show has changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.pushed_folders import save_pushed_folder

from diffusers_ddpm_ext.hub import card_reuse
from diffusers_ddpm_ext.hub.card_reuse import unchanged_card
from diffusers_ddpm_ext.hub.proof import CARD_IMAGES, read_proof
from diffusers_ddpm_ext.hub.push import _add_card_and_proof


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    return save_pushed_folder(tmp_path_factory.mktemp("pushed") / "digits", 3)


@pytest.fixture
def folder(pushed, tmp_path):
    return Path(shutil.copytree(pushed, tmp_path / "digits"))


def test_an_unchanged_folder(folder):
    (folder / "metrics.jsonl").write_text('{"step": 8}\n')
    (folder / "README.md").write_text("mine")
    settings = unchanged_card(folder)
    assert settings == read_proof(folder)["images"]
    before = (folder / CARD_IMAGES).read_bytes()
    _add_card_and_proof(folder, "alice/digits", None, True, settings)
    assert (folder / CARD_IMAGES).read_bytes() == before
    assert read_proof(folder)["images"] == settings


@pytest.mark.parametrize(
    "name",
    [
        *("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "card/samples.png"),
        *("scheduler/scheduler_config.json", CARD_IMAGES, "proof.json"),
    ],
)
@pytest.mark.parametrize("change", ["one byte", "removed"])
def test_a_changed_folder(folder, name, change):
    path = folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    if change == "one byte":
        path.write_bytes(content)
    assert unchanged_card(folder) is None


def test_another_file_of_the_network(folder):
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"0")
    assert unchanged_card(folder) is None


def test_a_card_of_other_settings(folder, monkeypatch):
    monkeypatch.setattr(card_reuse, "CARD_SEED", 1)
    assert unchanged_card(folder) is None


def test_a_folder_that_was_never_pushed(folder):
    (folder / "proof.json").unlink()
    assert unchanged_card(folder) is None

"""Cards, pushes and proofs of models that draw what a prompt says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.hub_server import LoopbackHub
from helpers.paths import TESTS
from helpers.prompt_cases import text_pipeline
from PIL import Image

from diffusers_ddpm_ext import DDPMExtPipeline, cli
from diffusers_ddpm_ext.hub.card import make_card
from diffusers_ddpm_ext.hub.proof import card_captions, card_draw_settings
from diffusers_ddpm_ext.hub.push import _add_card_and_proof
from diffusers_ddpm_ext.plotting.sheets import CAPTION_HEIGHT
from diffusers_ddpm_ext.utils.random_keys import generator

TOKEN = "hf_secretsecretsecret"
PROMPTS = ["a red cat", 'the "dog" | `x` <b>']


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder as a push brings it to the Hub, with what a run records."""
    folder = tmp_path_factory.mktemp("pushed") / "text"
    text_pipeline("clip", is_latent=True).save_pretrained(folder)
    data = {"name": "emoji", "train": 90, "validation": 10, "fingerprint": "0" * 64, "prompts": PROMPTS}
    (folder / "environment.json").write_text(json.dumps({"data": data, "packages": {}, "python": "3", "device": "x"}))
    options = {"text": {"text_encoder": "openai/clip", "train_text_encoder": True}}
    (folder / "config.yaml").write_text(yaml.safe_dump(options))
    _add_card_and_proof(folder, "alice/text", None, True)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "text"))


def metadata_of(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def test_the_card_offers_the_prompts_of_the_run(folder):
    card = (folder / "README.md").read_text()
    metadata = metadata_of(card)
    assert metadata["pipeline_tag"] == "text-to-image"
    assert "text-to-image" in metadata["tags"]
    assert metadata["widget"] == [{"text": prompt} for prompt in PROMPTS]
    assert "It draws what a prompt says." in card
    assert "| tokens of a prompt | 8 |" in card
    assert "| width of a token | 16 |" in card
    assert "| class | CLIPTextModel, in `text_encoder/` |" in card
    assert "took it from `openai/clip` (`--text_encoder`). It was trained with the network." in card
    assert "license of the text encoder" in card


def test_the_code_of_the_card_runs(folder, monkeypatch):
    """As printed, but from this folder and in few steps."""
    card = (folder / "README.md").read_text()
    blocks = [block.split("\n```")[0] for block in card.split("```python\n")[1:]]
    monkeypatch.chdir(folder.parent)
    for block in blocks:
        names: dict = {}
        exec(block.replace("alice/text", "text").replace("num_inference_steps=50", "num_inference_steps=2"), names)
        assert len(names["images"]) in (1, 2)
    assert "from diffusers import StableDiffusionPipeline" in card


def test_the_images_of_the_card_are_of_its_prompts(folder):
    settings = json.loads((folder / "proof.json").read_text())["images"]
    assert settings["prompts"] == PROMPTS
    pipeline = DDPMExtPipeline.from_pretrained(folder)
    drawn = pipeline(
        [PROMPTS[index % 2] for index in range(9)],
        generator=[generator("card", 0, index) for index in range(9)],
        num_inference_steps=20,
        output_type="np",
    ).images
    saved = np.load(folder / "card/samples.npz")["images"]
    assert abs(saved / 255 - drawn).max() <= 0.5 / 255 + 1e-5
    assert card_captions(pipeline, settings)[:3] == [*PROMPTS, PROMPTS[0]]
    with Image.open(folder / "card/samples.png") as grid:
        assert grid.height > 3 * (16 * 6 + CAPTION_HEIGHT)


def test_verify_draws_them_again(folder, capsys):
    assert cli.main(["verify", str(folder)]) == 0
    assert "9 images, drawn again, agree" in capsys.readouterr().out
    file = folder / "text_encoder" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert cli.main(["verify", str(folder)]) == 1
    assert "text_encoder/model.safetensors was changed" in capsys.readouterr().err


@pytest.mark.parametrize("prompts", ["a cat", [1], [], ["x" * 5000], None, [["a"]]])
def test_without_prompts_the_empty_one_is_drawn(folder, prompts):
    """Of a converted folder, or where the record is damaged: the card says what it can."""
    record = json.loads((folder / "environment.json").read_text())
    record["data"]["prompts"] = prompts
    (folder / "environment.json").write_text(json.dumps(record))
    card = make_card(folder, "me/x")
    assert "widget" not in metadata_of(card)
    assert metadata_of(card)["pipeline_tag"] == "text-to-image"
    assert 'pipe([""],' in card
    assert card_draw_settings(text_pipeline("clip"))["prompts"] == [""]


def test_a_model_without_its_tokenizer_takes_token_ids(tmp_path):
    text_pipeline("clip", tokenizer=None).save_pretrained(tmp_path)
    card = make_card(tmp_path, "me/x")
    assert metadata_of(card)["pipeline_tag"] == "unconditional-image-generation"
    assert "| tokenizer | none: the model takes `input_ids` |" in card
    assert "This model needs conditions" in card
    assert card_draw_settings(text_pipeline("clip", tokenizer=None)) is None


@pytest.mark.parametrize("prompts", [[], "a cat", [3], ["a"] * 65, ["x" * 5000]])
def test_proofs_that_ask_for_too_much(folder, prompts, capsys):
    from diffusers_ddpm_ext.hub.proof import write_proof

    settings = json.loads((folder / "proof.json").read_text())["images"]
    write_proof(folder, settings | {"prompts": prompts})
    assert cli.main(["verify", str(folder)]) == 1
    assert capsys.readouterr().err.count("error: ") == 1


def test_doctor_looks_at_the_encoder(folder, capsys):
    for opening, found in (([], "is complete"), (["--open"], "can be opened")):
        assert cli.main(["doctor", str(folder), "--offline", *opening]) == 0
        assert f"its text encoder {found}: CLIPTextModel" in capsys.readouterr().out
    pipeline = DDPMExtPipeline.from_pretrained(folder)
    pipeline.tokenizer = None
    pipeline.save_pretrained(folder.parent / "ids")
    cli.main(["doctor", str(folder.parent / "ids"), "--offline"])
    assert "? its text encoder has no tokenizer" in capsys.readouterr().out


@pytest.mark.slow
def test_a_push_is_verified_by_id(folder, tmp_path):
    with LoopbackHub({TOKEN: "write"}) as hub:
        environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
        environment |= hub.environment(str(tmp_path / "home"), TOKEN) | {"PYTHONPATH": str(TESTS.parent)}
        for line in (["push", str(folder), "--hub_model_id", "alice/text"], ["verify", "alice/text"]):
            command = [sys.executable, "-m", "diffusers_ddpm_ext", *line]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, done.stderr
        assert "drawn again, agree" in done.stdout

"""Saved folders of pipelines with a text encoder: in stock Diffusers without this package, and in ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LDMTextToImagePipeline, PNDMScheduler, StableDiffusionPipeline
from helpers.paths import TESTS
from helpers.text_cases import build, text_pipeline, tiny_text_unet
from helpers.text_folder_cases import CASES, pictures_of
from helpers.text_models import tiny_text_encoder, tiny_tokenizer
from helpers.tiny import tiny_autoencoder
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor

from diffusers_ddpm_ext import DDPMExtPipeline

OTHER_TRANSFORMERS = os.environ.get("DDPM_EXT_OTHER_TRANSFORMERS")
"""A folder with another version of Transformers (4.56), of tokenizers and of huggingface_hub, to test with."""


def index_of(folder: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((folder / "model_index.json").read_text())
    return index


@dataclass
class Results:
    """What two processes drew."""

    here: dict[str, np.ndarray]
    facts: dict[str, Any]
    stock: Any
    folders: Path


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    root = tmp_path_factory.mktemp("text")
    pipelines = {case: build(case) for case in CASES}
    for case, pipeline in pipelines.items():
        pipeline.save_pretrained(root / case)
    text_pipeline("t5").save_pretrained(root / "ours")
    places = os.pathsep.join(filter(None, [OTHER_TRANSFORMERS]))
    ran = subprocess.run(
        [sys.executable, str(TESTS / "helpers" / "text_stock.py"), str(root), str(root / "stock")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": places},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return Results(
        {case: pictures_of(pipeline) for case, pipeline in pipelines.items()},
        json.loads((root / "stock.json").read_text()),
        np.load(root / "stock.npz"),
        root,
    )


# ------------------------------------------------------------------ stock Diffusers


@pytest.mark.parametrize("case", CASES)
def test_stock_pipelines_draw_our_pictures_without_this_package(results, case):
    name = CASES[case][0]
    assert results.facts[case] == name == index_of(results.folders / case)["_class_name"]
    for loader in (name, "DiffusionPipeline")[0 if case == "clip" else 1 :]:
        assert np.abs(results.stock[f"{case}/{loader}"] - results.here[case]).max() <= 1e-5
    pictures = results.here[case]
    assert np.abs(pictures[:2] - pictures[2:]).max() > 1e-3  # guidance
    assert np.abs(pictures[0] - pictures[1]).max() > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_transformers_finds_every_tensor_and_the_same_tokens(results, case):
    assert results.facts[f"{case}/missing"] == []
    tokenizer = tiny_tokenizer()
    assert results.facts[f"{case}/tokens"] == tokenizer(["a red cat"], padding="max_length", max_length=8).input_ids


def test_stock_diffusers_refuses_our_own_folders_and_names_the_package(results):
    assert "diffusers_ddpm_ext" in results.facts["ours"]


@pytest.mark.parametrize("case", CASES)
def test_our_pipeline_draws_the_same_from_the_folder(results, case, tmp_path):
    again = DDPMExtPipeline.from_pretrained(results.folders / case)
    assert np.abs(pictures_of(again) - results.here[case]).max() <= 1e-5
    again.save_pretrained(tmp_path)
    old, new = ({**index_of(folder), "_diffusers_version": ""} for folder in (results.folders / case, tmp_path))
    assert old == new
    for file in (results.folders / case).rglob("*"):
        if file.suffix in (".safetensors", ".txt") or file.name in ("tokenizer.json", "vocab.json"):
            assert (tmp_path / file.relative_to(results.folders / case)).read_bytes() == file.read_bytes()


def test_the_index_is_that_of_stable_diffusion_without_its_safety_checker(results):
    assert {
        key: value for key, value in index_of(results.folders / "clip").items() if key != "_diffusers_version"
    } == {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    with safe_open(results.folders / "clip" / "text_encoder" / "model.safetensors", "pt") as tensors:
        assert all(name.startswith("text_model.") for name in tensors.keys())  # noqa: SIM118


def test_the_index_of_ldm_text_to_image(results):
    index = index_of(results.folders / "bert_vq")
    assert (index["bert"], index["vqvae"]) == (["latent_diffusion", "LDMBertModel"], ["diffusers", "VQModel"])
    assert not {"vae", "text_encoder", "conditioning_key"} & set(index)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"tokenizer": None}, "no tokenizer"),
        ({"kind": "bert"}, "factor 2"),
        ({"kind": "bert", "vae": "eighth"}, "prompts of 8 tokens"),
        ({"kind": "t5"}, "T5EncoderModel"),
        ({"kind": "projection"}, "CLIPTextModelWithProjection"),
        ({"first_stage": "vq"}, "CLIPTextModel with VQModel"),
        ({"schedule": {"clip_sample": True}}, "clip_sample"),
        ({"schedule": {"steps_offset": 2}}, "steps_offset 2"),
        ({"schedule": {"variance_type": "fixed_large_log"}}, "fixed_large_log"),
        ({"id2label": {0: "cat"}}, "names of classes"),
    ],
)
def test_what_stock_pipelines_would_sample_otherwise_names_ours(arguments, reason, tmp_path, caplog):
    arguments = dict(arguments)
    if arguments.get("vae"):
        from helpers.text_cases import EIGHTH

        arguments["vae"] = tiny_autoencoder("kl", **EIGHTH)
    schedule = {"clip_sample": False} | arguments.pop("schedule", {})
    pipeline = text_pipeline(**arguments)
    pipeline.scheduler = type(pipeline.scheduler)(50, **schedule)
    pipeline.save_pretrained(tmp_path)
    assert index_of(tmp_path)["_class_name"] == "diffusers_ddpm_ext.DDPMExtPipeline"
    assert reason in caplog.text
    again = DDPMExtPipeline.from_pretrained(tmp_path)
    assert type(again.text_encoder) is type(pipeline.text_encoder)
    assert again.config["conditioning_key"] == "crossattn"


def test_a_tokenizer_without_a_length_is_saved_with_the_one_in_use(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = int(1e30)
    text_pipeline(tokenizer=tokenizer).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())["model_max_length"] == 8
    assert tokenizer.model_max_length == int(1e30)


# ------------------------------------------------------------------ folders of stock Diffusers


@pytest.fixture(scope="module")
def stock_folder(tmp_path_factory) -> Path:
    """A folder of Stable Diffusion as stock Diffusers writes it, with a safety checker."""
    folder = tmp_path_factory.mktemp("stock")
    pipeline = text_pipeline()
    scheduler = PNDMScheduler(50, skip_prk_steps=True, steps_offset=1, beta_schedule="scaled_linear")
    stock = StableDiffusionPipeline(
        pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, pipeline.unet, scheduler, None, CLIPImageProcessor(),
        requires_safety_checker=False,
    )  # fmt: skip
    stock.save_pretrained(folder)
    index = index_of(folder)
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    (folder / "safety_checker").mkdir()
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_a_folder_of_stable_diffusion_opens_and_draws_the_same(stock_folder):
    stock = StableDiffusionPipeline.from_pretrained(stock_folder, safety_checker=None)
    ours = DDPMExtPipeline.from_pretrained(stock_folder)
    assert ours.config["feature_extractor"] == (None, None)
    assert np.abs(pictures_of(ours) - pictures_of(stock)).max() <= 1e-5
    shared = DDPMExtPipeline.from_pipe(stock)
    assert np.abs(pictures_of(shared) - pictures_of(ours)).max() <= 1e-5


def test_ldm_text_to_image_becomes_ours_by_from_pipe(results):
    stock = LDMTextToImagePipeline.from_pretrained(results.folders / "bert_kl")
    ours = DDPMExtPipeline.from_pipe(stock)
    assert (ours.text_encoder, ours.vae, ours.bert) == (stock.bert, stock.vqvae, None)
    assert np.abs(pictures_of(ours) - results.here["bert_kl"]).max() <= 1e-5


# ------------------------------------------------------------------ components of a load


def test_components_can_be_replaced_and_left_out(results):
    folder = results.folders / "clip"
    other = tiny_text_encoder(seed=5)
    assert DDPMExtPipeline.from_pretrained(folder, text_encoder=other).text_encoder is other
    assert DDPMExtPipeline.from_pretrained(folder, bert=other).text_encoder is other
    without = DDPMExtPipeline.from_pretrained(folder, text_encoder=None)
    assert (without.text_encoder, without.tokenizer, without.text_encoder_stage) == (None, None, None)
    assert DDPMExtPipeline.from_pretrained(folder, tokenizer=None).tokenizer is None


@pytest.mark.filterwarnings("ignore:.torch_dtype. is deprecated")
def test_the_encoders_are_in_float32_whatever_the_network_is(results):
    half = DDPMExtPipeline.from_pretrained(results.folders / "clip", torch_dtype=torch.float16)
    assert (half.unet.dtype, half.vae.dtype, half.text_encoder.dtype) == (torch.float16, torch.float32, torch.float32)
    moved = DDPMExtPipeline.from_pretrained(results.folders / "clip").to(torch.float16)
    assert (moved.unet.dtype, moved.text_encoder.dtype) == (torch.float16, torch.float32)


# ------------------------------------------------------------------ damaged folders


def _edit(name: str, **changes: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _encoder(**changes: Any) -> Callable[[Path], Any]:
    return _edit("text_encoder/config.json", **changes)


def _tokenizer(**changes: Any) -> Callable[[Path], Any]:
    return _edit("tokenizer/tokenizer_config.json", **changes)


def _without_tensor(folder: Path) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    kept = {key: value for key, value in load_file(file).items() if not key.endswith("layers.1.mlp.fc1.bias")}
    save_file(kept, file, metadata={"format": "pt"})


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a tensor is missing": (_without_tensor, "text_encoder.*lack 1 tensors"),
    "more layers": (_encoder(num_hidden_layers=3), "text_encoder.*lack 16"),
    "fewer layers": (_encoder(num_hidden_layers=1), "do not fit.*layers.1"),
    "another width": (_encoder(hidden_size=24), "text_encoder.*do not fit"),
    "heads": (_encoder(num_attention_heads=3), "multiple of the number"),
    "an absurd vocabulary": (_encoder(vocab_size=10**12), "vocab_size"),
    "an unknown class": (_encoder(architectures=["BertModel"], model_type="bert"), "BertModel"),
    "truncated weights": (lambda folder: os.truncate(folder / "text_encoder/model.safetensors", 300), "text_encoder"),
    "no weights": (lambda folder: (folder / "text_encoder/model.safetensors").unlink(), "no weights"),
    "no encoder": (lambda folder: shutil.rmtree(folder / "text_encoder"), "text_encoder/config.json does not exist"),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), "no folder tokenizer"),
    "a torn tokenizer": (lambda folder: (folder / "tokenizer/tokenizer.json").write_text("{"), "tokenizer cannot be"),
    "a length below 1": (_tokenizer(model_max_length=-3), "model_max_length"),
    "code": (_tokenizer(auto_map={"AutoTokenizer": ["x.Y", None]}, tokenizer_class="Y"), "code of its own"),
    "another class": (_edit("model_index.json", text_encoder=["os", "system"]), "CLIPTextModel"),
    "not a tokenizer": (_edit("model_index.json", tokenizer=["os", "system"]), "tokenizer is"),
    "two encoders": (_edit("model_index.json", bert=["transformers", "CLIPTextModel"]), "two names"),
    "SDXL": (_edit("model_index.json", text_encoder_2=["transformers", "X"]), "text_encoder_2"),
    "a tokenizer alone": (_edit("model_index.json", text_encoder=[None, None]), "no text encoder"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_sentence(results, damage, tmp_path):
    change, words = DAMAGES[damage]
    shutil.copytree(results.folders / "clip", tmp_path / "copy")
    change(tmp_path / "copy")
    with pytest.raises(ValueError, match=words) as error:
        DDPMExtPipeline.from_pretrained(tmp_path / "copy")
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------ other encoders, saved


def test_a_folder_saved_over_another_model_keeps_nothing_of_it(tmp_path):
    text_pipeline().save_pretrained(tmp_path)
    text_pipeline("t5", tokenizer=None).save_pretrained(tmp_path)
    assert not (tmp_path / "tokenizer").exists()
    assert json.loads((tmp_path / "text_encoder" / "config.json").read_text())["architectures"] == ["T5EncoderModel"]
    DDPMExtPipeline(tiny_text_unet(), text_pipeline().scheduler).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model_index.json", "scheduler", "unet"}

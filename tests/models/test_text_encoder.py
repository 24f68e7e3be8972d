"""Text encoders: tokens, embeddings, identity, loading, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.text_models import LENGTH, save_text_model, tiny_text_encoder, tiny_tokenizer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPModel, CLIPTextModel, T5ForConditionalGeneration

from diffusers_ddpm_ext.models.text_encoder import TextEncoder, load_text_encoder, load_tokenizer, save_encoder

KINDS = ("clip", "projection", "bert", "t5")


@pytest.fixture(params=KINDS)
def stage(request) -> TextEncoder:
    return TextEncoder(tiny_text_encoder(request.param), tiny_tokenizer())


# ------------------------------------------------------------------ what it computes


def test_the_tokens_are_those_of_the_network_alone_without_a_mask(stage):
    ids = stage.tokenize(["a red cat", ""])
    with torch.no_grad():
        expected = stage.encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    tokens = stage.encode(ids)
    assert tokens.shape == (2, LENGTH, stage.width)
    assert (tokens - expected).abs().max() <= 1e-6
    assert not tokens.requires_grad


def test_each_prompt_is_padded_and_cut_as_the_tokenizer_does(stage, caplog):
    prompts = ["a red cat", "", "green " * 20]
    expected = tiny_tokenizer()(prompts, padding="max_length", max_length=LENGTH, truncation=True).input_ids
    with caplog.at_level(logging.WARNING):
        assert stage.tokenize(prompts).tolist() == expected
        stage.tokenize(["green " * 30])
    assert caplog.text.count("is cut there") == 1
    assert "green green" in caplog.text


def test_a_prompt_of_exactly_the_length_is_not_called_cut(stage, caplog):
    stage.tokenize(["cat " * (LENGTH - 2)])
    assert not caplog.text


def test_training_mode_half_precision_and_autocast_do_not_change_the_tokens(stage):
    ids = stage.tokenize(["a red cat"])
    expected = stage.encode(ids)
    stage.encoder.train()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(stage.encode(ids), expected)
    assert stage.encoder.training
    half = TextEncoder(stage.encoder.half(), stage.tokenizer)
    assert half.encode(ids).dtype == torch.float32


def test_gradients_flow_where_they_are_asked_for(stage):
    tokens = stage.encode(stage.tokenize(["cat"]), requires_grad=True)
    tokens.square().sum().backward()
    assert stage.encoder.get_input_embeddings().weight.grad.abs().sum() > 0


def test_recomputed_activations_give_the_same_gradients_to_the_bit(stage):
    ids = stage.tokenize(["red cat", "dog"])
    kept = 0

    def count(tensor):
        nonlocal kept
        kept += tensor.numel()
        return tensor

    def gradients():
        stage.encoder.train().zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            tokens = stage.encode(ids, requires_grad=True)
        tokens.square().sum().backward()
        return [tokens, *(weight.grad.clone() for weight in stage.encoder.parameters() if weight.grad is not None)]

    stage.encoder.requires_grad_(True)
    expected, everything, kept = gradients(), kept, 0
    stage.enable_gradient_checkpointing()
    actual = gradients()
    assert len(actual) == len(expected)
    assert all(map(torch.equal, actual, expected))
    assert kept < everything / 4


def test_lengths(stage):
    stage.tokenizer.model_max_length = 5
    assert stage.max_length == 5
    assert stage.tokenize(["a"]).shape == (1, 5)
    stage.tokenizer.model_max_length = int(1e30)
    assert stage.max_length == (LENGTH if stage.positions else 512)
    assert TextEncoder(stage.encoder).max_length == stage.max_length


# ------------------------------------------------------------------ identity


def test_the_hash_is_of_what_prompts_become(stage):
    def digest(encoder: Any = None, tokenizer: Any = None) -> str:
        return TextEncoder(encoder or stage.encoder, tokenizer or stage.tokenizer).content_hash()

    same = digest()
    assert digest(nn.DataParallel(stage.encoder)) == same
    longer, other = tiny_tokenizer(), tiny_tokenizer()
    longer.model_max_length = 7
    other.add_tokens(["zebra"])
    other.model_max_length = LENGTH
    assert digest(tokenizer=longer) != same
    assert len({digest(tiny_text_encoder(kind)) for kind in KINDS}) == len(KINDS)
    assert TextEncoder(stage.encoder).content_hash() != same
    weight = next(stage.encoder.parameters())
    with torch.no_grad():
        weight.view(-1)[0] += 1
    assert digest() != same


def test_the_hash_does_not_depend_on_calls_and_on_a_round_trip(stage, tmp_path):
    before = stage.content_hash()
    stage.tokenize(["a red cat"] * 3)
    save_encoder(stage.encoder, tmp_path)
    stage.tokenizer.save_pretrained(tmp_path)
    assert TextEncoder(load_text_encoder(tmp_path), load_tokenizer(tmp_path)).content_hash() == before


# ------------------------------------------------------------------ loading


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_comes_back_frozen_and_equal(kind, tmp_path):
    save_text_model(tmp_path, kind)
    encoder = load_text_encoder(tmp_path)
    original = tiny_text_encoder(kind)
    assert type(encoder) is type(original)
    assert not any(weight.requires_grad for weight in encoder.parameters())
    assert not encoder.training
    ids = torch.arange(LENGTH)[None]
    assert torch.equal(TextEncoder(encoder).encode(ids), TextEncoder(original).encode(ids))


def test_saved_clip_has_the_names_of_both_versions_of_transformers(tmp_path):
    save_encoder(tiny_text_encoder(), tmp_path)
    assert all(name.startswith("text_model.") for name in load_file(tmp_path / "model.safetensors"))
    info = CLIPTextModel.from_pretrained(tmp_path, output_loading_info=True)[1]
    assert not info["missing_keys"] | info["unexpected_keys"]


def test_the_text_part_of_a_whole_model_is_loaded(tmp_path):
    text = tiny_text_encoder()
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    clip = CLIPModel(CLIPModel.config_class(text_config=text.config.to_dict(), vision_config=vision)).eval()
    clip.save_pretrained(tmp_path / "clip")
    loaded = load_text_encoder(tmp_path / "clip")
    assert type(loaded) is CLIPTextModel
    ids = torch.arange(LENGTH)[None]
    expected = clip.text_model(ids).last_hidden_state
    assert (TextEncoder(loaded).encode(ids) - expected).abs().max() <= 1e-6
    t5 = T5ForConditionalGeneration(tiny_text_encoder("t5").config)
    t5.save_pretrained(tmp_path / "t5")
    loaded = load_text_encoder(tmp_path / "t5")
    assert torch.equal(loaded.shared.weight, t5.shared.weight)


def test_variants_of_a_whole_model_lacking_a_tensor_are_refused(tmp_path):
    save_text_model(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "final" not in k}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lack 2 tensors"):
        load_text_encoder(tmp_path)


@pytest.mark.parametrize(
    ("name", "load", "words"),
    [
        ("nothing", load_text_encoder, "not a folder on this machine"),
        ("nothing", load_tokenizer, "not a folder on this machine"),
        ("empty", load_text_encoder, "config.json does not exist"),
        ("empty", load_tokenizer, "has no tokenizer"),
        ("pipeline", load_text_encoder, r"pipeline without a text encoder \(text_encoder or bert\)"),
        ("pipeline", load_tokenizer, r"pipeline without a tokenizer \(tokenizer\)"),
    ],
)
def test_what_is_not_there_is_one_sentence(name, load, words, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    with pytest.raises(ValueError, match=words) as error:
        load(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("subfolder", ["../x", "/etc", "missing"])
def test_a_subfolder_is_inside(subfolder, tmp_path: Path):
    with pytest.raises(ValueError, match=r"subfolder is|has no folder"):
        load_text_encoder(tmp_path, subfolder)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([[10_000]], "the token 10000"),
        ([[-1]], "the token -1"),
        ([[0.5]], "must be integers"),
        ([[True]], "must be integers"),
        (torch.zeros(1, 0, dtype=torch.int64), "must be integers"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), "must be integers"),
        ([[1], [1, 2]], "same length"),
        ("cat", "must be integers"),
        (None, "must be integers"),
        (torch.zeros(1, LENGTH + 1, dtype=torch.int64), "8 positions"),
    ],
)
def test_wrong_ids(ids, words):
    with pytest.raises(ValueError, match=words):
        TextEncoder(tiny_text_encoder()).encode(ids)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([], "empty list"),
        (None, "must be a text"),
        (b"cat", "must be a text"),
        ({"cat"}, "must be a text"),
        (["cat", 3], "prompt 1 is 3"),
        (["cat", None], "prompt 1 is None"),
        (["\ud800"], "not Unicode"),
        (["a" * 100_001], "at most 100,000"),
    ],
)
def test_wrong_prompts(prompts, words):
    with pytest.raises(ValueError, match=words):
        TextEncoder(tiny_text_encoder(), tiny_tokenizer()).tokenize(prompts)


def test_prompts_need_a_tokenizer():
    with pytest.raises(ValueError, match="pass input_ids or prompt_embeds"):
        TextEncoder(tiny_text_encoder()).tokenize(["cat"])


def test_wrong_components():
    encoder, tokenizer = tiny_text_encoder(), tiny_tokenizer()
    with pytest.raises(ValueError, match="Linear"):
        TextEncoder(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="the encoder comes first"):
        TextEncoder(tokenizer, encoder)
    with pytest.raises(ValueError, match="tokenizer is"):
        TextEncoder(encoder, "tokenizer")
    tokenizer.add_tokens(["zebra"])
    with pytest.raises(ValueError, match="'zebra' with the id 150"):
        TextEncoder(encoder, tokenizer)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        TextEncoder(encoder, tokenizer)


def test_weights_that_are_not_finite(tmp_path):
    encoder = tiny_text_encoder()
    with torch.no_grad():
        encoder.get_input_embeddings().weight[3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        TextEncoder(encoder).encode([[3]])
    save_encoder(encoder, tmp_path)
    with pytest.raises(ValueError, match="not finite"):
        load_text_encoder(tmp_path)

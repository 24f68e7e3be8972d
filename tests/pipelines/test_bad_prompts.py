"""Prompts, token ids and encoders that are wrong, in Python: one sentence that names the argument."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.prompt_cases import WIDTH, text_pipeline, tiny_conditional_unet
from helpers.text_models import tiny_text_encoder, tiny_tokenizer
from helpers.tiny import tiny_unet
from PIL import Image
from transformers import CLIPImageProcessor

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from diffusers_ddpm_ext.models.spatial_rescaler import SpatialRescaler
from diffusers_ddpm_ext.models.text_encoder import TextEncoder, load_text_encoder, load_tokenizer

VOCABULARY = len(tiny_tokenizer())
IDS = torch.full((1, 8), VOCABULARY - 1)


@pytest.fixture(scope="module")
def pipelines():
    pixels = DDPMExtPipeline(tiny_unet(), DDPMExtScheduler(20))
    made = {
        "text": text_pipeline("clip"), "ids": text_pipeline("clip", tokenizer=None), "bare": text_pipeline(""),
        "t5": text_pipeline("t5"), "pixels": pixels,
    }  # fmt: skip
    for pipeline in made.values():
        pipeline.set_progress_bar_config(disable=True)
    return made


def tokens(*shape: int, value: float = 0.0) -> torch.Tensor:
    return torch.full(shape, value)


CALLS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], str]] = {
    "no prompt": ("text", (), {}, "prompt is missing"),
    "a batch size alone": ("text", (3,), {}, "prompt is missing"),
    "no ids": ("ids", (), {}, "input_ids is missing"),
    "nothing for cross attention": ("bare", (), {}, "encoder_hidden_states is missing"),
    "three prompts for two images": ("text", (2,), {"prompt": ["a", "b", "c"]}, "prompt has 3"),
    "two prompts for three images": ("text", (3,), {"prompt": ["a", "b"]}, "prompt has 2"),
    "prompts twice": ("text", ("a",), {"prompt": "b"}, "give one of them"),
    "negative prompts of another length": (
        "text",
        (),
        {"prompt": ["a", "b", "c"], "negative_prompt": ["x", "y"], "guidance_scale": 2},
        "negative_prompt",
    ),
    "negative without guidance": ("text", ("a",), {"negative_prompt": "b"}, "guidance_scale 1"),
    "negative ids without guidance": ("text", ("a",), {"negative_input_ids": IDS}, "guidance_scale 1"),
    "negative twice": (
        "text",
        ("a",),
        {"negative_prompt": "b", "negative_input_ids": IDS, "guidance_scale": 2},
        "both given",
    ),
    "an empty list": ("text", ([],), {}, "prompt"),
    "an empty list by name": ("text", (), {"prompt": []}, "prompt is an empty list"),
    "a number as prompt": ("text", (), {"prompt": 3}, "prompt is 3"),
    "numbers as prompts": ("text", (), {"prompt": ["a", 3]}, "prompt 1 is 3"),
    "None among prompts": ("text", (), {"prompt": ["a", None]}, "prompt 1"),
    "bytes": ("text", (), {"prompt": b"a"}, "prompt is"),
    "a list of lists": ("text", (), {"prompt": [["a"]]}, "prompt 0"),
    "a dictionary": ("text", (), {"prompt": {"a": 1}}, "prompt is"),
    "a tensor as prompt": ("text", (), {"prompt": torch.zeros(2)}, "prompt is"),
    "no Unicode": ("text", ("\ud800",), {}, "not Unicode"),
    "a million letters": ("text", ("a" * 1_000_000,), {}, "1,000,000 characters"),
    "a prompt and ids": ("text", ("a",), {"input_ids": IDS}, "both given"),
    "a prompt and embeddings": ("text", ("a",), {"prompt_embeds": tokens(1, 8, WIDTH)}, "both given"),
    "embeddings by two names": (
        "text",
        (),
        {"prompt_embeds": tokens(1, 8, WIDTH), "encoder_hidden_states": tokens(1, 8, WIDTH)},
        "both given",
    ),
    "a prompt without an encoder": ("bare", (), {"prompt": "a"}, "no text encoder"),
    "a prompt without a tokenizer": ("ids", (), {"prompt": "a"}, "tokenizer"),
    "a prompt for pixels": ("pixels", (), {"prompt": "a"}, "no cross attention"),
    "a text as batch size": ("pixels", ("a",), {}, "batch_size"),
    "ids without an encoder": ("bare", (), {"input_ids": IDS}, "no text encoder"),
    "guided ids": ("ids", (), {"input_ids": IDS, "guidance_scale": 2}, "negative_input_ids"),
    "an id beyond the table": ("text", (), {"input_ids": IDS + 1}, f"the token {VOCABULARY}"),
    "a negative id": ("text", (), {"input_ids": -IDS}, "the token -"),
    "floating ids": ("text", (), {"input_ids": IDS.float()}, "integers"),
    "boolean ids": ("text", (), {"input_ids": IDS > 0}, "integers"),
    "complex ids": ("text", (), {"input_ids": IDS.to(torch.complex64)}, "integers"),
    "ids in three dimensions": ("text", (), {"input_ids": IDS[None]}, "shape (1, 1, 8)"),
    "no ids in a row": ("text", (), {"input_ids": IDS[:, :0]}, "shape (1, 0)"),
    "a text as ids": ("text", (), {"input_ids": "a"}, "input_ids is"),
    "ragged ids": ("text", (), {"input_ids": [[1, 2], [3]]}, "every row of the same length"),
    "huge ids": ("text", (), {"input_ids": [[2**70]]}, "input_ids is"),
    "too many ids": ("text", (), {"input_ids": IDS.repeat(1, 2)}, "16 tokens per prompt"),
    "ids of two for three": ("text", (3,), {"input_ids": IDS.repeat(2, 1)}, "input_ids has 2"),
    "embeddings of another width": ("text", (), {"prompt_embeds": tokens(1, 8, WIDTH + 1)}, "prompt_embeds"),
    "flat embeddings": ("text", (), {"prompt_embeds": tokens(8, WIDTH)}, "prompt_embeds"),
    "embeddings of NaN": ("text", (), {"prompt_embeds": tokens(1, 8, WIDTH, value=np.nan)}, "prompt_embeds"),
    "an array of embeddings": (
        "text",
        (),
        {"prompt_embeds": np.zeros((1, 8, WIDTH))},
        "prompt_embeds must be a tensor",
    ),
    "zero images": ("text", ("a",), {"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
    "half an image": ("text", ("a",), {"num_images_per_prompt": 1.5}, "num_images_per_prompt is 1.5"),
    "true images": ("text", ("a",), {"num_images_per_prompt": True}, "num_images_per_prompt is True"),
    "images of no prompt": ("pixels", (), {"num_images_per_prompt": 2}, "use batch_size"),
    "a batch and images per prompt": (
        "text",
        (3,),
        {"prompt": "a", "num_images_per_prompt": 2},
        "num_images_per_prompt",
    ),
    "pictures for no rescaler": ("text", ("a",), {"concat_images": tokens(1, 3, 16, 16)}, "no concat_encoder"),
    "pictures for no image encoder": ("text", ("a",), {"image": Image.new("RGB", (8, 8))}, "no image_encoder"),
    "generators of another number": ("text", (["a", "b"],), {"generator": [torch.Generator()] * 3}, "list of 3"),
}


@pytest.mark.parametrize("name", CALLS)
def test_bad_calls(pipelines, name):
    pipeline, arguments, named, answer = CALLS[name]
    with pytest.raises(ValueError, match=re.escape(answer)) as caught:
        pipelines[pipeline](*arguments, num_inference_steps=2, **named)
    check(caught.value)


def check(error: ValueError) -> None:
    """One sentence of moderate length."""
    assert "\n" not in str(error)
    assert len(str(error)) < 500


def pad_less() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    return tokenizer


def larger() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["xyzzy"])
    return tokenizer


def broken() -> Any:
    encoder = tiny_text_encoder()
    next(encoder.parameters()).data.fill_(torch.nan)
    return encoder


OBJECTS: dict[str, tuple[Callable[[], Any], str]] = {
    "an encoder of another width": (lambda: text_pipeline("", text_encoder=tiny_text_encoder("clip", 24)), "width 24"),
    "a network as encoder": (lambda: text_pipeline("", text_encoder=tiny_unet()), "text_encoder is a UNet2DModel"),
    "a class as encoder": (lambda: text_pipeline("", text_encoder=TextEncoder), "text_encoder"),
    "a text as encoder": (lambda: text_pipeline("", text_encoder="openai/clip"), "text_encoder"),
    "the wrapper as encoder": (
        lambda: text_pipeline("", text_encoder=TextEncoder(tiny_text_encoder())),
        "TextEncoder",
    ),
    "a tokenizer alone": (
        lambda: DDPMExtPipeline(tiny_conditional_unet(), DDPMExtScheduler(20), tokenizer=tiny_tokenizer()),
        "without a text_encoder",
    ),
    "a tokenizer that does not pad": (lambda: text_pipeline("clip", tokenizer=pad_less()), "no padding token"),
    "a tokenizer of another model": (lambda: text_pipeline("clip", tokenizer=larger()), "the id"),
    "a folder as tokenizer": (lambda: text_pipeline("clip", tokenizer="clip"), "tokenizer is"),
    "two names": (
        lambda: text_pipeline("clip", bert=tiny_text_encoder("bert", WIDTH)),
        "text_encoder and bert are both given",
    ),
    "text without cross attention": (
        lambda: DDPMExtPipeline(tiny_unet(), DDPMExtScheduler(20), text_encoder=tiny_text_encoder()),
        "text_encoder",
    ),
    "a rescaler without room": (
        lambda: text_pipeline("clip", concat_encoder=SpatialRescaler(out_channels=2)),
        "concat_encoder",
    ),
    "a rescaler of other channels": (
        lambda: text_pipeline(
            "clip", unet=tiny_conditional_unet(5, 3), conditioning_key="hybrid", concat_encoder=SpatialRescaler()
        ),
        "makes 3 channels, but the network takes 2",
    ),
    "a network as rescaler": (lambda: text_pipeline("clip", concat_encoder=tiny_unet()), "concat_encoder"),
    "a network as image encoder": (lambda: text_pipeline("clip", image_encoder=tiny_unet()), "image_encoder"),
    "pictures prepared for nothing": (
        lambda: text_pipeline("clip", feature_extractor=CLIPImageProcessor()),
        "feature_extractor",
    ),
    "weights that are not finite": (lambda: TextEncoder(broken(), tiny_tokenizer()).encode_prompts(["a"]), "finite"),
    "a tokenizer first": (
        lambda: TextEncoder(tiny_tokenizer(), tiny_text_encoder()),
        "text_encoder is a CLIPTokenizer",
    ),
    "None": (lambda: TextEncoder(None), "text_encoder"),
    "a missing folder": (lambda: load_text_encoder("./nowhere"), "nowhere"),
    "a missing tokenizer": (lambda: load_tokenizer("./nowhere"), "nowhere"),
    "an unsafe subfolder": (lambda: load_text_encoder(".", subfolder="../x"), "subfolder"),
    "a missing subfolder": (lambda: load_text_encoder(".", subfolder="xyzzy"), "xyzzy"),
    "a folder without one": (lambda: load_text_encoder("tests"), "config.json"),
    "a folder without a tokenizer": (lambda: load_tokenizer("."), "tokenizer"),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_bad_objects(name, tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    monkeypatch.chdir(tmp_path)
    make, answer = OBJECTS[name]
    with pytest.raises(ValueError, match=re.escape(answer)) as caught:
        make()
    check(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("text_encoder", "clip"),
        ("tokenizer", 3),
        ("concat_encoder", "x"),
        ("image_encoder", 1),
        ("feature_extractor", 1),
    ],
)
def test_a_refused_component_leaves_the_pipeline_as_it_was(pipelines, name, value):
    pipeline = pipelines["text"]
    before = copy.copy(dict(pipeline.config)), getattr(pipeline, name)
    with pytest.raises(ValueError, match=name):
        setattr(pipeline, name, value)
    assert (dict(pipeline.config), getattr(pipeline, name)) == before
    assert len(pipeline("a cat", num_inference_steps=1, output_type="np").images) == 1


def test_there_are_eighty():
    assert len(CALLS) + len(OBJECTS) >= 80

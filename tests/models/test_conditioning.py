"""How conditions reach a network, and guidance: against the joins and the formula written down."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from helpers.conversion_cases import BASE, random_weights
from torch import nn

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from diffusers_ddpm_ext.compvis.architecture import translate_unet
from diffusers_ddpm_ext.models.conditioning import (
    CONDITIONING_KEYS,
    REQUIRED_CONDITIONS,
    Conditioning,
    Conditions,
    pixel_coordinates,
)
from diffusers_ddpm_ext.pipelines.guidance import ConditionArguments, ConditionedModel, prepare_conditions

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(4, 3, 8, 8, generator=GENERATOR)
GIVEN: dict[str, Any] = {
    "class_labels": torch.tensor([0, 3, 1, 2]),
    "concat_inputs": torch.randn(4, 2, 8, 8, generator=GENERATOR),
    "encoder_hidden_states": torch.randn(4, 5, 6, generator=GENERATOR),
}
ALL = (None, *CONDITIONING_KEYS)


def given(key):
    return {name: GIVEN[name] for name in REQUIRED_CONDITIONS[key]}


def network(key, seed=0, extra=0):
    params = dict(BASE)
    if "concat_inputs" in REQUIRED_CONDITIONS[key]:
        params["in_channels"] = 5
    if "encoder_hidden_states" in REQUIRED_CONDITIONS[key]:
        params |= {"use_spatial_transformer": True, "context_dim": 6}
    if "class_labels" in REQUIRED_CONDITIONS[key]:
        params["num_classes"] = 5
    params["in_channels"] += extra
    return random_weights(translate_unet(params, conditioning_key=key).build(), seed)


def pipeline(key, **named):
    pipe = DDPMExtPipeline(network(key), DDPMExtScheduler(num_train_timesteps=20), conditioning_key=key, **named)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(unet, key, xt, t, named):
    """The output of a network under conditions, without the pipeline."""
    inputs, kwargs = Conditioning(key)(xt, Conditions(**named))
    return unet(inputs, t, **kwargs).sample


@pytest.mark.parametrize("key", ALL)
def test_what_the_network_is_called_with(key):
    """The table of the original's wrapper, entry by entry."""
    inputs = {
        None: X, "concat": "cat", "crossattn": X, "hybrid": "cat", "adm": X, "hybrid-adm": "cat", "crossattn-adm": X,
    }[key]  # fmt: skip
    context = key in ("crossattn", "hybrid", "hybrid-adm", "crossattn-adm")
    labels = key in ("adm", "hybrid-adm", "crossattn-adm")
    called, named = Conditioning(key)(X, Conditions(**given(key)))
    expected = torch.cat([X, GIVEN["concat_inputs"]], dim=1) if isinstance(inputs, str) else X
    assert torch.equal(called, expected)
    assert named.keys() == ({"encoder_hidden_states"} if context else set()) | ({"class_labels"} if labels else set())
    assert all(value is GIVEN[name] or torch.equal(value, GIVEN[name]) for name, value in named.items())


def test_several_inputs_and_contexts_are_concatenated():
    """Lists, as the original's dictionaries hold: channels after channels, tokens after tokens."""
    network: Any = nn.Identity()
    network.config = {"cross_attention_dim": GIVEN["encoder_hidden_states"].shape[-1]}
    model = ConditionedModel(network, Conditioning("hybrid"), None, None, 3, torch.device("cpu"))
    parts, contexts = [X[:, :1], X[:, 1:2]], [GIVEN["encoder_hidden_states"], GIVEN["encoder_hidden_states"] + 1]
    conditions = prepare_conditions(ConditionArguments(None, parts, contexts), model, 4)
    assert torch.equal(conditions.concat_inputs, X[:, :2])
    assert torch.equal(conditions.encoder_hidden_states, torch.cat(contexts, dim=1))


def test_coordinates():
    """Two channels: columns from left to right, rows from top to bottom."""
    made = pixel_coordinates(torch.zeros(2, 3, 4, 5))
    assert made.shape == (2, 2, 4, 5)
    assert torch.allclose(made[0, 0, 2], torch.tensor([-1, -0.5, 0, 0.5, 1]))
    assert torch.allclose(made[1, 1, :, 3], torch.tensor([-1, -1 / 3, 1 / 3, 1]))
    inputs, _ = Conditioning("concat", True)(X, Conditions(concat_inputs=GIVEN["concat_inputs"]))
    assert torch.equal(inputs, torch.cat([X, GIVEN["concat_inputs"], pixel_coordinates(X)], dim=1))


@pytest.mark.parametrize("key", ALL)
def test_missing_and_surplus_conditions_are_refused(key):
    conditioning = Conditioning(key)
    for name in REQUIRED_CONDITIONS[key]:
        rest = {other: value for other, value in given(key).items() if other != name}
        with pytest.raises(ValueError, match=f"{name} is missing"):
            conditioning(X, Conditions(**rest))
    for name in GIVEN.keys() - set(REQUIRED_CONDITIONS[key]):
        with pytest.raises(ValueError, match=f"{name} is given"):
            conditioning(X, Conditions(**given(key), **{name: GIVEN[name]}))
    with pytest.raises(ValueError, match="conditioning_key"):
        Conditioning("all")


@pytest.mark.parametrize("key", CONDITIONING_KEYS)
@pytest.mark.parametrize("scale", [1.0, 0.0, 3.5])
def test_guidance_is_the_formula(key, scale):
    """u + s (c - u), step by step, from two calls of the network."""
    pipe = pipeline(key, null_class_label=4)
    named = given(key)
    null = {"class_labels": torch.full((4,), 4), "concat_inputs": torch.zeros(4, 2, 8, 8),
            "encoder_hidden_states": torch.zeros(4, 5, 6)}  # fmt: skip
    drawn = pipe(4, torch.Generator().manual_seed(1), 4, "latent", latents=X, guidance_scale=scale, **named).images
    scheduler, sample, generator = pipe.scheduler, X, torch.Generator().manual_seed(1)
    scheduler.set_timesteps(4)
    with torch.no_grad():
        for t in scheduler.timesteps:
            conditional = call(pipe.unet, key, sample, t, named)
            without = call(pipe.unet, key, sample, t, {name: null[name] for name in named})
            out = without + scale * (conditional - without)
            sample = scheduler.step(out, int(t), sample, generator=generator).prev_sample
    assert torch.allclose(drawn, sample, atol=2e-5)


def test_guidance_in_an_interval():
    """Outside of it the samples go as without guidance; an interval of all steps is guidance."""
    pipe = pipeline("adm", null_class_label=4)

    def draw(**how):
        return pipe(4, torch.Generator().manual_seed(1), 5, "latent", latents=X, class_labels=1, **how).images

    plain, all_steps = draw(), draw(guidance_scale=2.0)
    assert torch.equal(draw(guidance_scale=2.0, guidance_interval=(0, 19)), all_steps)
    assert torch.equal(draw(guidance_scale=2.0, guidance_interval=(0.5, 0.7)), plain)
    some = draw(guidance_scale=2.0, guidance_interval=(0, 8))
    assert not torch.equal(some, plain)
    assert not torch.equal(some, all_steps)


def test_a_learned_variance_is_not_guided():
    params = BASE | {"num_classes": 5, "out_channels": 6}
    unet = random_weights(translate_unet(params).build())
    pipe = DDPMExtPipeline(
        unet, DDPMExtScheduler(num_train_timesteps=20, variance_type="learned_range"), "adm", null_class_label=4
    )
    seen = []
    pipe.set_progress_bar_config(disable=True)
    pipe(
        1, torch.Generator().manual_seed(0), timesteps=[10], output_type="latent", latents=X[:1], class_labels=2,
        guidance_scale=3.0, callback_on_step_end=lambda p, i, t, tensors: seen.append(tensors["model_output"]) or {},
        callback_on_step_end_tensor_inputs=["model_output"],
    )  # fmt: skip
    with torch.no_grad():
        conditional, without = (unet(X[:1], 10, class_labels=torch.tensor([label])).sample for label in (2, 4))
    assert torch.allclose(seen[0][:, :3], without[:, :3] + 3 * (conditional - without)[:, :3], atol=1e-5)
    assert torch.allclose(seen[0][:, 3:], conditional[:, 3:], atol=1e-6)


@pytest.mark.parametrize(
    ("key", "how", "word"),
    [
        ("adm", {}, "class_labels is missing"),
        ("adm", {"class_labels": 5}, r"0\.\.4"),
        ("adm", {"class_labels": [0, 1], "batch_size": 3}, "class_labels has 2 entries"),
        ("adm", {"class_labels": 0, "guidance_scale": 2.0}, "negative_class_labels"),
        ("adm", {"class_labels": 0, "guidance_scale": float("nan")}, "finite"),
        ("adm", {"class_labels": 0, "negative_class_labels": 1}, "no effect"),
        ("adm", {"class_labels": 0, "guidance_interval": (5, 2)}, "guidance_interval"),
        ("concat", {"concat_inputs": torch.zeros(1, 2, 4, 4)}, "concat_inputs has shape"),
        (None, {"class_labels": 0}, "no place for it"),
        (None, {"guidance_scale": 2.0}, "unconditional"),
    ],
)
def test_calls_that_cannot_be_met(key, how, word):
    with pytest.raises(ValueError, match=word):
        pipeline(key)(num_inference_steps=2, output_type="latent", **how)


@pytest.mark.parametrize("key", ALL)
@pytest.mark.parametrize("coordinates_too", [False, True])
def test_save_and_load(key, coordinates_too, tmp_path):
    unet = network(key, extra=2 * coordinates_too)
    pipe = DDPMExtPipeline(unet, DDPMExtScheduler(num_train_timesteps=20), key, coordinates_too)
    pipe.save_pretrained(tmp_path)
    again = DDPMExtPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    pipe.set_progress_bar_config(disable=True)
    drawn = [
        each(4, torch.Generator().manual_seed(2), 3, "latent", latents=X, **given(key)).images
        for each in (pipe, again)
    ]
    assert torch.equal(*drawn)
    index = json.loads((tmp_path / "model_index.json").read_text())
    plain = key is None and not coordinates_too
    assert index["_class_name"] == ("DDPMPipeline" if plain else "diffusers_ddpm_ext.DDPMExtPipeline")
    assert ("conditioning_key" in index) == (key is not None)
    wide = (
        "concat_inputs" in REQUIRED_CONDITIONS[key] or coordinates_too
    ) and "encoder_hidden_states" not in REQUIRED_CONDITIONS[key]
    assert (index["unet"][1] == "UNet2DExtModel") == wide


def test_from_pipe_keeps_how_conditions_are_joined():
    pipe = pipeline("adm", null_class_label=4)
    again = DDPMExtPipeline.from_pipe(pipe)
    assert again.config.conditioning_key == "adm"
    assert again.config.null_class_label == 4
    assert again.num_classes == 5

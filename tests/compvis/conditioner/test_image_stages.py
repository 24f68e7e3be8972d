"""Rescalers and image encoders of the originals, against what torch's own attention and interpolation compute."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from helpers.published_models import seeded_tensor
from torch import Tensor
from torch.nn import functional

from diffusers_ddpm_ext.compvis.conditioner.architecture import read_conditioner
from diffusers_ddpm_ext.compvis.conditioner.kinds import ConditionerConfig
from diffusers_ddpm_ext.compvis.conditioner.weights import convert_conditioner, export_conditioner

OPENAI = ("FrozenClipImageEmbedder", "ClipImageEmbedder", "FrozenCLIPImageEmbedder")
WIDTH, PATCH, SIDE, OUT = 128, 4, 12, 24


def config(name: str, **params: Any) -> ConditionerConfig:
    read = read_conditioner({"target": f"ldm.modules.encoders.modules.{name}", "params": params}, "stage")
    assert read is not None
    return read


def vision_state(width: int = WIDTH, blocks: int = 2) -> dict[str, Tensor]:
    """The tensors of CLIP's image encoder, under its own names, and some of the text encoder beside it."""
    shapes: dict[str, tuple[int, ...]] = {
        "conv1.weight": (width, 3, PATCH, PATCH), "class_embedding": (width,), "proj": (width, OUT),
        "positional_embedding": (1 + (SIDE // PATCH) ** 2, width),
        **{f"{norm}.{leaf}": (width,) for norm in ("ln_pre", "ln_post") for leaf in ("weight", "bias")},
    }  # fmt: skip
    for block in range(blocks):
        start = f"transformer.resblocks.{block}."
        for name, out, into in (
            ("attn.in_proj_", 3 * width, width), ("attn.out_proj.", width, width),
            ("mlp.c_fc.", 4 * width, width), ("mlp.c_proj.", width, 4 * width),
        ):  # fmt: skip
            shapes |= {f"{start}{name}weight": (out, into), f"{start}{name}bias": (out,)}
        shapes |= {f"{start}ln_{norm}.{leaf}": (width,) for norm in (1, 2) for leaf in ("weight", "bias")}
    state = {f"model.visual.{name}": seeded_tensor(name, shape) for name, shape in shapes.items()}
    return state | {"model.logit_scale": torch.tensor(1.0), "model.ln_final.weight": torch.ones(8)}


def reference(state: dict[str, Tensor], pixels: Tensor, heads: int, quick: bool) -> Tensor:
    """CLIP's image encoder, by torch's functions."""

    def norm(x: Tensor, name: str) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], own[f"{name}.weight"], own[f"{name}.bias"])

    own = {key.removeprefix("model.visual."): tensor for key, tensor in state.items()}
    patches = functional.conv2d(pixels, own["conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([own["class_embedding"].expand(len(pixels), 1, -1), patches], dim=1) + own["positional_embedding"]
    x = norm(x, "ln_pre")
    for block in range(2):
        start = f"transformer.resblocks.{block}."
        inner = norm(x, f"{start}ln_1").transpose(0, 1)
        attended, _ = functional.multi_head_attention_forward(
            inner, inner, inner, x.shape[-1], heads,
            own[f"{start}attn.in_proj_weight"], own[f"{start}attn.in_proj_bias"], None, None, False, 0.0,
            own[f"{start}attn.out_proj.weight"], own[f"{start}attn.out_proj.bias"], need_weights=False,
        )  # fmt: skip
        x = x + attended.transpose(0, 1)
        hidden = norm(x, f"{start}ln_2") @ own[f"{start}mlp.c_fc.weight"].T + own[f"{start}mlp.c_fc.bias"]
        hidden = hidden * torch.sigmoid(1.702 * hidden) if quick else functional.gelu(hidden)
        x = x + hidden @ own[f"{start}mlp.c_proj.weight"].T + own[f"{start}mlp.c_proj.bias"]
    return norm(x[:, 0], "ln_post") @ own["proj"]


@pytest.mark.parametrize(
    ("name", "params", "quick"),
    [
        *((name, {"model": "ViT-L/14"}, True) for name in OPENAI),
        ("FrozenCLIPImageEmbedder", {}, True),
        ("FrozenOpenCLIPImageEmbedder", {}, False),
        ("FrozenOpenCLIPImageEmbedder", {"arch": "ViT-B-32-quickgelu"}, True),
        ("FrozenOpenCLIPImageEmbedder", {"arch": "ViT-L-14", "version": "openai"}, True),
    ],
)
def test_image_encoders(name, params, quick):
    state = vision_state()
    converted = convert_conditioner(state, config(name, **params))
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).double()
    embeds = converted.module.double()(pixel_values=pixels).image_embeds
    state = {key: tensor.double() for key, tensor in state.items()}
    torch.testing.assert_close(embeds, reference(state, pixels, 2, quick), rtol=0, atol=1e-12)
    other = reference(state, pixels, 2, not quick)
    assert float((embeds - other).abs().max()) > 1e-4, "the activation matters"


def test_the_way_back_needs_the_text_encoder_that_lay_beside():
    state = vision_state()
    converted = convert_conditioner(state, config("FrozenOpenCLIPImageEmbedder"))
    layout = json.loads(json.dumps(converted.plan.layout))
    back = export_conditioner(converted.module, "FrozenOpenCLIPImageEmbedder", layout, state)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    with pytest.raises(ValueError, match="Give the checkpoint that has them with base"):
        export_conditioner(converted.module, "FrozenOpenCLIPImageEmbedder", layout)


def test_heads_are_those_of_the_architecture_or_of_a_configuration(tmp_path):
    def heads(name: str, width: int = WIDTH, **params: Any) -> int:
        module: Any = convert_conditioner(vision_state(width, 1), config(name, **params)).module
        return int(module.config.num_attention_heads)

    assert heads("FrozenClipImageEmbedder", model="ViT-B/32") == 2
    assert heads("FrozenOpenCLIPImageEmbedder", 32) == 1
    assert heads("FrozenOpenCLIPImageEmbedder", 1280) == 16, "80 channels each in ViT-H-14"
    assert heads("FrozenOpenCLIPImageEmbedder", 1280, arch="ViT-other") == 20
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"num_attention_heads": 8}}))
    assert heads("FrozenClipImageEmbedder", model=str(tmp_path)) == 8
    assert heads("FrozenOpenCLIPImageEmbedder", 96, version=str(tmp_path)) == 8
    with pytest.raises(ValueError, match="number of attention heads of an encoder of width 96 is not known"):
        heads("FrozenOpenCLIPImageEmbedder", 96)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("FrozenClipImageEmbedder", {"model.visual.layer1.0.conv1.weight": torch.ones(1)}, "is a ResNet of CLIP"),
        ("FrozenClipImageEmbedder", {"model.visual.conv1.weight": None}, "no patches that make them"),
        ("FrozenClipImageEmbedder", {"model.visual.positional_embedding": torch.ones(9, WIDTH)}, "9 positions"),
        ("FrozenClipImageEmbedder", {"model.visual.proj": None}, "lacks model.visual.proj"),
        ("FrozenClipImageEmbedder", {"model.visual.ln_post.bias": None}, "missing: model.visual.ln_post.bias"),
        ("FrozenClipImageEmbedder", {"mapper.weight": torch.ones(1)}, "unexpected: mapper.weight"),
        ("FrozenClipImageEmbedder", {"model.visual.proj": torch.full((WIDTH, OUT), float("nan"))}, "NaN or infinity"),
    ],
)
def test_damaged_image_encoders(name, change, message):
    state = {key: tensor for key, tensor in (vision_state() | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        convert_conditioner(state, config(name, model="ViT-L/14"))


def test_an_image_encoder_with_further_layers_is_left_out():
    assert "further" not in config("FrozenCLIPImageEmbedder").reason_to_leave_out
    painted = config("FrozenCLIPImageEmbedder", version="openai/clip-vit-large-patch14")
    assert "transformers does not have" in painted.reason_to_leave_out


@pytest.mark.parametrize("bias", [False, True])
def test_rescalers_go_both_ways(bias):
    state = {"channel_mapper.weight": seeded_tensor("a", (3, 7, 1, 1))}
    state |= {"channel_mapper.bias": seeded_tensor("b", (3,))} if bias else {}
    params = {"n_stages": 2, "in_channels": 7, "out_channels": 3, "bias": bias}
    converted = convert_conditioner(state, config("SpatialRescaler", **params))
    maps = torch.randn(2, 7, 16, 24, generator=torch.Generator().manual_seed(0))
    halved = functional.interpolate(maps, scale_factor=0.5, mode="bilinear")
    halved = functional.interpolate(halved, scale_factor=0.5, mode="bilinear")
    expected = functional.conv2d(halved, state["channel_mapper.weight"], state.get("channel_mapper.bias"))
    assert torch.equal(converted.module(maps), expected)
    back = export_conditioner(converted.module, "SpatialRescaler")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    kind = config("SpatialRescaler").kind
    assert kind.params_of(converted.module, {}) == params | {"method": "bilinear", "multiplier": 0.5}


def test_a_rescaler_without_a_convolution_has_no_tensors():
    converted = convert_conditioner({}, config("SpatialRescaler", in_channels=7, method="area"))
    assert converted.module(torch.ones(1, 7, 8, 8)).shape == (1, 7, 4, 4)
    assert export_conditioner(converted.module, "SpatialRescaler") == {}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"method": "trilinear"}, "stage.params.method takes one of nearest, bilinear, bicubic, area"),
        ({"n_stages": -1}, "stage.params.n_stages takes a whole number from 0"),
        ({"multiplier": 0}, "stage.params.multiplier takes a number above 0"),
        ({"in_channels": 1.5}, "stage.params.in_channels takes a whole number"),
        ({"out_channels": 0}, "stage.params.out_channels takes"),
        ({"bias": "no"}, "stage.params.bias takes true or false"),
        ({"kernel_size": 3}, "stage.params.kernel_size 3 is not supported"),
        ({"out_channels": 3, "in_channels": 4}, "channel_mapper.weight .* different shape|different shape"),
        ({}, "unexpected: channel_mapper.weight"),
    ],
)
def test_wrong_rescalers(params, message):
    with pytest.raises(ValueError, match=message):
        convert_conditioner({"channel_mapper.weight": torch.ones(3, 7, 1, 1)}, config("SpatialRescaler", **params))

"""Image encoders of CLIP, OpenAI's and open_clip's, as transformers' `CLIPVisionModelWithProjection`, bit-exact.

model.visual.class_embedding, positional_embedding    vision_model.embeddings.class_embedding, position_embedding
model.visual.conv1                                    vision_model.embeddings.patch_embedding
model.visual.ln_pre, ln_post                          vision_model.pre_layrnorm, post_layernorm
model.visual.transformer.resblocks.I                  vision_model.encoder.layers.I, as in a text encoder
model.visual.proj                                     visual_projection: transposed

The text encoder beside it, of which a file may have a part, is not used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.compvis.conditioner.clip import fill_positions
from diffusers_ddpm_ext.compvis.conditioner.kinds import Argument, ConditionerKind, ConditionerPlan, unused
from diffusers_ddpm_ext.compvis.conditioner.open_clip import IN_BLOCK
from diffusers_ddpm_ext.compvis.conditioner.sizes import count_layers, folder_config, head_count, one_of, size_of
from diffusers_ddpm_ext.compvis.key_map import TensorMapping, Transform
from diffusers_ddpm_ext.compvis.schema import BOOLEAN, TEXT, listed, number
from diffusers_ddpm_ext.compvis.weights import QKV
from diffusers_ddpm_ext.utils.wrappers import plain_state_dict

VISUAL, INNER = "model.visual.", "vision_model."
MODULE_CLASS = "CLIPVisionModelWithProjection"
BLOCKS = f"{VISUAL}transformer.resblocks."
RENAMED: dict[str, tuple[str, Transform]] = {
    "vision_model.embeddings.class_embedding": ("class_embedding", "same"),
    "vision_model.embeddings.position_embedding.weight": ("positional_embedding", "same"),
    "vision_model.embeddings.patch_embedding.weight": ("conv1.weight", "same"),
    "vision_model.pre_layrnorm.weight": ("ln_pre.weight", "same"),
    "vision_model.pre_layrnorm.bias": ("ln_pre.bias", "same"),
    "vision_model.post_layernorm.weight": ("ln_post.weight", "same"),
    "vision_model.post_layernorm.bias": ("ln_post.bias", "same"),
    "visual_projection.weight": ("proj", "transpose"),
}
NOT_VISUAL = "the text encoder beside the image encoder, which conditioning does not use"
PIXELS = "mean and standard deviation of CLIP's pixels: those of pipeline.feature_extractor"
# Width and heads of image encoders whose heads have other widths than 64, by open_clip's names.
WIDER_HEADS = {"ViT-H-14": (1280, 16), "ViT-g-14": (1408, 16), "ViT-bigG-14": (1664, 16)}


def _source(name: str) -> tuple[str, Transform]:
    """CLIP's key of a name of `CLIPVisionModelWithProjection`, and how its tensor changes."""
    if name in RENAMED:
        key, transform = RENAMED[name]
        return VISUAL + key, transform
    match = re.fullmatch(r"vision_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    assert match is not None, name
    block, inner, leaf = match.groups()
    third = next((third for third in QKV if inner == f"self_attn.{third}_proj"), None)
    if third is not None:
        transform = third  # type: ignore[assignment]
        return f"{BLOCKS}{block}.attn.in_proj_{leaf}", transform
    return f"{BLOCKS}{block}.{IN_BLOCK[inner]}.{leaf}", "same"


def _vision_config(params: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Keyword arguments of `CLIPVisionConfig`.

    Raises:
        ValueError: the tensors are not those of a vision transformer, or the number of heads is not known.
    """
    if any(key.startswith(f"{VISUAL}layer1.") for key in tensors):
        raise ValueError(
            "The image encoder in the checkpoint is a ResNet of CLIP, which transformers does not have: leave it out "
            "with ignore_keys, and pass its embeddings."
        )
    name = params.get("arch") or params.get("model")
    positions, width = (size_of(tensors, f"{VISUAL}positional_embedding", axis) for axis in (0, 1))
    patch = tensors.get(f"{VISUAL}conv1.weight")
    side = math.isqrt(positions - 1)
    if patch is None or patch.ndim != 4 or patch.shape[2] != patch.shape[3] or side * side + 1 != positions:
        raise ValueError(
            f"The checkpoint's image encoder has {positions} positions and no patches that make them: the file is "
            "damaged, or leave it out with ignore_keys."
        )
    known = folder_config(params.get("version", name), "vision_config")
    wider, heads = WIDER_HEADS.get(str(name), (None, None))
    heads = known.get("num_attention_heads", heads if wider == width else None)
    return {
        "hidden_size": width,
        "intermediate_size": size_of(tensors, f"{BLOCKS}0.mlp.c_fc.weight", 0),
        "projection_dim": size_of(tensors, f"{VISUAL}proj", 1),
        "num_hidden_layers": count_layers(tensors, BLOCKS),
        "num_attention_heads": head_count(width, heads, "an arch or model that is known"),
        "num_channels": int(patch.shape[1]),
        "patch_size": int(patch.shape[2]),
        "image_size": side * int(patch.shape[2]),
        "hidden_act": _activation(params),
    }


def _activation(params: Mapping[str, Any]) -> str:
    """OpenAI's: QuickGELU; open_clip's: GELU, unless the weights or the architecture's name are of OpenAI's kind."""
    quick = "arch" not in params or str(params["version"]) == "openai" or "quickgelu" in str(params["arch"]).lower()
    return "quick_gelu" if quick else "gelu"


def _plan(params: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ConditionerPlan:
    config = _vision_config(params, tensors)

    def build() -> nn.Module:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        return CLIPVisionModelWithProjection(CLIPVisionConfig(**config))

    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}
    mappings = tuple(TensorMapping(name, *_source(name), 1, shape) for name, shape in shapes.items())
    left_out = {
        key: PIXELS if key in ("mean", "std") else NOT_VISUAL
        for key in tensors
        if key in ("mean", "std") or (key.startswith("model.") and not key.startswith(VISUAL))
    }
    return ConditionerPlan(build, mappings, left_out, {"left_out": sorted(left_out)}, fill_positions)


def _export(module: nn.Module, layout: Mapping[str, Any], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for target, tensor in plain_state_dict(module).items():
        source, transform = _source(target)
        if transform in QKV:
            thirds.setdefault(source, {})[transform] = tensor.detach()
        else:
            state[source] = tensor.detach().T if transform == "transpose" else tensor.detach()
    state |= {source: torch.cat([parts[third] for third in QKV]) for source, parts in thirds.items()}
    needed = layout.get("left_out", [])
    missing = [key for key in needed if key not in base]
    if missing:
        raise ValueError(
            f"The original's image encoder has {len(missing)} tensors that conditioning does not use, and that the "
            f"pipeline does not have: {listed(missing, 4)}. Give the checkpoint that has them with base (--base)."
        )
    return state | {key: base[key] for key in needed}


def _reason_to_leave_out(params: Mapping[str, Any]) -> str:
    if "arch" not in params and params.get("version") is not None:
        return "with version it has layers after the image encoder, which transformers does not have"
    return ""


_SHARED = {
    "device": unused("pipe.to(device)"),
    "antialias": unused("prepares pictures: pipeline.feature_extractor"),
    "ucg_rate": Argument("only used in training: --conditioning_dropout", number(0, 1), 0.0, "without effect"),
}
_OPENAI = {
    "model": Argument("activation of pipeline.image_encoder", TEXT, required=True),
    "jit": unused("weights only"),
} | _SHARED
_OPEN_CLIP = {
    "arch": Argument("heads of pipeline.image_encoder", TEXT, "ViT-H-14"),
    "version": Argument("activation of pipeline.image_encoder", TEXT, "laion2b_s32b_b79k"),
    "max_length": unused("of texts"),
    "freeze": Argument("it is not trained", BOOLEAN, True, "without effect"),
    "layer": Argument("image_embeds", one_of("pooled", "last"), "pooled"),
} | _SHARED


def _openai(name: str, **more: Argument) -> ConditionerKind:
    def params_of(module: nn.Module, recorded: Mapping[str, Any]) -> dict[str, Any]:
        return dict(recorded) or {"model": "ViT-L/14"}

    return ConditionerKind(
        name, "image_encoder", MODULE_CLASS, VISUAL, _OPENAI | more, _plan, _export, params_of,
        reason_to_leave_out=_reason_to_leave_out,
    )  # fmt: skip


IMAGE_ENCODERS = (
    _openai("FrozenClipImageEmbedder"),
    _openai("ClipImageEmbedder"),
    # Forks have a default model, or with ``version`` further layers.
    _openai(
        "FrozenCLIPImageEmbedder",
        model=Argument("activation of pipeline.image_encoder", TEXT, "ViT-L/14"),
        version=unused("of an encoder with further layers"),
    ),
    ConditionerKind(
        "FrozenOpenCLIPImageEmbedder",
        "image_encoder",
        MODULE_CLASS,
        VISUAL,
        _OPEN_CLIP,
        _plan,
        _export,
        lambda module, recorded: dict(recorded) or {"freeze": True},
    ),
)

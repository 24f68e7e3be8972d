"""FrozenOpenCLIPEmbedder: open_clip's text encoder as transformers' `CLIPTextModel`, bit-exact.

model.token_embedding.weight                     embeddings.token_embedding.weight
model.positional_embedding                       embeddings.position_embedding.weight
model.transformer.resblocks.I.ln_1, ln_2         encoder.layers.I.layer_norm1, layer_norm2
model.transformer.resblocks.I.attn.in_proj_*     encoder.layers.I.self_attn.{q,k,v}_proj: thirds of its rows
model.transformer.resblocks.I.attn.out_proj      encoder.layers.I.self_attn.out_proj
model.transformer.resblocks.I.mlp.c_fc, c_proj   encoder.layers.I.mlp.fc1, fc2
model.ln_final                                   final_layer_norm
model.text_projection, logit_scale, attn_mask    not used

``layer: penultimate`` does not compute the last block, so that the module has one layer fewer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.compvis.conditioner.clip import (
    bare,
    beside_tokenizer,
    build_text_model,
    fill_positions,
    heads_notes,
    heads_of,
    module_shapes,
    text_config,
)
from diffusers_ddpm_ext.compvis.conditioner.kinds import (
    Argument,
    ConditionerKind,
    ConditionerPlan,
    TokenizerRule,
    unused,
)
from diffusers_ddpm_ext.compvis.conditioner.sizes import count_layers, one_of, size_of
from diffusers_ddpm_ext.compvis.key_map import TensorMapping, Transform
from diffusers_ddpm_ext.compvis.schema import BOOLEAN, TEXT, listed
from diffusers_ddpm_ext.utils.wrappers import plain_state_dict

BLOCKS = "model.transformer.resblocks."
UNUSED = {
    "model.text_projection": "of the similarity of texts and images: not used for conditioning",
    "model.logit_scale": "of the similarity of texts and images: not used for conditioning",
    "model.attn_mask": "the causal mask, which follows from the length",
}
LAST_BLOCK = "the last block, which layer penultimate does not compute"
RENAMED = {
    "embeddings.token_embedding.weight": "model.token_embedding.weight",
    "embeddings.position_embedding.weight": "model.positional_embedding",
    "final_layer_norm.weight": "model.ln_final.weight",
    "final_layer_norm.bias": "model.ln_final.bias",
}
IN_BLOCK = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
            "self_attn.out_proj": "attn.out_proj"}  # fmt: skip
# Width and blocks of open_clip's released text encoders, against which a file is checked.
RELEASED = {"ViT-H-14": (1024, 24), "ViT-g-14": (1024, 24), "ViT-bigG-14": (1280, 32), "ViT-L-14": (768, 12)}
CONTEXT_LENGTH = 77  # of open_clip.tokenize
SKIPPED = {"last": 0, "penultimate": 1}


def _source(name: str) -> tuple[str, Transform]:
    """open_clip's key of a name of `CLIPTextModel`, and the third of it, if it is one."""
    name = bare(name)
    if name in RENAMED:
        return RENAMED[name], "same"
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    assert match is not None, name
    block, inner, leaf = match.groups()
    if inner.endswith(("q_proj", "k_proj", "v_proj")):
        thirds: dict[str, Transform] = {"q": "q", "k": "k", "v": "v"}
        return f"{BLOCKS}{block}.attn.in_proj_{leaf}", thirds[inner.removeprefix("self_attn.")[0]]
    return f"{BLOCKS}{block}.{IN_BLOCK[inner]}.{leaf}", "same"


def _activation(params: Mapping[str, Any]) -> str:
    """open_clip's: GELU, unless the weights, or the architecture's name, are of OpenAI's kind."""
    quick = str(params["version"]) == "openai" or "quickgelu" in str(params["arch"]).lower()
    return "quick_gelu" if quick else "gelu"


def _plan(params: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ConditionerPlan:
    blocks = count_layers(tensors, BLOCKS)
    width = size_of(tensors, "model.token_embedding.weight", 1)
    known_width, depth = RELEASED.get(str(params["arch"]), (None, blocks))
    depth = depth if known_width == width else blocks
    used = depth - SKIPPED[params["layer"]]
    if not 0 < used <= blocks <= depth:
        raise ValueError(
            f"The checkpoint has {blocks} blocks of a text encoder {params['arch']} of {depth}, of which layer "
            f"{params['layer']} computes {used}: the file is damaged."
        )
    left_out = {key: UNUSED[key] for key in tensors if key in UNUSED}
    beyond = tuple(f"{BLOCKS}{index}." for index in range(used, blocks))
    left_out |= {key: LAST_BLOCK for key in tensors if beyond and key.startswith(beyond)}
    sizes = {
        "embeddings.token_embedding.weight": tensors["model.token_embedding.weight"],
        **{
            name: tensors[key]
            for name, key in (
                ("embeddings.position_embedding.weight", "model.positional_embedding"),
                ("encoder.layers.0.mlp.fc1.weight", f"{BLOCKS}0.mlp.c_fc.weight"),
            )
            if key in tensors
        },
    }
    sizes |= {f"encoder.layers.{used - 1}.x": tensors["model.token_embedding.weight"]}
    known = beside_tokenizer(params, width) | {"hidden_act": _activation(params)} | heads_of(params)
    config = text_config(sizes, known)
    mappings = tuple(
        TensorMapping(name, *_source(name), 1, shape)
        for name, shape in module_shapes(lambda: build_text_model(config)).items()
    )
    layout = {"left_out": sorted(left_out)}
    notes = heads_notes(config, known)
    return ConditionerPlan(lambda: build_text_model(config), mappings, left_out, layout, fill_positions, notes)


def _export(module: nn.Module, layout: Mapping[str, Any], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for target, tensor in plain_state_dict(module).items():
        source, transform = _source(target)
        if transform == "same":
            state[source] = tensor.detach()
            continue
        parts = thirds.setdefault(source, {})
        parts[transform] = tensor.detach()
        if len(parts) == 3:
            state[source] = torch.cat([parts[third] for third in ("q", "k", "v")])
    needed = layout.get("left_out", sorted(set(base) - set(state)) or sorted(set(UNUSED) - {"model.attn_mask"}))
    missing = [str(key) for key in needed if str(key) not in base] if isinstance(needed, list) else ["left_out"]
    if missing:
        raise ValueError(
            f"The original's text encoder has {len(missing)} tensors that its conditioning does not use and the "
            f"pipeline does not have: {listed(missing, 4)}. Give the checkpoint that has them as base (--base)."
        )
    return state | {key: base[key] for key in needed}


def _params_of(module: nn.Module, recorded: Mapping[str, Any]) -> dict[str, Any]:
    return dict(recorded) or {"freeze": True, "layer": "penultimate"}


OPEN_CLIP = ConditionerKind(
    "FrozenOpenCLIPEmbedder",
    "text_encoder",
    "CLIPTextModel",
    BLOCKS,
    {
        "arch": Argument("sizes of pipeline.text_encoder", TEXT, "ViT-H-14"),
        "version": Argument("activation of pipeline.text_encoder", TEXT, "laion2b_s32b_b79k"),
        "device": unused("pipe.to(device)"),
        "max_length": unused("open_clip's tokenizer ignores it"),
        "freeze": Argument("--train_text_encoder", BOOLEAN, True),
        "layer": Argument("number of layers of pipeline.text_encoder", one_of(*SKIPPED), "last"),
    },
    _plan,
    _export,
    _params_of,
    tokenizer_rule=lambda params: TokenizerRule(CONTEXT_LENGTH, pad_token_id=0),
)

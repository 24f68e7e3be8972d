"""FrozenT5Embedder: transformers' `T5EncoderModel`, whose names it has under ``transformer.``

The table of tokens is in a file twice, as ``shared.weight`` and as ``encoder.embed_tokens.weight``, or once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.compvis.conditioner.clip import module_shapes
from diffusers_ddpm_ext.compvis.conditioner.kinds import (
    Argument,
    ConditionerKind,
    ConditionerPlan,
    TokenizerRule,
    unused,
)
from diffusers_ddpm_ext.compvis.conditioner.sizes import LENGTH, count_layers, folder_config, size_of
from diffusers_ddpm_ext.compvis.key_map import TensorMapping
from diffusers_ddpm_ext.compvis.schema import BOOLEAN, TEXT
from diffusers_ddpm_ext.models.text_encoder_loading import transformers_class
from diffusers_ddpm_ext.utils.wrappers import plain_state_dict, unwrap

PREFIX, FIRST = "transformer.", "encoder.block.0.layer."
TABLES = ("shared.weight", "encoder.embed_tokens.weight")


def _build(config: Mapping[str, Any]) -> nn.Module:
    config_class, model_class = (transformers_class("transformers", name) for name in ("T5Config", "T5EncoderModel"))
    model: nn.Module = model_class(config_class(**config))
    return model


def _config(tensors: Mapping[str, Tensor], known: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `T5Config`, from the shapes of tensors and what is known."""
    bias = f"{FIRST}0.SelfAttention.relative_attention_bias.weight"
    heads, inner = size_of(tensors, bias, 1), size_of(tensors, f"{FIRST}0.SelfAttention.q.weight", 0)
    gated = f"{FIRST}1.DenseReluDense.wi_0.weight" in tensors
    if inner % heads:
        raise ValueError(
            f"The checkpoint's T5 encoder has {heads} heads of {inner} channels together: the file is damaged."
        )
    return {
        "vocab_size": size_of(tensors, TABLES[0], 0),
        "d_model": size_of(tensors, TABLES[0], 1),
        "d_kv": inner // heads,
        "d_ff": size_of(tensors, f"{FIRST}1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight", 0),
        "num_layers": count_layers(tensors, "encoder.block."),
        "num_heads": heads,
        "relative_attention_num_buckets": size_of(tensors, bias, 0),
        "relative_attention_max_distance": known.get("relative_attention_max_distance", 128),
        "layer_norm_epsilon": known.get("layer_norm_epsilon", 1e-6),
        "feed_forward_proj": known.get("feed_forward_proj", "gated-gelu" if gated else "relu"),
    }


def _plan(params: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ConditionerPlan:
    own = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items() if key.startswith(PREFIX)}
    layout = _layout_of(tensors)
    tables = layout["tables"]
    if len(tables) == 2 and not torch.equal(*(own[name] for name in tables)):
        raise ValueError(
            f"The checkpoint's {' and '.join(tables)} differ, which are one table of tokens in a T5 encoder: the file "
            "is damaged."
        )
    own |= {name: own[tables[0]] for name in TABLES if tables}
    config = _config(own, folder_config(params["version"], "encoder"))
    table = PREFIX + (tables[0] if tables else TABLES[0])
    mappings = tuple(
        TensorMapping(name, table if name in TABLES else PREFIX + name, "same", 1, shape)
        for name, shape in module_shapes(lambda: _build(config)).items()
    )
    left_out = {PREFIX + name: "the table of tokens again" for name in tables[1:]}
    return ConditionerPlan(lambda: _build(config), mappings, left_out, layout, lambda module: module.tie_weights())


def _export(module: nn.Module, layout: Mapping[str, Any], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = {PREFIX + name: tensor.detach() for name, tensor in plain_state_dict(module).items() if name not in TABLES}
    table = plain_state_dict(module)[TABLES[0]].detach()
    return state | {PREFIX + name: table for name in TABLES if name in (layout.get("tables") or TABLES)}


def _layout_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Names of the table of tokens."""
    return {"tables": [name for name in TABLES if PREFIX + name in tensors]}


def _params_of(module: nn.Module, recorded: Mapping[str, Any]) -> dict[str, Any]:
    if recorded:
        return dict(recorded)
    config: Any = unwrap(module).config
    return {"version": config._name_or_path or "google/t5-v1_1-large"}


T5 = ConditionerKind(
    "FrozenT5Embedder",
    "text_encoder",
    "T5EncoderModel",
    "transformer.encoder.block.",
    {
        "version": Argument("pipeline.text_encoder", TEXT, "google/t5-v1_1-large"),
        "device": unused("pipe.to(device)"),
        "max_length": Argument("model_max_length of pipeline.tokenizer", LENGTH, 77),
        "freeze": Argument("--train_text_encoder", BOOLEAN, True),
    },
    _plan,
    _export,
    _params_of,
    _layout_of,
    tokenizer_rule=lambda params: TokenizerRule(params["max_length"]),
)

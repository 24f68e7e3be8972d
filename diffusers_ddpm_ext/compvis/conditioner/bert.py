"""BERTEmbedder and TransformerEmbedder: Diffusers' `LDMBertModel`, bit-exact.

transformer.token_emb, pos_emb.emb                    model.embed_tokens, embed_positions
transformer.attn_layers.layers.(2I).0, .1.to_q ...    model.layers.I.self_attn_layer_norm, self_attn.q_proj ...
transformer.attn_layers.layers.(2I+1).0, .1.net.0.0   model.layers.I.final_layer_norm, fc1
transformer.attn_layers.layers.(2I+1).1.net.2         model.layers.I.fc2
transformer.norm, to_logits                           model.layer_norm, to_logits
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from diffusers_ddpm_ext.compvis.conditioner.clip import module_shapes
from diffusers_ddpm_ext.compvis.conditioner.kinds import (
    Argument,
    ConditionerKind,
    ConditionerPlan,
    TokenizerRule,
    unused,
)
from diffusers_ddpm_ext.compvis.conditioner.sizes import LENGTH
from diffusers_ddpm_ext.compvis.key_map import TensorMapping
from diffusers_ddpm_ext.compvis.schema import BOOLEAN, LAYERS, WIDTH, whole
from diffusers_ddpm_ext.models.text_encoder_loading import transformers_class
from diffusers_ddpm_ext.utils.network_budget import MAX_CLASSES
from diffusers_ddpm_ext.utils.wrappers import plain_state_dict, unwrap

HEADS, HEAD_WIDTH, FEED_FORWARD = 8, 64, 4  # of the original's class, whatever the width
RENAMED = {"model.embed_tokens": "token_emb", "model.embed_positions": "pos_emb.emb", "model.layer_norm": "norm",
           "to_logits": "to_logits"}  # fmt: skip
# Module of a layer -> 0 for its attention, 1 for its feed-forward part, and the rest of the original's name.
IN_LAYER = {
    "self_attn_layer_norm": (0, "0"), "self_attn.q_proj": (0, "1.to_q"), "self_attn.k_proj": (0, "1.to_k"),
    "self_attn.v_proj": (0, "1.to_v"), "self_attn.out_proj": (0, "1.to_out"), "final_layer_norm": (1, "0"),
    "fc1": (1, "1.net.0.0"), "fc2": (1, "1.net.2"),
}  # fmt: skip


def _source(name: str) -> str:
    """The original's key of a name of `LDMBertModel`."""
    module, _, leaf = name.rpartition(".")
    if module in RENAMED:
        return f"transformer.{RENAMED[module]}.{leaf}"
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    assert match is not None, name
    half, inner = IN_LAYER[match[2]]
    return f"transformer.attn_layers.layers.{2 * int(match[1]) + half}.{inner}.{leaf}"


def _build(params: Mapping[str, Any]) -> nn.Module:
    width = params["n_embed"]
    config_class, model_class = (transformers_class("diffusers", name) for name in ("LDMBertConfig", "LDMBertModel"))
    config = config_class(
        vocab_size=params["vocab_size"],
        max_position_embeddings=params["max_seq_len"],
        encoder_layers=params["n_layer"],
        encoder_ffn_dim=FEED_FORWARD * width,
        encoder_attention_heads=HEADS,
        head_dim=HEAD_WIDTH,
        d_model=width,
        dropout=0.0,
    )
    model: nn.Module = model_class(config)
    return model


def _plan(params: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ConditionerPlan:
    mappings = tuple(
        TensorMapping(name, _source(name), "same", 1, shape)
        for name, shape in module_shapes(lambda: _build(params)).items()
    )
    return ConditionerPlan(lambda: _build(params), mappings)


def _export(module: nn.Module, layout: Mapping[str, Any], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    _check(module)
    return {_source(name): tensor.detach() for name, tensor in plain_state_dict(module).items()}


def _check(module: nn.Module) -> None:
    config: Any = unwrap(module).config
    only = {"encoder_attention_heads": HEADS, "head_dim": HEAD_WIDTH, "activation_function": "gelu",
            "encoder_ffn_dim": FEED_FORWARD * config.d_model}  # fmt: skip
    for key, allowed in only.items():
        if getattr(config, key) != allowed:
            raise ValueError(
                f"The text encoder's {key} is {getattr(config, key)}, which cannot be exported: the original has "
                f"{allowed} only."
            )


def _params_of(module: nn.Module, recorded: Mapping[str, Any]) -> dict[str, Any]:
    config: Any = unwrap(module).config
    return {**recorded, "n_embed": config.d_model, "n_layer": config.encoder_layers, "vocab_size": config.vocab_size,
            "max_seq_len": config.max_position_embeddings}  # fmt: skip


_SIZES = {
    "n_embed": Argument("width of pipeline.text_encoder", WIDTH, required=True),
    "n_layer": Argument("layers of pipeline.text_encoder", LAYERS, required=True),
    "vocab_size": Argument("tokens of pipeline.text_encoder", whole(MAX_CLASSES), 30522),
    "max_seq_len": Argument("positions of pipeline.text_encoder", LENGTH, 77),
    "device": unused("pipe.to(device)"),
}
BERT = ConditionerKind(
    "BERTEmbedder",
    "text_encoder",
    "LDMBertModel",
    "transformer.attn_layers.",
    {
        **_SIZES,
        "use_tokenizer": Argument("whether there is a pipeline.tokenizer", BOOLEAN, True),
        "embedding_dropout": unused("only used in training"),
    },
    _plan,
    _export,
    _params_of,
    tokenizer_rule=lambda params: TokenizerRule(params["max_seq_len"]) if params["use_tokenizer"] else None,
)
TRANSFORMER = ConditionerKind(
    "TransformerEmbedder",
    "text_encoder",
    "LDMBertModel",
    "transformer.attn_layers.",
    _SIZES | {"vocab_size": Argument("tokens of pipeline.text_encoder", whole(MAX_CLASSES), required=True)},
    _plan,
    _export,
    _params_of,
)

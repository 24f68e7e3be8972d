"""From a Diffusers network to the arguments of the ``UNetModel`` that computes the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from diffusers_ddpm_ext.compvis.architecture import CLASSES, GROUPS, plain, translate_unet
from diffusers_ddpm_ext.models.unet_2d_ext import stock_name
from diffusers_ddpm_ext.pipelines.guidance import network_config

# Of a network's configuration, what UNetModel has no word for: name -> the value it computes with.
FIXED: dict[str, tuple[Any, ...]] = {
    "norm_num_groups": (GROUPS,),
    "norm_eps": (1e-5,),
    "act_fn": ("silu", "swish"),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "downsample_padding": (1,),
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_scale_factor": (1,),
    "add_attention": (True,),
    "timestep_scale": (1,),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2DCrossAttn"),
    "dual_cross_attention": (False,),
    "upcast_attention": (False,),
    "encoder_hid_dim": (None,),
    "addition_embed_type": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "class_embeddings_concat": (False,),
    "reverse_transformer_layers_per_block": (None,),
    "attention_type": ("default",),
}


def unet_params_of(network: nn.Module) -> dict[str, Any]:
    """Find the arguments of the UNetModel that computes what a Diffusers network computes.

    Args:
        network: a UNet2DModel, UNet2DConditionModel or UNet2DExtModel.

    Returns:
        Keyword arguments of UNetModel.

    Raises:
        ValueError: UNetModel cannot express it; the setting is named.
    """
    kind = next((name for name in reversed(CLASSES) if type(network) is CLASSES[name]), None)
    if kind is None:
        raise ValueError(f"A {type(network).__name__} does not go back to UNetModel.")
    config = network_config(network)
    for name, allowed in FIXED.items():
        if name in config and config[name] not in allowed:
            raise ValueError(
                f"{name} {config[name]} does not go back: CompVis' UNetModel always has {allowed[0]}, and its weights "
                "would be another function."
            )
    if kind != "UNet2DConditionModel" and config.get("attn_norm_num_groups") not in (GROUPS, None):
        groups = config["attn_norm_num_groups"]
        raise ValueError(f"attn_norm_num_groups {groups} does not go back: UNetModel always has {GROUPS}.")
    params = _params(config, kind)
    back = translate_unet(params)
    for name, value in _function(back.config, back.kind).items():
        mine = _function(config, kind)[name]
        if mine != value:
            raise ValueError(f"{name} {mine} does not go back: CompVis' UNetModel would have {value}.")
    return params


def _params(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    levels = list(config["block_out_channels"])
    down = [stock_name(block) for block in config["down_block_types"]]
    attends = [2**level for level, block in enumerate(down) if "Attn" in block]
    resnets = "resnet" in (config.get("downsample_type"),) or any("Resnet" in block for block in down)
    if any(width % levels[0] for width in levels):
        raise ValueError(
            f"block_out_channels {levels} does not go back: UNetModel's widths are multiples of its first."
        )
    mult = [width // levels[0] for width in levels]
    params: dict[str, Any] = {
        "image_size": plain(config["sample_size"]),
        "in_channels": config["in_channels"],
        "model_channels": levels[0],
        "out_channels": config["out_channels"],
        "num_res_blocks": plain(config["layers_per_block"]),
        "attention_resolutions": attends,
        "dropout": config["dropout"],
        "channel_mult": mult,
        "use_scale_shift_norm": config["resnet_time_scale_shift"] == "scale_shift",
        "resblock_updown": resnets,
    }
    kind_of_labels = config.get("class_embed_type")
    if kind_of_labels == "simple_projection":
        params["num_classes"] = "continuous"
    elif kind_of_labels == "projection":
        params |= {"num_classes": "sequential", "adm_in_channels": config["projection_class_embeddings_input_dim"]}
    elif kind_of_labels is not None:
        raise ValueError(f"class_embed_type {kind_of_labels} does not go back: UNetModel has no such embedding.")
    elif config.get("num_class_embeds") is not None:
        params["num_classes"] = config["num_class_embeds"]
    return params | (_cross_params(config) if kind == "UNet2DConditionModel" else _head_params(config))


def _head_params(config: Mapping[str, Any]) -> dict[str, Any]:
    heads = config.get("num_attention_heads")
    if heads is not None:
        up = config.get("num_attention_heads_up")
        return {"num_heads": heads, "num_heads_upsample": heads if up is None else up}
    if config.get("num_attention_heads_up") is not None:
        raise ValueError("num_attention_heads_up without num_attention_heads does not go back to UNetModel.")
    size = config["attention_head_dim"]
    return {"num_heads": 1} if size is None else {"num_head_channels": size, "num_heads": -1}


def _cross_params(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("num_attention_heads") is not None:
        raise ValueError("num_attention_heads does not go back: give attention_head_dim, as Diffusers' own files do.")
    levels = list(config["block_out_channels"])
    heads = plain(config["attention_head_dim"])
    heads = heads if isinstance(heads, list) else [heads] * len(levels)
    sizes = {width // n for width, n in zip(levels, heads, strict=True)}
    how = {"num_heads": heads[0]} if len(set(heads)) == 1 else {"num_head_channels": sizes.pop(), "num_heads": -1}
    return how | {
        "use_spatial_transformer": True,
        "context_dim": plain(config["cross_attention_dim"]),
        "transformer_depth": plain(config["transformer_layers_per_block"]),
        "use_linear_in_transformer": bool(config["use_linear_projection"]),
        "legacy": False,
        "disable_self_attentions": _only_cross(config),
    }


def _only_cross(config: Mapping[str, Any]) -> list[bool]:
    """On which levels self-attention is left out."""
    only = config["only_cross_attention"]
    return [only] * len(config["block_out_channels"]) if isinstance(only, bool) else [bool(value) for value in only]


def _function(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """What decides the function of a network's weights, comparable between ways of saying it."""
    levels = list(config["block_out_channels"])
    down = [stock_name(block) for block in config["down_block_types"]]
    up = [stock_name(block) for block in config["up_block_types"]]
    last = len(levels) - 1  # neither the last way down nor the last way up resamples
    found = {
        "block_out_channels": levels,
        "layers_per_block": plain(config["layers_per_block"]),
        "down_block_types": ["DownBlock2D" if i == last and "Resnet" in b else b for i, b in enumerate(down)],
        "up_block_types": ["UpBlock2D" if i == last and "Resnet" in b else b for i, b in enumerate(up)],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "resnet_time_scale_shift": config["resnet_time_scale_shift"],
        "time_embedding_dim": config.get("time_embedding_dim") or 4 * levels[0],
    }
    if kind == "UNet2DConditionModel":
        heads = plain(config["attention_head_dim"])
        heads = heads if isinstance(heads, list) else [heads] * len(levels)
        return found | {"attention_head_dim": heads, "only_cross_attention": _only_cross(config)}
    attends = any("Attn" in block for block in down[:last])
    found["downsample_type"] = config["downsample_type"] if attends else None
    found["upsample_type"] = config["upsample_type"] if any("Attn" in block for block in up[:last]) else None
    norm = config.get("attn_norm_num_groups") or (GROUPS if found["resnet_time_scale_shift"] == "default" else None)
    found["attn_norm_num_groups"] = norm
    found["attention_head_dim"] = _head_sizes(config)
    return found


def _head_sizes(config: Mapping[str, Any]) -> list[float]:
    """Channels of a head in every attention: down, middle, up."""
    levels = list(config["block_out_channels"])
    count, up = config.get("num_attention_heads"), config.get("num_attention_heads_up")
    sizes: list[float] = []
    for types, order, heads in (
        (config["down_block_types"], levels, count),
        (["Attn"], levels[-1:], count),
        (config["up_block_types"], levels[::-1], count if up is None else up),
    ):
        for block, width in zip(types, order, strict=True):
            if "Attn" in block:
                size = config["attention_head_dim"] or width
                sizes.append(width // heads if heads else size if width % size == 0 else math.nan)
    return sizes

"""Arguments of the ``UNetModel`` that is equivalent to a Diffusers network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from diffusers import UNet2DConditionModel
from torch import nn

from diffusers_ddpm_ext.compvis.architecture import NETWORK_CLASSES, NORM_GROUPS, as_list, translate_unet
from diffusers_ddpm_ext.models.class_token_unet import ClassTokenUNet
from diffusers_ddpm_ext.models.unet_2d_ext import stock_name
from diffusers_ddpm_ext.pipelines.guidance import network_config
from diffusers_ddpm_ext.utils.wrappers import network_class, unwrap

# Settings of a Diffusers network that UNetModel has no option for -> the only values that it computes with.
FIXED_SETTINGS: dict[str, tuple[Any, ...]] = {
    "norm_num_groups": (NORM_GROUPS,), "norm_eps": (1e-5,), "act_fn": ("silu", "swish"), "flip_sin_to_cos": (True,),
    "freq_shift": (0,), "downsample_padding": (1,), "center_input_sample": (False,),
    "time_embedding_type": ("positional",), "mid_block_scale_factor": (1,), "add_attention": (True,),
    "timestep_scale": (1,), "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2DCrossAttn"),
    "dual_cross_attention": (False,), "upcast_attention": (False,), "encoder_hid_dim": (None,),
    "addition_embed_type": (None,), "time_embedding_act_fn": (None,), "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,), "conv_in_kernel": (3,), "conv_out_kernel": (3,), "attention_type": ("default",),
    "class_embeddings_concat": (False,), "reverse_transformer_layers_per_block": (None,),
}  # fmt: skip


def unet_params_of(network: nn.Module) -> dict[str, Any]:
    """Find the keyword arguments of the UNetModel that computes the same function as a Diffusers network.

    Raises:
        ValueError: UNetModel cannot express it; the message names the setting.
    """
    kind, network = network_class(network), unwrap(network)
    if kind is ClassTokenUNet:
        kind = UNet2DConditionModel  # its table belongs to the original's conditioning stage
    class_name = next((name for name in reversed(NETWORK_CLASSES) if kind is NETWORK_CLASSES[name]), None)
    if class_name is None:
        raise ValueError(f"A {kind.__name__} cannot be exported to UNetModel.")
    config = network_config(network)
    for name, allowed in FIXED_SETTINGS.items():
        if name in config and config[name] not in allowed:
            raise ValueError(
                f"{name} {config[name]} cannot be exported: CompVis' UNetModel always has {allowed[0]}, and "
                "would compute a different function with these weights."
            )
    if class_name != "UNet2DConditionModel" and config.get("attn_norm_num_groups") not in (NORM_GROUPS, None):
        groups = config["attn_norm_num_groups"]
        raise ValueError(f"attn_norm_num_groups {groups} cannot be exported: UNetModel always has {NORM_GROUPS}.")
    params = _find_params(config, class_name)
    equivalent = translate_unet(params)
    actual = _functional_settings(config, class_name)
    for name, value in _functional_settings(equivalent.config, equivalent.class_name).items():
        if actual[name] != value:
            raise ValueError(f"{name} {actual[name]} cannot be exported: CompVis' UNetModel would have {value}.")
    return params


def is_same_network(unet_params: Mapping[str, Any], network: nn.Module) -> bool:
    """Whether a UNetModel of these arguments computes the same function as a Diffusers network with its weights."""
    spec, config = translate_unet(unet_params), network_config(network)
    class_name = network_class(network).__name__
    if (class_name == "UNet2DConditionModel") != (spec.class_name == "UNet2DConditionModel"):
        return False
    return _functional_settings(spec.config, spec.class_name) == _functional_settings(config, class_name)


def _find_params(config: Mapping[str, Any], class_name: str) -> dict[str, Any]:
    levels = list(config["block_out_channels"])
    down = [stock_name(block) for block in config["down_block_types"]]
    attends = [2**level for level, block in enumerate(down) if "Attn" in block]
    resnets = "resnet" in (config.get("downsample_type"),) or any("Resnet" in block for block in down)
    if any(width % levels[0] for width in levels):
        raise ValueError(
            f"block_out_channels {levels} cannot be exported: UNetModel's widths are multiples of its first."
        )
    mult = [width // levels[0] for width in levels]
    params: dict[str, Any] = {
        "image_size": as_list(config["sample_size"]),
        "in_channels": config["in_channels"],
        "model_channels": levels[0],
        "out_channels": config["out_channels"],
        "num_res_blocks": _one_value(config["layers_per_block"]),
        "attention_resolutions": attends,
        "dropout": config["dropout"],
        "channel_mult": mult,
        "use_scale_shift_norm": config["resnet_time_scale_shift"] == "scale_shift",
        "resblock_updown": resnets,
    }
    embed_type = config.get("class_embed_type")
    if embed_type == "simple_projection":
        params["num_classes"] = "continuous"
    elif embed_type == "projection":
        params |= {"num_classes": "sequential", "adm_in_channels": config["projection_class_embeddings_input_dim"]}
    elif embed_type is not None:
        raise ValueError(f"class_embed_type {embed_type} cannot be exported: UNetModel has no such embedding.")
    elif config.get("num_class_embeds") is not None:
        params["num_classes"] = config["num_class_embeds"]
    return params | (_cross_params(config) if class_name == "UNet2DConditionModel" else _head_params(config))


def _head_params(config: Mapping[str, Any]) -> dict[str, Any]:
    heads = config.get("num_attention_heads")
    if heads is not None:
        up = config.get("num_attention_heads_up")
        return {"num_heads": heads, "num_heads_upsample": heads if up is None else up}
    if config.get("num_attention_heads_up") is not None:
        raise ValueError("num_attention_heads_up without num_attention_heads cannot be exported to UNetModel.")
    size = config["attention_head_dim"]
    return {"num_heads": 1} if size is None else {"num_head_channels": size, "num_heads": -1}


def _cross_params(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("num_attention_heads") is not None:
        raise ValueError("num_attention_heads cannot be exported: set attention_head_dim, as Diffusers' own files do.")
    how = _cross_heads(config)
    return how | {
        "use_spatial_transformer": True,
        "context_dim": _one_value(config["cross_attention_dim"]),
        "transformer_depth": _one_value(config["transformer_layers_per_block"]),
        "use_linear_in_transformer": bool(config["use_linear_projection"]),
        "disable_self_attentions": _only_cross(config),
    }


def _one_value(value: Any) -> Any:
    """A list of equal values as this value, which every UNetModel takes; other values as they are."""
    values = as_list(value)
    return values[0] if isinstance(values, list) and len({str(each) for each in values}) == 1 else values


def _cross_heads(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options that give the blocks with cross attention their heads."""
    used = {(width, n) for width, n in zip(config["block_out_channels"], _heads_of_levels(config), strict=True) if n}
    if len({n for _, n in used}) == 1:
        return {"num_heads": used.pop()[1], "legacy": False}
    sizes = [size for size in range(1, max(width for width, _ in used) + 1) if all(w // size == n for w, n in used)]
    if not sizes:
        heads = as_list(config["attention_head_dim"])
        raise ValueError(f"attention_head_dim {heads} cannot be exported: UNetModel has one num_head_channels.")
    divides = [size for size in sizes if all(width % size == 0 for width, _ in used)]
    # Under `legacy` the number of heads counts, as in Diffusers, and their channels follow from it.
    return {"num_head_channels": (divides or sizes)[0], "num_heads": -1, "legacy": not divides}


def _heads_of_levels(config: Mapping[str, Any]) -> list[int]:
    """Heads of each level's blocks with cross attention; 0 on levels without."""
    down = config["down_block_types"]
    heads = as_list(config["attention_head_dim"])
    heads = heads if isinstance(heads, list) else [heads] * len(down)
    attends = ["Attn" in block for block in down[:-1]] + [True]  # the middle block has the last level's
    return [int(n) if has else 0 for n, has in zip(heads, attends, strict=True)]


def _only_cross(config: Mapping[str, Any]) -> list[bool]:
    """Whether each level lacks self-attention."""
    only = config["only_cross_attention"]
    return [only] * len(config["block_out_channels"]) if isinstance(only, bool) else [bool(value) for value in only]


def _functional_settings(config: Mapping[str, Any], class_name: str) -> dict[str, Any]:
    """Settings that determine the function of a network's weights, in a form that can be compared."""
    levels = list(config["block_out_channels"])
    down = [stock_name(block) for block in config["down_block_types"]]
    up = [stock_name(block) for block in config["up_block_types"]]
    last = len(levels) - 1  # neither the last down block nor the last up block resamples
    settings = {
        "block_out_channels": levels,
        "layers_per_block": _one_value(config["layers_per_block"]),
        "down_block_types": ["DownBlock2D" if i == last and "Resnet" in b else b for i, b in enumerate(down)],
        "up_block_types": ["UpBlock2D" if i == last and "Resnet" in b else b for i, b in enumerate(up)],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "resnet_time_scale_shift": config["resnet_time_scale_shift"],
        "time_embedding_dim": config.get("time_embedding_dim") or 4 * levels[0],
    }
    if class_name == "UNet2DConditionModel":
        heads = _heads_of_levels(config)
        return settings | {"attention_head_dim": heads, "only_cross_attention": _only_cross(config)}
    attends = any("Attn" in block for block in down[:last])
    settings["downsample_type"] = config["downsample_type"] if attends else None
    settings["upsample_type"] = config["upsample_type"] if any("Attn" in block for block in up[:last]) else None
    norm = config.get("attn_norm_num_groups") or (
        NORM_GROUPS if settings["resnet_time_scale_shift"] == "default" else None
    )
    settings["attn_norm_num_groups"] = norm
    settings["attention_head_dim"] = _head_sizes(config)
    return settings


def _head_sizes(config: Mapping[str, Any]) -> list[float]:
    """Channels per attention head of every attention block: down, middle, up."""
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

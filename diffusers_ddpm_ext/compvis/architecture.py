"""Arguments of CompVis' (and OpenAI's) ``UNetModel``, translated to an equivalent Diffusers network.

    UNet2DModel            wherever it can express the network
    UNet2DConditionModel   with cross attention (use_spatial_transformer, context_dim)
    UNet2DExtModel         a number of heads at several widths, different heads in the up blocks, projected labels,
                           scaled timesteps, and concatenated inputs, which stock Diffusers would sample incorrectly

The inverse is in `diffusers_ddpm_ext.compvis.unet_params`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from diffusers_ddpm_ext.compvis.schema import UNET_PARAM_TYPES, check_values, one_line
from diffusers_ddpm_ext.models.unet_2d_ext import UNet2DExtModel
from diffusers_ddpm_ext.utils.network_budget import check_network_config

NETWORK_CLASSES: dict[str, type[nn.Module]] = {
    "UNet2DModel": UNet2DModel,
    "UNet2DConditionModel": UNet2DConditionModel,
    "UNet2DExtModel": UNet2DExtModel,
}
NORM_GROUPS = 32
UNET_DEFAULTS: dict[str, Any] = {
    "image_size": None, "in_channels": None, "model_channels": None, "out_channels": None, "num_res_blocks": None,
    "attention_resolutions": None, "dropout": 0, "channel_mult": (1, 2, 4, 8), "conv_resample": True, "dims": 2,
    "num_classes": None, "use_checkpoint": False, "use_fp16": False, "use_bf16": False, "num_heads": -1,
    "num_head_channels": -1, "num_heads_upsample": -1, "use_scale_shift_norm": False, "resblock_updown": False,
    "use_new_attention_order": False, "use_spatial_transformer": False, "transformer_depth": 1, "context_dim": None,
    "n_embed": None, "legacy": True, "disable_self_attentions": None, "num_attention_blocks": None,
    "disable_middle_self_attn": False, "use_linear_in_transformer": False, "adm_in_channels": None,
}  # fmt: skip
REQUIRED_UNET_PARAMS = ("in_channels", "model_channels", "out_channels", "num_res_blocks", "attention_resolutions")
# Options of UNetModel that do not change any value here.
UNET_PARAMS_WITHOUT_EFFECT = {
    "use_checkpoint": "gradient checkpointing: pipeline.unet.enable_gradient_checkpointing()",
    "use_fp16": "weights are float32; load with torch_dtype=torch.float16",
    "use_bf16": "weights are float32; load with torch_dtype=torch.bfloat16",
}
# Option -> the only value that a Diffusers network can express, and the reason.
ONLY_SUPPORTED_VALUE: dict[str, tuple[Any, str]] = {
    "dims": (2, "Diffusers' UNet2D networks are two-dimensional"),
    "n_embed": (None, "no Diffusers network predicts codebook entries"),
    "num_attention_blocks": (None, "every residual block of a level has attention, or none"),
    "disable_middle_self_attn": (False, "the middle block always has self-attention"),
}


@dataclass(frozen=True)
class NetworkSpec:
    """Class and configuration of a Diffusers network that is not built yet.

    Attributes:
        class_name: name of its class.
        config: its keyword arguments.
    """

    class_name: str
    config: dict[str, Any]

    def build(self) -> nn.Module:
        """Build the network with random weights; inside ``torch.device("meta")`` without any."""
        return NETWORK_CLASSES[self.class_name](**self.config)


def complete_unet_params(unet_params: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the defaults of UNetModel's arguments, sequences as lists; refuse what no Diffusers network can express.

    Raises:
        ValueError: an option is unknown, missing, of the wrong type, or cannot be expressed; the message names it.
    """
    for name in unet_params:
        if name not in UNET_DEFAULTS:
            near = difflib.get_close_matches(str(name), UNET_DEFAULTS, n=1)
            hint = f"did you mean {near[0]}?" if near else "leave it out if it has no effect."
            raise ValueError(f"{one_line(name)} is not a known option of UNetModel: {hint}")
    options = UNET_DEFAULTS | {name: as_list(value) for name, value in unet_params.items()}
    missing = [name for name in REQUIRED_UNET_PARAMS if options[name] is None]
    if missing:
        raise ValueError(f"UNetModel needs {', '.join(missing)}, which the configuration does not set.")
    options |= check_values({name: options[name] for name in unet_params}, UNET_PARAM_TYPES)
    for name, (value, why) in ONLY_SUPPORTED_VALUE.items():
        if options[name] != value:
            raise ValueError(f"{name} {one_line(options[name])} cannot be expressed by a Diffusers network: {why}.")
    if not options["use_spatial_transformer"]:  # the original ignores them then
        options["disable_self_attentions"] = None
    blocks = options["num_res_blocks"]
    if isinstance(blocks, list):
        if len(set(blocks)) != 1 or len(blocks) != len(options["channel_mult"]):
            raise ValueError(
                f"num_res_blocks {one_line(blocks)} cannot be expressed by a Diffusers network: layers_per_block is "
                "one value."
            )
        options["num_res_blocks"] = blocks[0]
    _check_widths(options)
    return options


def _check_widths(options: Mapping[str, Any]) -> None:
    channels, mult = options["model_channels"], options["channel_mult"]
    if not mult or mult[0] != 1:
        raise ValueError(
            f"channel_mult {one_line(mult)} cannot be expressed by a Diffusers network: it must start with 1, since "
            "the first convolution outputs model_channels."
        )
    for width in (channels * m for m in mult):
        if width != int(width) or width % NORM_GROUPS:
            raise ValueError(
                f"model_channels {channels} times channel_mult {one_line(mult)} gives a width of {width}; it must be "
                f"a multiple of {NORM_GROUPS}, the number of norm groups."
            )
    if options["num_heads"] == -1 and options["num_head_channels"] == -1:
        raise ValueError("UNetModel needs num_heads or num_head_channels: the configuration sets neither.")


def translate_unet(
    unet_params: Mapping[str, Any], *, conditioning_key: str | None = None, timestep_scale: float = 1.0
) -> NetworkSpec:
    """Class and arguments of the Diffusers network that computes the same function as a UNetModel.

    Args:
        unet_params: keyword arguments of UNetModel.
        conditioning_key: how conditions are joined; a network with concatenated inputs becomes a `UNet2DExtModel`,
            since stock Diffusers would sample it incorrectly.
        timestep_scale: factor applied to the timestep before the network gets it.

    Raises:
        ValueError: no Diffusers network can express it; the message names the option.
    """
    options = complete_unet_params(unet_params)
    if options["use_spatial_transformer"] or options["context_dim"] is not None:
        if timestep_scale != 1:
            raise ValueError(f"timestep_scale {timestep_scale} with cross attention is not supported.")
        return _checked(NetworkSpec("UNet2DConditionModel", _condition_config(options)))
    config = _shared_config(options) | _block_types(options, "AttnDownBlock2D", "AttnUpBlock2D")
    config |= {
        "attn_norm_num_groups": NORM_GROUPS,
        "downsample_type": "resnet" if options["resblock_updown"] else "conv",
        "upsample_type": "resnet" if options["resblock_updown"] else "conv",
    }
    special = _head_config(options) | _label_config(options)
    config["attention_head_dim"] = special.pop("attention_head_dim", None)
    if timestep_scale != 1:
        special["timestep_scale"] = float(timestep_scale)
    concatenated = options["in_channels"] > options["out_channels"] or conditioning_key in ("concat", "hybrid")
    class_name = "UNet2DExtModel" if concatenated or set(special) - {"num_class_embeds"} else "UNet2DModel"
    return _checked(NetworkSpec(class_name, config | special))


def _checked(spec: NetworkSpec) -> NetworkSpec:
    """Refuse a network that no machine should build."""
    check_network_config(spec.config, "UNetModel")
    return spec


def attention_levels(options: Mapping[str, Any]) -> list[bool]:
    """Whether each level has attention."""
    return [2**level in options["attention_resolutions"] for level in range(len(options["channel_mult"]))]


def level_widths(options: Mapping[str, Any]) -> list[int]:
    """Channels of each level."""
    return [int(options["model_channels"] * mult) for mult in options["channel_mult"]]


def head_counts(options: Mapping[str, Any]) -> tuple[list[int], int, list[int]]:
    """Attention heads of each level's down blocks, of the middle block, and of each level's up blocks.

    Raises:
        ValueError: the original fails for a width with these heads, or no Diffusers network has such heads.
    """
    size, count, cross = options["num_head_channels"], options["num_heads"], options["use_spatial_transformer"]
    # Without `legacy`, or with cross attention, the original ignores num_heads_upsample.
    up = options["num_heads_upsample"] if options["legacy"] and not cross else -1
    levels, attends = level_widths(options), attention_levels(options)

    def heads(name: str, value: int) -> list[int]:
        counts = [_heads_of_width(width, name, value, options) for width in levels]
        for width, number, has in zip(levels, counts, [*attends[:-1], True], strict=True):  # the middle attends
            if has and not number:
                raise ValueError(f"{name} {value} does not divide {width}, the width of an attention block.")
        return [number or 1 for number in counts]

    down = heads("num_heads", count) if size == -1 else heads("num_head_channels", size)
    return down, down[-1], down if up == -1 or size != -1 else heads("num_heads_upsample", up)


def _heads_of_width(width: int, name: str, value: int, options: Mapping[str, Any]) -> int:
    """Heads of the original's attention at a width; 0 where it fails, or where Diffusers has no such attention."""
    if options["use_spatial_transformer"]:
        if name == "num_heads":  # width // heads channels each, as in Diffusers: not all channels need a head
            return 0 if value > width else value
        return 0 if width % value and not options["legacy"] else width // value
    if options["legacy"] or name == "num_head_channels":
        return 0 if width % value else width // value if name == "num_head_channels" else value
    channels = width // value  # of a head, from which the original counts the heads again
    return 0 if not channels or width % channels else width // channels


def _head_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """Attention heads as arguments of UNet2DModel, or else of UNet2DExtModel."""
    down, middle, up = head_counts(options)
    if options["num_head_channels"] != -1:
        return {"attention_head_dim": options["num_head_channels"]}
    attends, levels = attention_levels(options), level_widths(options)
    lower: set[tuple[int, int]] = {(levels[-1], middle)}
    upper: set[tuple[int, int]] = set()
    for used, heads in ((lower, down), (upper, up)):
        used |= {(width, n) for width, n, has in zip(levels, heads, attends, strict=True) if has}
    if all(n == 1 for _, n in lower | upper):
        return {"attention_head_dim": None}
    sizes = {width // n for width, n in lower | upper}
    if len(sizes) == 1:
        return {"attention_head_dim": sizes.pop()}
    counts = [sorted({n for _, n in used}) for used in (lower, upper)]
    if max(map(len, counts)) > 1:
        raise ValueError(
            f"num_heads {options['num_heads']} with legacy false cannot be expressed: the original makes {down} heads "
            "of it at the levels, and Diffusers' networks have one number."
        )
    return {"num_attention_heads": middle, "num_attention_heads_up": counts[1][0] if upper else middle}


def _label_config(options: Mapping[str, Any]) -> dict[str, Any]:
    classes = options["num_classes"]
    if classes is None:
        return {}
    if isinstance(classes, int):
        return {"num_class_embeds": classes}
    if classes == "continuous":
        return {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 1}
    if classes == "sequential" and options["adm_in_channels"]:
        width = options["adm_in_channels"]
        return {"class_embed_type": "projection", "projection_class_embeddings_input_dim": width}
    if classes == "sequential":
        raise ValueError("num_classes sequential needs adm_in_channels, the width of a label vector.")
    raise ValueError(
        f"num_classes {one_line(repr(classes))} cannot be expressed: it must be an integer, continuous or sequential."
    )


def _shared_config(options: Mapping[str, Any]) -> dict[str, Any]:
    size = options["image_size"]
    return {
        "sample_size": size if size is None or isinstance(size, int) else list(size),
        "in_channels": options["in_channels"],
        "out_channels": options["out_channels"],
        "block_out_channels": level_widths(options),
        "layers_per_block": options["num_res_blocks"],
        "dropout": float(options["dropout"]),
        "norm_num_groups": NORM_GROUPS,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "resnet_time_scale_shift": "scale_shift" if options["use_scale_shift_norm"] else "default",
    }


def _block_types(options: Mapping[str, Any], down: str, up: str) -> dict[str, Any]:
    """Block types: ``down`` and ``up`` on levels with attention, elsewhere by how the block resamples."""
    resnets = options["resblock_updown"]
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if resnets else ("DownBlock2D", "UpBlock2D")
    attends = attention_levels(options)
    return {
        "down_block_types": [down if has else plain[0] for has in attends],
        "up_block_types": [up if has else plain[1] for has in reversed(attends)],
    }


def _condition_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of UNet2DConditionModel."""
    if not options["use_spatial_transformer"] or options["context_dim"] is None:
        raise ValueError("use_spatial_transformer and context_dim need each other: the configuration sets only one.")
    if options["resblock_updown"]:
        raise ValueError("resblock_updown with use_spatial_transformer cannot be expressed by a Diffusers network.")
    depth, context = options["transformer_depth"], options["context_dim"]
    contexts = context if isinstance(context, list) else [context]
    if len(set(contexts)) != 1:
        raise ValueError(
            f"context_dim {one_line(contexts)} cannot be expressed by a Diffusers network: it takes a single width."
        )
    if not isinstance(depth, int):
        raise ValueError(f"transformer_depth {one_line(depth)} cannot be expressed: UNetModel takes a single depth.")
    down, middle, _ = head_counts(options)
    assert middle == down[-1]
    config = (
        _shared_config(options)
        | _block_types(options, "CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
        | _label_config(options)
    )
    levels = len(options["channel_mult"])
    without_self = options["disable_self_attentions"] or [False] * levels
    if len(without_self) != levels:
        raise ValueError(
            f"disable_self_attentions {one_line(without_self)} must be true or false for each of {levels} levels."
        )
    return config | {
        "only_cross_attention": [bool(value) for value in without_self],
        "cross_attention_dim": contexts[0],
        "transformer_layers_per_block": depth,
        "attention_head_dim": down,  # which Diffusers reads as the number of heads
        "use_linear_projection": bool(options["use_linear_in_transformer"]),
    }


def as_list(value: Any) -> Any:
    """A tuple or other sequence as a list; any other value as it is."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value

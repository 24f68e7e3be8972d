"""Budget of a network's configuration: refused before it is built, since building takes the memory and the time."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.utils.input_files import JsonObject

MAX_LEVELS = 16  # each halves the image: the last one of 65,536 pixels has 2
MAX_LAYERS = 64
MAX_WIDTH = 65_536
MAX_CLASSES = 1_000_000
LAYERS_OF_SIDES = ("encoder_layers_per_block", "decoder_layers_per_block", "num_encoder_blocks", "num_decoder_blocks")
"""Layers of the encoder and decoder of `AutoencoderDC` and `AutoencoderTiny`: a level may have none."""
COUNTS = dict.fromkeys(
    (
        *("block_out_channels", "in_channels", "out_channels", "time_embedding_dim", "cross_attention_dim"),
        *("attention_head_dim", "num_attention_heads", "num_attention_heads_up"),
        *("norm_num_groups", "attn_norm_num_groups", "projection_class_embeddings_input_dim", "encoder_hid_dim"),
        *("addition_time_embed_dim", "addition_embed_type_num_heads", "time_cond_proj_dim"),
        *("latent_channels", "vq_embed_dim", "encoder_block_out_channels", "decoder_block_out_channels"),
    ),
    MAX_WIDTH,
) | {
    "layers_per_block": MAX_LAYERS,
    "transformer_layers_per_block": MAX_LAYERS,
    "conv_in_kernel": 63,
    "conv_out_kernel": 63,
    **dict.fromkeys(LAYERS_OF_SIDES, MAX_LAYERS),
    "upsampling_scaling_factor": 16,
    "num_vq_embeddings": MAX_CLASSES,
    "num_class_embeds": MAX_CLASSES,
    "num_train_timesteps": 1_000_000,
}
"""Counts in a network's configuration (one, a list with one per level, or null) -> their largest values."""

WORDS = {
    "time_embedding_type": ("positional", "fourier", "learned"),
    "class_embed_type": ("timestep", "identity", "projection", "simple_projection"),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "resnet_time_scale_shift": ("default", "scale_shift", "ada_group", "spatial"),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn"),
    "attention_type": ("default", "gated", "gated-text-image"),
}
"""Settings that are one of a few words, or null; Diffusers builds another network for many unknown words."""
FLAGS = (
    *("center_input_sample", "flip_sin_to_cos", "add_attention", "dual_cross_attention", "use_linear_projection"),
    *("upcast_attention", "resnet_skip_time_act", "class_embeddings_concat", "mid_block_only_cross_attention"),
    "only_cross_attention",
)
"""Settings that are true, false or null, or a list of these with one per level."""
NUMBERS = (
    *("dropout", "norm_eps", "mid_block_scale_factor", "timestep_scale"),
    *("freq_shift", "downsample_padding", "resnet_out_scale_factor"),
)
NEVER_NULL = (
    *NUMBERS,
    *("in_channels", "out_channels", "block_out_channels", "layers_per_block", "conv_in_kernel", "conv_out_kernel"),
    *("time_embedding_type", "resnet_time_scale_shift", "act_fn"),
)
"""Settings that Diffusers' networks need; their defaults are no null."""


def check_network_config(config: Mapping[str, Any], name: str) -> None:
    """Refuse a network's configuration that asks for more than any machine should build.

    Values of another type than expected are left to the network's own checks.

    Args:
        config: of a `UNet2DModel`, a `UNet2DConditionModel`, or an autoencoder.
        name: the option or file, for messages.

    Raises:
        ConfigError: a count is out of range, or the weights alone do not fit into this machine's memory.
    """
    widths, layers = _integers(config.get("block_out_channels")), _integers(config.get("layers_per_block"))
    lists = ("block_out_channels", "encoder_block_out_channels", "decoder_block_out_channels")
    for key in (*lists, "down_block_types", "up_block_types"):
        value = config.get(key)
        if isinstance(value, Sequence) and len(value) > MAX_LEVELS:
            raise ConfigError(f"{name}: {key} has {len(value):,} levels; at most {MAX_LEVELS} are possible")
    for key, values, limit in (
        ("block_out_channels", widths, MAX_WIDTH),
        ("layers_per_block", layers, MAX_LAYERS),
        ("transformer_layers_per_block", _integers(config.get("transformer_layers_per_block")), MAX_LAYERS),
        ("num_class_embeds", _integers(config.get("num_class_embeds")), MAX_CLASSES),
        ("cross_attention_dim", _integers(config.get("cross_attention_dim")), MAX_WIDTH),
        ("in_channels", _integers(config.get("in_channels")), MAX_WIDTH),
        ("out_channels", _integers(config.get("out_channels")), MAX_WIDTH),
        ("time_embedding_dim", _integers(config.get("time_embedding_dim")), MAX_WIDTH),
    ):
        if values and not 1 <= min(values) <= max(values) <= limit:
            wrong = max(values) if max(values) > limit else min(values)
            raise ConfigError(f"{name}: {key} is {wrong:,}; it must be from 1 to {limit:,}")
    needed, memory = 4 * least_parameters(config), physical_memory()
    if needed > memory:
        raise ConfigError(
            f"{name}: the weights take at least {needed / 1e9:,.0f} GB, and this machine has {memory / 1e9:,.0f} GB:"
            " use smaller block_out_channels"
        )


def _integers(value: Any) -> list[int]:
    """The integers of a setting that is one, or a list of them."""
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return [entry for entry in values if isinstance(entry, int) and not isinstance(entry, bool)]


def least_parameters(config: Mapping[str, Any]) -> int:
    """A lower bound of a network's number of parameters.

    It counts a 3x3 convolution for each layer of the way down and of the way up, and a table of classes or codes.

    Args:
        config: as in `check_network_config`.
    """
    widths, layers = _integers(config.get("block_out_channels")), _integers(config.get("layers_per_block"))
    convolutions = sum(2 * 9 * width * width * min(layers, default=1) for width in widths)
    time_width = _integers(config.get("time_embedding_dim")) or [4 * (widths or [1])[0]]
    classes = 0 if config.get("class_embed_type") else sum(_integers(config.get("num_class_embeds")))
    codes = sum(_integers(config.get("num_vq_embeddings")))
    code_width = _integers(config.get("vq_embed_dim")) or _integers(config.get("latent_channels")) or [1]
    return convolutions + classes * time_width[0] + codes * code_width[0]


def check_network_types(config: Mapping[str, Any], name: str) -> None:
    """Refuse the values that a network would fail on with an error about something else.

    Args:
        config: from a file of a saved network.
        name: the file, for messages.

    Raises:
        ConfigError: a count is no integer of at least 1, a word is unknown, or a flag or number is not one.
    """
    for key in NEVER_NULL:
        if key in config and config[key] is None:
            raise ConfigError(f"{name}: {key} is null; write a value, or leave it out for Diffusers' default.")
    for key, largest in COUNTS.items():
        value = config.get(key)
        level, least = [] if value is None else [value], 0 if key in LAYERS_OF_SIDES else 1
        if value in ([], ()):
            raise ConfigError(f"{name}: {key} is empty; it must be a list of integers.")
        while level:
            entry = level.pop()
            if isinstance(entry, (list, tuple)):
                level += entry
            elif entry is not None and (type(entry) is not int or not least <= entry <= largest):
                shown = printable(repr(entry), 60)
                raise ConfigError(f"{name}: {key} has {shown}; allowed: integers from {least} to {largest:,}.")
    for key in ("down_block_types", "up_block_types"):
        value = config.get(key)
        names = isinstance(value, (list, tuple)) and value and all(isinstance(entry, str) for entry in value)
        if value is not None and not names:
            raise ConfigError(f"{name}: {key} is {printable(repr(value), 60)}, not a list of names.")
    for key, words in WORDS.items():
        if config.get(key) is not None and config[key] not in words:
            shown = printable(repr(config[key]), 60)
            raise ConfigError(f"{name}: {key} is {shown}; allowed: {', '.join(words)}, or null.")
    for key in FLAGS:
        value = config.get(key)
        entries = value if isinstance(value, list | tuple) and value and key == "only_cross_attention" else [value]
        if not all(entry is None or isinstance(entry, bool) for entry in entries):
            raise ConfigError(f"{name}: {key} is {printable(repr(value), 60)}; allowed: true, false, or null.")
    for key in NUMBERS:
        if config.get(key) is not None:
            JsonObject(name, dict(config)).number(key)


def physical_memory() -> float:
    """Bytes of this machine's memory; infinite where that is unknown."""
    with suppress(ValueError, OSError, AttributeError):
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return math.inf

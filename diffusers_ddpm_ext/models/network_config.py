"""Checks of a network's configuration from outside, before anything is built from it: types, sizes, parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.utils.input_files import JsonObject

MAX_WIDTH = 2**16
MAX_LEVELS = 32
MAX_LAYERS = 1000
"""Residual blocks of the whole encoder: released networks have at most 24, and each takes a millisecond to build."""
# Key -> its largest value. Each is an integer of at least 1, a list of such integers where a network may have one per
# level, or null where the default is.
INTEGERS = {
    "in_channels": MAX_WIDTH,
    "out_channels": MAX_WIDTH,
    "time_embedding_dim": MAX_WIDTH,
    "attention_head_dim": MAX_WIDTH,
    "num_attention_heads": MAX_WIDTH,
    "num_attention_heads_up": MAX_WIDTH,
    "norm_num_groups": MAX_WIDTH,
    "attn_norm_num_groups": MAX_WIDTH,
    "cross_attention_dim": MAX_WIDTH,
    "encoder_hid_dim": MAX_WIDTH,
    "addition_time_embed_dim": MAX_WIDTH,
    "addition_embed_type_num_heads": MAX_WIDTH,
    "time_cond_proj_dim": MAX_WIDTH,
    "projection_class_embeddings_input_dim": 2**20,
    "num_class_embeds": 10**7,
    "num_train_timesteps": 10**6,
    "transformer_layers_per_block": 64,
    "conv_in_kernel": 63,
    "conv_out_kernel": 63,
}
NAMES = ("down_block_types", "up_block_types")


def check_network_config(config: Mapping[str, Any], name: str) -> None:
    """Check the values that decide how large a network is and how long it takes to build.

    Args:
        config: the keys of a Diffusers network.
        name: how messages call it.

    Raises:
        ConfigError: a value is of another type, or out of any range that makes sense.
    """
    widths = _integers(config, "block_out_channels", name, MAX_WIDTH)
    if widths is not None and not 1 <= len(widths) <= MAX_LEVELS:
        raise ConfigError(f"{name}: block_out_channels has {len(widths):,} entries; allowed: 1 to {MAX_LEVELS}.")
    layers = _integers(config, "layers_per_block", name, MAX_LAYERS)
    if layers is not None and sum(layers) * (len(widths or ()) if len(layers) == 1 else 1) > MAX_LAYERS:
        raise ConfigError(f"{name}: layers_per_block makes over {MAX_LAYERS:,} layers.")
    for key, largest in INTEGERS.items():
        _integers(config, key, name, largest)
    for key in NAMES:
        value = config.get(key)
        is_names = isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value)
        if value is not None and not (is_names and 1 <= len(value) <= MAX_LEVELS):
            raise ConfigError(f"{name}: {key} is {_shown(value)}, not a list of 1 to {MAX_LEVELS} names.")
    for key in ("dropout", "norm_eps", "mid_block_scale_factor", "timestep_scale"):
        if key in config:
            JsonObject(name, dict(config)).number(key)


def _integers(config: Mapping[str, Any], key: str, name: str, largest: int) -> list[int] | None:
    """The integers of a key, one or several, in lists of any depth; None for a missing key or null."""
    if config.get(key) is None:
        return None
    found: list[int] = []
    level = [config[key]]
    while level:
        value = level.pop()
        if isinstance(value, (list, tuple)):
            level += value
        elif isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= largest:
            found.append(value)
        elif value is not None:
            raise ConfigError(f"{name}: {key} has {_shown(value)}; allowed: integers from 1 to {largest:,}.")
    return found


def least_parameters(config: Mapping[str, Any]) -> int:
    """A number of parameters that a checked configuration exceeds: the second convolutions of the encoder's layers.

    With a table of classes, its entries too.
    """
    widths = [width for width in config.get("block_out_channels") or () if isinstance(width, int)]
    layers = config.get("layers_per_block") or 1
    per_level = layers if isinstance(layers, (list, tuple)) else [layers] * len(widths)
    convolutions = sum(9 * count * width**2 for count, width in zip(per_level, widths, strict=False))
    embedded = 0 if config.get("class_embed_type") else config.get("num_class_embeds") or 0
    return convolutions + embedded * (config.get("time_embedding_dim") or 4 * (widths or [1])[0])


def _shown(value: Any) -> str:
    return printable(repr(value), 60)

"""Checks of a text encoder's folder before Transformers loads it: each fault one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.utils.input_files import JsonObject, read_json_object
from diffusers_ddpm_ext.utils.network_budget import physical_memory
from diffusers_ddpm_ext.utils.network_folder import check_weights_files

MAX_WIDTH, MAX_LAYERS, MAX_VOCABULARY, MAX_POSITIONS = 65_536, 512, 10_000_000, 1_000_000
LIMITS = (
    dict.fromkeys(
        (
            *("hidden_size", "intermediate_size", "num_attention_heads", "projection_dim", "d_model", "d_ff", "d_kv"),
            *("num_heads", "encoder_ffn_dim", "encoder_attention_heads", "head_dim", "relative_attention_num_buckets"),
        ),
        MAX_WIDTH,
    )
    | dict.fromkeys(("num_hidden_layers", "encoder_layers", "num_layers"), MAX_LAYERS)
    | {"vocab_size": MAX_VOCABULARY, "max_position_embeddings": MAX_POSITIONS}
)
"""Counts of a text encoder's configuration -> their largest values."""
WIDTHS, LAYERS = ("hidden_size", "d_model"), ("num_hidden_layers", "encoder_layers", "num_layers")


def check_text_encoder_folder(folder: Path, variant: str | None = None) -> JsonObject:
    """Check a text encoder's configuration, the indexes of its weights, and that these can be of such a network.

    Args:
        folder: with ``config.json`` and weights.
        variant: of the weights that will be loaded.

    Returns:
        The configuration.

    Raises:
        ConfigError: a file is missing or damaged, or describes something absurdly large.
    """
    config = read_json_object(folder / "config.json")
    inner = config.content.get("text_config")
    settings = inner if isinstance(inner, dict) and config.content.get("model_type") == "clip" else config.content
    check_settings(config.name, settings)
    check_weights_files(folder, variant, least_parameters(settings), f"{config.name} describes a text encoder")
    return config


def check_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Check the counts of a text encoder's configuration.

    Args:
        name: of the file or option, for messages.
        settings: the configuration.

    Raises:
        ConfigError: a count is none, or the network does not fit into this machine's memory.
    """
    for key, largest in LIMITS.items():
        value = settings.get(key)
        if value is not None and (type(value) is not int or not 1 <= value <= largest):
            shown = printable(repr(value), 60)
            raise ConfigError(f"{name}: {key} is {shown}; it must be an integer from 1 to {largest:,}.")
    least = least_parameters(settings)
    if 4 * least > physical_memory():
        raise ConfigError(f"{name}: the weights take at least {4 * least / 1e9:,.0f} GB, more than this machine has.")


def least_parameters(settings: Mapping[str, Any]) -> int:
    """A lower bound of a text encoder's number of parameters: its table of tokens, and a square for each layer."""
    width = next((settings[key] for key in WIDTHS if settings.get(key) is not None), 1)
    layers = next((settings[key] for key in LAYERS if settings.get(key) is not None), 0)
    return int(width * (settings.get("vocab_size") or 0) + layers * width * width)

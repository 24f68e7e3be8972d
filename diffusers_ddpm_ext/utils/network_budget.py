"""Budget of a network's configuration: refused before it is built, since building takes the memory and the time."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError

MAX_LEVELS = 16  # each halves the image: the last one of 65,536 pixels has 2
MAX_LAYERS = 64
MAX_WIDTH = 65_536
MAX_CLASSES = 1_000_000


def check_network_config(config: Mapping[str, Any], name: str) -> None:
    """Refuse a network's configuration that asks for more than any machine should build.

    Values of another type than expected are left to the network's own checks.

    Args:
        config: of a `UNet2DModel` or `UNet2DConditionModel`.
        name: the option or file, for messages.

    Raises:
        ConfigError: a count is out of range, or the weights alone do not fit into this machine's memory.
    """
    widths, layers = _integers(config.get("block_out_channels")), _integers(config.get("layers_per_block"))
    for key in ("block_out_channels", "down_block_types", "up_block_types"):
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
    needed, memory = 4 * _least_parameters(widths, layers), physical_memory()
    if needed > memory:
        raise ConfigError(
            f"{name}: the weights take at least {needed / 1e9:,.0f} GB, and this machine has {memory / 1e9:,.0f} GB:"
            " use smaller block_out_channels"
        )


def _integers(value: Any) -> list[int]:
    """The integers of a setting that is one, or a list of them."""
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return [entry for entry in values if isinstance(entry, int) and not isinstance(entry, bool)]


def _least_parameters(widths: Sequence[int], layers: Sequence[int]) -> int:
    """Lower bound of the number of weights: one 3x3 convolution for each layer of the way down and of the way up."""
    return sum(2 * 9 * width * width * min(layers, default=1) for width in widths)


def physical_memory() -> float:
    """Bytes of this machine's memory; infinite where that is unknown."""
    with suppress(ValueError, OSError, AttributeError):
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return math.inf

"""Sizes of a stage's network, from the shapes of its tensors, and what shapes do not tell, from its ``version``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusers_ddpm_ext.compvis.schema import POSITIVE_INT, WIDTH, ValueType, check_values, number, one_line, whole
from diffusers_ddpm_ext.errors import printable
from diffusers_ddpm_ext.utils.input_files import read_json_object
from diffusers_ddpm_ext.utils.network_budget import MAX_LAYERS

LENGTH = whole(2**15)
"""Of prompts, in tokens."""
HEAD_WIDTH = 64  # of all released CLIP text encoders


def one_of(*names: str) -> ValueType:
    """Names of a list."""
    return ValueType(f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names)


# Settings of a config.json that count here.
KNOWN_TYPES = {
    "hidden_size": WIDTH,
    "num_attention_heads": POSITIVE_INT,
    "hidden_act": one_of("quick_gelu", "gelu"),
    "layer_norm_eps": number(0, 1, exclusive=True),
    "relative_attention_max_distance": LENGTH,
    "layer_norm_epsilon": number(0, 1, exclusive=True),
    "feed_forward_proj": one_of("relu", "gated-gelu", "gated-silu"),
}


def size_of(tensors: Mapping[str, Tensor], name: str, axis: int) -> int:
    """A side of a matrix.

    Raises:
        ValueError: the tensor is missing, or no matrix.
    """
    if name not in tensors:
        raise ValueError(
            f"The checkpoint lacks {name} of the conditioning stage that the configuration describes: give the "
            "configuration that belongs to it."
        )
    shape = tuple(tensors[name].shape)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(
            f"The checkpoint's {name} has shape {shape}; a conditioning stage has a matrix there: the file is damaged."
        )
    return int(shape[axis])


def count_layers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Number of layers: 1 + the largest index after ``prefix`` in a key.

    Raises:
        ValueError: there are none, or implausibly many.
    """
    indices = [name[len(prefix) :].partition(".")[0] for name in tensors if name.startswith(prefix)]
    count = 1 + max((int(index) for index in indices if index.isdecimal() and len(index) < 6), default=-1)
    if not 0 < count <= MAX_LAYERS:
        raise ValueError(
            f"The checkpoint has {count} layers under {prefix} of its conditioning stage; it must be from 1 to "
            f"{MAX_LAYERS}: give the configuration that belongs to it."
        )
    return count


def head_count(width: int, known: Any, key: str) -> int:
    """Number of attention heads, which no shape tells: the known one, else heads of 64 channels.

    Args:
        width: of the encoder.
        known: the number, if something tells it.
        key: what tells it, or may do so.

    Raises:
        ValueError: the number does not divide the width, or is not known.
    """
    if known is None and width > HEAD_WIDTH and width % HEAD_WIDTH:
        raise ValueError(
            f"The number of attention heads of an encoder of width {width} is not known: give it with {key}."
        )
    heads = max(1, width // HEAD_WIDTH) if known is None else known
    if type(heads) is not int or heads < 1 or width % heads:
        raise ValueError(
            f"{one_line(heads)} attention heads ({key}) do not divide the width {width} of the encoder in the "
            "checkpoint: give the number that belongs to it."
        )
    return heads


def folder_config(version: Any, section: str) -> dict[str, Any]:
    """The ``config.json`` of an encoder, if ``version`` names a folder with one; else nothing.

    Args:
        version: an id on the Hub, or a folder.
        section: of the file that counts, if the file has it, such as ``text_config``.

    Raises:
        ValueError: the file cannot be read.
    """
    path = Path(str(version), "config.json")
    try:
        if version is None or not path.is_file():
            return {}
    except (OSError, ValueError):
        return {}
    content = read_json_object(path).content
    inner = content.get(section, content)
    if not isinstance(inner, dict):
        raise ValueError(f"{printable(str(path), 200)}: {section} must be an object.")
    return check_values(inner, KNOWN_TYPES, f"{printable(str(path), 200)}: ")

"""Class embedder: the table from a class to a token of cross attention, saved next to a pipeline's components.

class_embedder/config.json                            {"format": 1, "num_classes", "dim"}
class_embedder/diffusion_pytorch_model.safetensors    class_embedder: (num_classes, dim), float32
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.utils.array_files import read_tensors
from diffusers_ddpm_ext.utils.input_files import check_folder, exists, file_name, read_json_object

CLASS_EMBEDDER_FOLDER = "class_embedder"
_CONFIG = "config.json"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_KEY = "class_embedder"
_FORMAT = 1


def save_class_embedder(folder: str | os.PathLike[str], table: Tensor) -> None:
    """Write the table.

    Args:
        folder: of the pipeline.
        table: (num_classes, dim), floating.

    Raises:
        ValueError: ``table`` has another form.
    """
    if table.ndim != 2 or not table.is_floating_point():
        raise ValueError(f"class_embedder must be a floating tensor (num_classes, dim), got {tuple(table.shape)}.")
    place = Path(folder) / CLASS_EMBEDDER_FOLDER
    place.mkdir(parents=True, exist_ok=True)
    values = table.detach().to("cpu", torch.float32).contiguous()
    (place / _WEIGHTS).write_bytes(save({_KEY: values}, metadata={"format": "pt"}))
    config = {"format": _FORMAT, "num_classes": len(table), "dim": table.shape[1]}
    (place / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_class_embedder(folder: str | os.PathLike[str]) -> Tensor | None:
    """Read the table.

    Args:
        folder: of the pipeline.

    Returns:
        (num_classes, dim), float32, on the CPU; None if the folder has none.

    Raises:
        ValueError: the folder does not exist, or a file is missing or damaged; the message names it.
    """
    place = check_folder(folder) / CLASS_EMBEDDER_FOLDER
    if not exists(place):
        return None
    config = read_json_object(check_folder(place) / _CONFIG)
    if config.integer("format") != _FORMAT:
        raise ConfigError(f'{config.name} must have "format": {_FORMAT}; a newer version may read it.')
    shape = (config.integer("num_classes", low=1), config.integer("dim", low=1))
    path = place / _WEIGHTS
    table = read_tensors(path).get(_KEY)
    if table is None or not table.is_floating_point():
        raise ConfigError(f"{file_name(path)} has no floating tensor {_KEY!r}.")
    if tuple(table.shape) != shape:
        raise ConfigError(f"{file_name(path)} has shape {tuple(table.shape)}, its config has {shape}.")
    table = table.float()
    if not bool(torch.isfinite(table).all()):
        raise ConfigError(f"{file_name(path)} holds values that are not finite.")
    return table

"""Class embedder: the table from a class to a token of cross attention, saved next to a pipeline's components.

class_embedder/config.json                            {"format": 1, "num_classes", "dim"}
class_embedder/diffusion_pytorch_model.safetensors    class_embedder: (num_classes, dim), float32
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

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
    """
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
        ValueError: a file is missing or damaged; the message names it.
    """
    place = Path(folder) / CLASS_EMBEDDER_FOLDER
    if not (place / _CONFIG).is_file():
        return None
    try:
        config = json.loads((place / _CONFIG).read_text(encoding="utf-8"))
        shape = (config["num_classes"], config["dim"])
        if config["format"] != _FORMAT:
            raise ValueError(f'it has "format": {config["format"]}, this version reads {_FORMAT}')
        table = load((place / _WEIGHTS).read_bytes())[_KEY]
    except Exception as error:  # safetensors' own error class differs between its versions
        raise ValueError(f"{place} cannot be read: {error}") from error
    if tuple(table.shape) != shape:
        raise ValueError(f"{place / _WEIGHTS} has shape {tuple(table.shape)}, its config has {shape}.")
    return table.float()

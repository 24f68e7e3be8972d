"""The table that turns a class into a token of cross attention, kept beside a pipeline's components.

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

FOLDER = "class_embedder"
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
KEY = "class_embedder"
FORMAT = 1


def save_class_embedder(folder: str | os.PathLike[str], table: Tensor) -> None:
    """Write the table.

    Args:
        folder: of the pipeline.
        table: (num_classes, dim), floating.
    """
    place = Path(folder) / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    values = table.detach().to("cpu", torch.float32).contiguous()
    (place / WEIGHTS_NAME).write_bytes(save({KEY: values}, metadata={"format": "pt"}))
    config = {"format": FORMAT, "num_classes": len(table), "dim": table.shape[1]}
    (place / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_class_embedder(folder: str | os.PathLike[str]) -> Tensor | None:
    """Read the table.

    Args:
        folder: of the pipeline.

    Returns:
        (num_classes, dim), float32, on the CPU; None where there is none.

    Raises:
        ValueError: a file is missing or damaged; the message names it.
    """
    place = Path(folder) / FOLDER
    if not (place / CONFIG_NAME).is_file():
        return None
    try:
        config = json.loads((place / CONFIG_NAME).read_text(encoding="utf-8"))
        shape = (config["num_classes"], config["dim"])
        if config["format"] != FORMAT:
            raise ValueError(f'it says "format": {config["format"]}, this version reads {FORMAT}')
        table = load((place / WEIGHTS_NAME).read_bytes())[KEY]
    except Exception as error:  # safetensors' own error class differs between its versions
        raise ValueError(f"{place} cannot be read: {error}") from error
    if tuple(table.shape) != shape:
        raise ValueError(f"{place / WEIGHTS_NAME} has shape {tuple(table.shape)}, its config says {shape}.")
    return table.float()

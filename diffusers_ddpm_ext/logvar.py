"""The log-variance table of LatentDiffusion: one number per training step, fixed or learned.

Training minimises ``loss / exp(logvar[t]) + logvar[t]``, whose minimum over logvar lies at the log of step t's
expected loss: a learned table is an estimate of the network's log loss per step ([LDM] Rombach et al. 2022, code).

File format 1, a folder ``logvar/`` beside a pipeline's components: ``config.json`` with ``format`` and
``num_train_timesteps``, and ``diffusion_pytorch_model.safetensors`` with the key ``logvar``, float32 (T,).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

FORMAT = 1
FOLDER = "logvar"
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
KEY = "logvar"


def make_logvar(num_train_timesteps: int, init: float | Tensor = 0.0) -> Tensor:
    """A new table.

    Args:
        num_train_timesteps: T.
        init: one value for all steps, or a table (T,) to start from, which is copied.

    Returns:
        float32, (T,).

    Raises:
        ValueError: ``init`` has another length than T, or is not finite.
    """
    table = torch.as_tensor(init, dtype=torch.float32).detach()
    if table.ndim == 0:
        table = table.expand(num_train_timesteps)
    if table.shape != (num_train_timesteps,):
        raise ValueError(
            f"logvar_init must be one number or a table of {num_train_timesteps}, got shape {tuple(table.shape)}."
        )
    if not bool(torch.isfinite(table).all()):
        raise ValueError(f"logvar_init={init!r} must be finite; the usual value is 0.")
    return table.clone()


def save_logvar(folder: str | os.PathLike[str], table: Tensor, **meta: Any) -> Path:
    """Write a table beside a pipeline's components.

    Args:
        folder: the pipeline's folder; ``logvar/`` is made in it.
        table: (T,), floating, any device.
        **meta: further entries of ``config.json``, JSON values.

    Returns:
        The folder ``logvar/``.

    Raises:
        ValueError: ``table`` is not a floating tensor of one axis.
    """
    if table.ndim != 1 or not table.is_floating_point():
        raise ValueError(f"logvar must be a floating tensor (T,), got {table.dtype} of shape {tuple(table.shape)}.")
    place = Path(folder) / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    config = {**meta, "format": FORMAT, "num_train_timesteps": len(table)}
    values = table.detach().to("cpu", torch.float32).contiguous()
    (place / WEIGHTS_NAME).write_bytes(save({KEY: values}, metadata={"format": "pt"}))
    (place / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return place


def load_logvar(folder: str | os.PathLike[str], num_train_timesteps: int | None = None) -> Tensor | None:
    """Read a table that :func:`save_logvar` wrote. No pickle is opened.

    Args:
        folder: the pipeline's folder, the parent of ``logvar/``.
        num_train_timesteps: T that the table must have; None for the one that its own ``config.json`` names.

    Returns:
        float32, (T,), on the CPU; None when the folder holds no ``logvar/``.

    Raises:
        ValueError: a file is missing, damaged, of another format or of another length; the message names the file.
    """
    place = Path(folder) / FOLDER
    if not place.is_dir():
        return None
    length = _read_length(place / CONFIG_NAME)
    path = place / WEIGHTS_NAME
    try:
        tensors = load(path.read_bytes())
    except Exception as error:  # safetensors' own error class differs between its versions
        raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from error
    table = tensors.get(KEY)
    if table is None or table.ndim != 1 or not table.is_floating_point():
        raise ValueError(f"{path} must hold one floating tensor (T,) under the key {KEY!r}, found {sorted(tensors)}.")
    for owner, expected in ((place / CONFIG_NAME, length), ("the scheduler", num_train_timesteps)):
        if expected is not None and len(table) != expected:
            raise ValueError(f"{path} holds {len(table)} steps, but {owner} says {expected}.")
    table = table.to(torch.float32)
    if not bool(torch.isfinite(table).all()):
        raise ValueError(f"{path} holds values that are not finite.")
    return table


def _read_length(path: Path) -> int:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f'{path} must say "format": {FORMAT}; a newer version of this package may read it.')
    length = config.get("num_train_timesteps")
    if not isinstance(length, int):
        raise ValueError(f"{path} must name num_train_timesteps, the number of steps, got {length!r}.")
    return length

"""Reading the folder ``logvar/`` of a pipeline without torch; the format is that of `losses/logvar.py`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffusers_ddpm_ext.diffusion.schedule import MAX_TRAIN_TIMESTEPS
from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.utils.input_files import JsonObject, check_folder, exists, file_name, read_json_object
from diffusers_ddpm_ext.utils.tensor_files import FLOATS, read_floats, read_tensor_headers

LOGVAR_FORMAT = 1
LOGVAR_FOLDER = "logvar"
LOGVAR_CONFIG_NAME = "config.json"
LOGVAR_WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
LOGVAR_KEY = "logvar"


def read_logvar(folder: str | os.PathLike[str], num_train_timesteps: int | None = None) -> NDArray[np.float32] | None:
    """Read a table that `save_logvar` wrote.

    Args:
        folder: the pipeline's folder, the parent of ``logvar/``.
        num_train_timesteps: T that the table must have; None for that of its ``config.json``.

    Returns:
        float32, (T,); None if the folder exists and has no ``logvar/``.

    Raises:
        ValueError: the folder does not exist, or a file is missing, damaged, of another format or of another length;
            the message names it.
    """
    source = logvar_folder(folder)
    if source is None:
        return None
    config = read_logvar_config(source)
    length = config.integer("num_train_timesteps", low=1, high=MAX_TRAIN_TIMESTEPS)
    path = source / LOGVAR_WEIGHTS_NAME
    tensors = read_tensor_headers(path)
    stored = tensors.get(LOGVAR_KEY)
    if stored is None or len(stored.shape) != 1 or stored.dtype not in FLOATS:
        names = printable(str(sorted(tensors)), 200)
        raise ConfigError(
            f"{file_name(path)} must hold one floating tensor (T,) under the key {LOGVAR_KEY!r}, got {names}."
        )
    for owner, expected in ((config.name, length), ("the scheduler", num_train_timesteps)):
        if expected is not None and stored.shape[0] != expected:
            raise ConfigError(f"{file_name(path)} holds {stored.shape[0]} steps, but {owner} says {expected}.")
    with np.errstate(over="ignore"):  # what float32 cannot hold is not finite
        table = read_floats(path, stored).astype(np.float32)
    if not np.isfinite(table).all():
        raise ConfigError(f"{file_name(path)} holds values that are not finite.")
    return table


def logvar_folder(folder: str | os.PathLike[str]) -> Path | None:
    """``logvar/`` of a pipeline's folder, which must exist; None if there is none in it.

    Raises:
        ConfigError: the folder does not exist, or is ``logvar/`` itself.
    """
    source = check_folder(folder) / LOGVAR_FOLDER
    if exists(source):
        return check_folder(source)
    if source.parent.name == LOGVAR_FOLDER and exists(source.parent / LOGVAR_CONFIG_NAME):
        raise ConfigError(f"{file_name(folder)} is the folder of the log-variances: give the pipeline's, its parent.")
    return None


def read_logvar_config(source: Path) -> JsonObject:
    """``config.json`` of a folder ``logvar/``; ConfigError if it is damaged or of another format."""
    config = read_json_object(source / LOGVAR_CONFIG_NAME)
    if config.integer("format") != LOGVAR_FORMAT:
        raise ConfigError(f'{config.name} must have "format": {LOGVAR_FORMAT}; a newer version may read it.')
    return config

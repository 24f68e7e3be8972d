"""Stored embeddings of images for cross attention: arrays (tokens, width) in files or in columns."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.training.data.image_files import RemoteFile, locate
from diffusers_ddpm_ext.utils.array_files import read_array, read_tensors

SUFFIXES = (".npy", ".safetensors")


def read_embedding(row: str, cell: Any) -> np.ndarray:
    """Read an embedding.

    Args:
        row: the option, the column and the image, for messages.
        cell: a file (.npy, or .safetensors with one array), also in a file system of `fsspec`; or numbers in lists.

    Returns:
        (tokens, width), float32; one row of numbers is one token.

    Raises:
        ConfigError: it cannot be read, is empty, has other dimensions, or holds anything but real, finite numbers that
            float32 can hold.
    """
    cell = locate(cell) if isinstance(cell, str) else cell
    try:
        values = _read_file(cell) if isinstance(cell, Path | RemoteFile) else _read_lists(cell)
    except ConfigError as error:
        raise ConfigError(f"{row} cannot be read as an embedding: {error}") from None
    if values.dtype.kind not in "iuf":
        raise ConfigError(f"{row} has an embedding of type {values.dtype}: it must hold real numbers")
    values = values[None] if values.ndim == 1 else values
    if values.ndim != 2 or not values.size:
        raise ConfigError(f"{row} has an embedding of shape {values.shape}: it must be (tokens, width), not empty")
    if not np.isfinite(values).all():
        raise ConfigError(f"{row} has an embedding with NaN or infinite values")
    with np.errstate(over="ignore"):
        result = np.ascontiguousarray(values, dtype=np.float32)
    if not np.isfinite(result).all():
        largest = np.abs(values).max()
        raise ConfigError(f"{row} has an embedding with a value of {largest:g}, which float32 cannot hold: scale it")
    return result


def _read_file(file: Path | RemoteFile) -> np.ndarray:
    """The array of a file; one of another file system is copied to this machine first."""
    path = file.url if isinstance(file, RemoteFile) else str(file)
    inner = path.partition("::")[0] if isinstance(file, RemoteFile) else path
    suffix = Path(inner.partition("?")[0]).suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(f"{printable(path, 200)} is not a .npy or .safetensors file")
    if isinstance(file, Path):
        return _read_local(file, suffix)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, f"embedding{suffix}")
        copy.write_bytes(file.read())
        return _read_local(copy, suffix)


def _read_local(path: Path, suffix: str) -> np.ndarray:
    if suffix == ".npy":
        return read_array(path)
    tensors = read_tensors(path)
    if len(tensors) != 1:
        raise ConfigError(f"{printable(path.name, 200)} holds {len(tensors)} arrays: it must hold one")
    tensor = next(iter(tensors.values()))
    if tensor.is_complex() or tensor.dtype.itemsize < 1:
        raise ConfigError(f"{printable(path.name, 200)} holds values of type {tensor.dtype}, not real numbers")
    return tensor.numpy() if tensor.dtype.itemsize > 2 or not tensor.is_floating_point() else tensor.float().numpy()


def _read_lists(cell: Any) -> np.ndarray:
    """Nested lists of numbers as an array, of any type that NumPy finds in them."""
    if cell is None or isinstance(cell, dict | set):
        raise ConfigError("there is none" if cell is None else f"it is a {type(cell).__name__}")
    try:
        return np.asarray(cell)
    except (ValueError, TypeError, OverflowError) as error:  # lists of different lengths
        raise ConfigError(printable(" ".join(str(error).split()), 200)) from None

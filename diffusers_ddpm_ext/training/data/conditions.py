"""Conditions of a run's images: class labels, images joined to the input, stored embeddings.

Each condition is read once for all images, from the column of their source that its option names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.models.conditioning import REQUIRED_CONDITIONS
from diffusers_ddpm_ext.training.config.options import DataOptions
from diffusers_ddpm_ext.training.data.decoding import Preprocessing
from diffusers_ddpm_ext.training.data.image_store import ImageStore, decode_source
from diffusers_ddpm_ext.training.data.sources import Source, payload_of_cell

COLUMN_OPTIONS = {
    "class_labels": "class_column",
    "concat_inputs": "concat_column",
    "encoder_hidden_states": "context_column",
}
MEMORY_LIMIT_OF_JOINED_IMAGES = 2**31  # bytes


@dataclass(frozen=True)
class ConditionColumns:
    """Conditions of all loaded images, in their order.

    Attributes:
        labels: (n,), int64, or (n, width), float32; None without labels.
        class_names: of the classes, if labels are classes.
        concat: images joined to the input; None without them.
        contexts: (tokens, width), float32, for each image; None without them.
        fingerprint: sha256 over all of it, in hexadecimal.
    """

    labels: Tensor | None
    class_names: Sequence[str]
    concat: ImageStore | None
    contexts: Sequence[np.ndarray] | None
    fingerprint: str

    @property
    def label_width(self) -> int | None:
        """Width of labels that are vectors, None for classes."""
        return None if self.labels is None or not self.labels.is_floating_point() else int(self.labels.shape[1])


@dataclass(frozen=True)
class _CellImages:
    """The images in a column, as a source for `decode_source`."""

    option: str
    names: Sequence[str]
    cells: Sequence[Any]

    def payload(self, index: int) -> bytes | Path | None:
        return payload_of_cell(self.cells[index])


def select_columns(
    conditioning_key: str | None, options: DataOptions, default_class_column: str | None
) -> dict[str, str]:
    """Column of each condition that a run needs.

    Raises:
        ConfigError: a column is missing, or named without effect.
    """
    columns: dict[str, str] = {}
    for condition, option in COLUMN_OPTIONS.items():
        column = getattr(options, option)
        if condition in REQUIRED_CONDITIONS[conditioning_key]:
            column = default_class_column if column is None and condition == "class_labels" else column
            if column is None:
                raise ConfigError(
                    f"--conditioning_key {conditioning_key} needs --{option}: the column with its {condition}"
                )
            columns[condition] = column
        elif column is not None:
            raise ConfigError(
                f"--{option} {column} has no effect with --conditioning_key {conditioning_key or 'none'}"
            )
    return columns


def load_conditions(
    source: Source,
    names: Sequence[str],
    columns: Mapping[str, str],
    preprocessing: Preprocessing,
    class_names: Sequence[str] | None = None,
) -> ConditionColumns | None:
    """Load what the images are conditioned on.

    Args:
        source: of the images.
        names: of the loaded images, in their order.
        columns: from `select_columns`; without any the result is None.
        preprocessing: of the images; its size and crop also apply to images joined to them.
        class_names: of the training images, for validation images.

    Raises:
        ConfigError: a value cannot be used; the image is named.
    """
    if not columns:
        return None
    digest = hashlib.sha256()
    labels, all_class_names, concat, contexts = None, list(class_names or ()), None, None
    for condition, column in columns.items():
        values = source.read_column(column)
        cells = [values[name] for name in names]
        if condition == "class_labels":
            labels, all_class_names = _labels(column, names, cells, class_names)
            digest.update(labels.numpy().tobytes())
        elif condition == "concat_inputs":
            own_channels = Preprocessing(preprocessing.size, None, preprocessing.center_crop)
            images = _CellImages(f"--concat_column {column}", names, cells)
            loaded = decode_source(images, own_channels, skip_bad=False, memory_limit=MEMORY_LIMIT_OF_JOINED_IMAGES)
            concat = loaded.images
            digest.update(loaded.fingerprint.encode())
        else:
            contexts = [_context(column, name, cell) for name, cell in zip(names, cells, strict=True)]
            if len({context.shape for context in contexts}) != 1:
                raise ConfigError(
                    f"--context_column {column}: the embeddings are not all of one shape (tokens, width)"
                )
            for context in contexts:
                digest.update(context.tobytes())
    return ConditionColumns(labels, all_class_names, concat, contexts, digest.hexdigest())


def _labels(
    column: str, images: Sequence[str], cells: Sequence[Any], class_names: Sequence[str] | None
) -> tuple[Tensor, list[str]]:
    """Labels and class names: integers are class numbers, lists and fractions vectors, other values class names.

    Class names are numbered in alphabetical order.
    """
    values = [_parse_number(cell) for cell in cells]
    if all(isinstance(value, int) for value in values):
        if min(values) < 0:
            raise ConfigError(
                f"--class_column {column}: {images[values.index(min(values))]!r} has the class {min(values)}"
            )
        return torch.tensor(values), [str(number) for number in range(max(values) + 1)]
    if all(isinstance(value, float | int | list) for value in values):
        try:
            vectors = torch.tensor(values, dtype=torch.float32)
        except (ValueError, TypeError):
            raise ConfigError(f"--class_column {column}: the vectors are not all of one width") from None
        return vectors[:, None] if vectors.ndim == 1 else vectors, []
    texts = [str(value) for value in values]
    names = list(class_names) if class_names is not None else sorted(set(texts))
    number_of = {name: number for number, name in enumerate(names)}
    for image, text in zip(images, texts, strict=True):
        if text not in number_of:
            raise ConfigError(
                f"--class_column {column}: {image!r} has the class {text!r}, which no training image has"
            )
    return torch.tensor([number_of[text] for text in texts]), names


def _parse_number(cell: Any) -> Any:
    """Numbers in a text file as numbers, tuples as lists, other values unchanged."""
    if isinstance(cell, str):
        for number_type in (int, float):
            try:
                return number_type(cell)
            except ValueError:
                continue
    return list(cell) if isinstance(cell, tuple) else cell


def _context(column: str, name: str, cell: Any) -> np.ndarray:
    label = f"--context_column {column}: {name!r}"
    try:
        array = _read_array(Path(cell)) if isinstance(cell, str | Path) else np.asarray(cell, dtype=np.float32)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{label} cannot be read as an embedding: {error}") from None
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or not array.size or not np.isfinite(array).all():
        raise ConfigError(f"{label} is not a finite array (tokens, width), but of shape {array.shape}")
    return np.ascontiguousarray(array, dtype=np.float32)


def _read_array(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        array: np.ndarray = np.load(path, allow_pickle=False)
        return array
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        tensors = load_file(path)
        if len(tensors) != 1:
            raise ValueError(f"{path.name} must contain one array")
        return next(iter(tensors.values()))
    raise ValueError(f"{path.name} is not a .npy or .safetensors file")

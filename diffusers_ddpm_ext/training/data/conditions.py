"""What the images of a run are conditioned on: classes, images that go in with them, stored embeddings.

A column is read once for all images. Where it comes from:

    the digits   their labels
    a folder     `folder`, the name of the folder an image lies in; or a column of metadata.csv or metadata.jsonl in
                 it, whose column file_name says which image a row is for (the format of Hugging Face's image folders)
    a dataset    its column
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
from diffusers_ddpm_ext.training.data.condition_tables import OF_FOLDER, Table
from diffusers_ddpm_ext.training.data.decoding import Preparation
from diffusers_ddpm_ext.training.data.image_store import Images, read

OPTION = {"class_labels": "class_column", "concat_inputs": "concat_column", "encoder_hidden_states": "context_column"}


@dataclass(frozen=True)
class ConditionColumns:
    """Conditions of all images that were read, in their order.

    Attributes:
        labels: (n,), int64, or (n, width), float32; None where there are none.
        class_names: of the classes, where labels are numbers.
        concat: images that are joined to the input; None where there are none.
        contexts: (tokens, width), float32, of each image; None where there are none.
        fingerprint: sha256 over all of it, in hexadecimal.
    """

    labels: Tensor | None
    class_names: Sequence[str]
    concat: Images | None
    contexts: Sequence[np.ndarray] | None
    fingerprint: str

    @property
    def label_width(self) -> int | None:
        """Width of a label that is no class."""
        return None if self.labels is None or not self.labels.is_floating_point() else int(self.labels.shape[1])

    @property
    def context_width(self) -> int | None:
        """Width of a token."""
        return None if self.contexts is None else int(self.contexts[0].shape[1])


@dataclass(frozen=True)
class _ColumnSource:
    """Images of a column, for the reader of images."""

    option: str
    names: Sequence[str]
    found: Sequence[Any]

    def payload(self, index: int) -> bytes | Path | None:
        cell = self.found[index]
        if isinstance(cell, Mapping):
            data, path = cell.get("bytes"), cell.get("path")
            return data if isinstance(data, bytes) else None if path is None else Path(str(path))
        return Path(cell) if isinstance(cell, str | Path) else None


def column_names(conditioning_key: str | None, options: DataOptions, *, digits: bool, folder: bool) -> dict[str, str]:
    """Say which columns a run needs.

    Args:
        conditioning_key: of the run.
        options: section ``data``.
        digits: whether the images are the digits.
        folder: whether they come from a folder.

    Returns:
        Condition to column.

    Raises:
        ConfigError: a column is missing, or named in vain.
    """
    needed = REQUIRED_CONDITIONS[conditioning_key]
    chosen: dict[str, str] = {}
    for condition, option in OPTION.items():
        given = getattr(options, option)
        if condition not in needed:
            if given is not None:
                raise ConfigError(
                    f"--{option} {given} has no effect with --conditioning_key {conditioning_key or 'none'}"
                )
            continue
        if given is None and condition == "class_labels":
            given = "digit" if digits else OF_FOLDER if folder else None
        if given is None:
            raise ConfigError(
                f"--conditioning_key {conditioning_key} needs --{option}: the column with its {condition}"
            )
        chosen[condition] = given
    return chosen


def read_columns(
    table: Table,
    kept: Sequence[str],
    wanted: Mapping[str, str],
    preparation: Preparation,
    vocabulary: Sequence[str] | None = None,
) -> ConditionColumns | None:
    """Read what the images are conditioned on.

    Args:
        table: where columns come from.
        kept: names of the images that were read, in their order.
        wanted: from `column_names`.
        preparation: of the images, which holds for images that are joined to them, too.
        vocabulary: names of the classes, where another set of images has them already.

    Returns:
        The columns; None where none is wanted.

    Raises:
        ConfigError: a cell cannot be used; the image is named.
    """
    if not wanted:
        return None
    digest = hashlib.sha256()
    labels, names, concat, contexts = None, list(vocabulary or ()), None, None
    for condition, column in wanted.items():
        cells = table.cells(column)
        found = [cells[name] for name in kept]
        if condition == "class_labels":
            labels, names = _labels(column, kept, found, vocabulary)
            digest.update(labels.numpy().tobytes())
        elif condition == "concat_inputs":
            plain = Preparation(preparation.size, None, preparation.center_crop)
            source = _ColumnSource(f"--concat_column {column}", kept, found)
            reading = read(source, plain, skip_bad=False, memory_limit=2**31)
            concat = reading.images
            digest.update(reading.fingerprint.encode())
        else:
            contexts = [_context(column, name, cell) for name, cell in zip(kept, found, strict=True)]
            widths = {context.shape[1] for context in contexts}
            if len(widths) != 1 or len({context.shape[0] for context in contexts}) != 1:
                raise ConfigError(
                    f"--context_column {column}: the embeddings are not all of one shape (tokens, width)"
                )
            for context in contexts:
                digest.update(context.tobytes())
    return ConditionColumns(labels, names, concat, contexts, digest.hexdigest())


def _labels(
    column: str, kept: Sequence[str], found: Sequence[Any], vocabulary: Sequence[str] | None
) -> tuple[Tensor, list[str]]:
    """Classes as numbers: numbers as they are, words in their alphabetical order; lists and fractions as vectors."""
    plain = [_number(cell) for cell in found]
    if all(isinstance(cell, int) for cell in plain):
        if min(plain) < 0:
            raise ConfigError(
                f"--class_column {column}: {kept[plain.index(min(plain))]!r} is of the class {min(plain)}"
            )
        return torch.tensor(plain), [str(number) for number in range(max(plain) + 1)]
    if all(isinstance(cell, float | int | list) for cell in plain):
        try:
            table = torch.tensor(plain, dtype=torch.float32)
        except (ValueError, TypeError):
            raise ConfigError(f"--class_column {column}: the vectors are not all of one width") from None
        return table[:, None] if table.ndim == 1 else table, []
    words = [str(cell) for cell in plain]
    names = list(vocabulary) if vocabulary is not None else sorted(set(words))
    place = {name: number for number, name in enumerate(names)}
    for image, word in zip(kept, words, strict=True):
        if word not in place:
            raise ConfigError(
                f"--class_column {column}: {image!r} is of the class {word!r}, which no training image is"
            )
    return torch.tensor([place[word] for word in words]), names


def _number(cell: Any) -> Any:
    """A cell of a text file that is a number, as one."""
    if isinstance(cell, str):
        for kind in (int, float):
            try:
                return kind(cell)
            except ValueError:
                continue
    return list(cell) if isinstance(cell, tuple) else cell


def _context(column: str, name: str, cell: Any) -> np.ndarray:
    told = f"--context_column {column}: {name!r}"
    try:
        table = _stored(Path(cell)) if isinstance(cell, str | Path) else np.asarray(cell, dtype=np.float32)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{told} cannot be read as an embedding: {error}") from None
    table = table[None] if table.ndim == 1 else table
    if table.ndim != 2 or not table.size or not np.isfinite(table).all():
        raise ConfigError(f"{told} is no finite array (tokens, width), but of shape {table.shape}")
    return np.ascontiguousarray(table, dtype=np.float32)


def _stored(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        found: np.ndarray = np.load(path, allow_pickle=False)
        return found
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        tensors = load_file(path)
        if len(tensors) != 1:
            raise ValueError(f"{path.name} must hold one array")
        return next(iter(tensors.values()))
    raise ValueError(f"{path.name} is no .npy or .safetensors file")

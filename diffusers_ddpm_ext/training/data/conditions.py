"""Conditions of a run's images: class labels, images joined to the input, stored embeddings, captions.

Each condition is read once for all images, from the column of their source that its option names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.training.config.condition_checks import COLUMN_OPTIONS
from diffusers_ddpm_ext.training.data.captions import CaptionColumn, CaptionReader
from diffusers_ddpm_ext.training.data.class_labels import ClassLabels, read_class_labels
from diffusers_ddpm_ext.training.data.decoding import Preprocessing
from diffusers_ddpm_ext.training.data.embeddings import read_embedding
from diffusers_ddpm_ext.training.data.image_files import Payload
from diffusers_ddpm_ext.training.data.image_store import ImageStore, decode_source
from diffusers_ddpm_ext.training.data.sources import ColumnSource, payload_of_cell
from diffusers_ddpm_ext.utils.network_budget import physical_memory

MEMORY_LIMIT_OF_JOINED_IMAGES = 2**31  # bytes
SCALE = "scale them (--data_range is of the images alone)"


@dataclass(frozen=True)
class ConditionColumns:
    """Conditions of all loaded images, in their order.

    Attributes:
        class_labels: the labels, and the names of classes; None without labels.
        concat: images joined to the input; None without them.
        contexts: (tokens, width), float32, for each image; None without them.
        fingerprint: sha256 over all of it, in hexadecimal.
        captions: the numbers of captions; None without them.
    """

    class_labels: ClassLabels | None
    concat: ImageStore | None
    contexts: Sequence[np.ndarray] | None
    fingerprint: str
    captions: CaptionColumn | None = None

    @property
    def labels(self) -> Tensor | None:
        """Labels of the images: (n,), int64, or (n, width), float32; None without labels."""
        return None if self.class_labels is None else self.class_labels.labels

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the classes by number, decimal digits where they have none; empty if labels are not classes."""
        return () if self.class_labels is None else self.class_labels.names

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

    def payload(self, index: int) -> Payload:
        return payload_of_cell(self.cells[index])


def load_conditions(
    source: ColumnSource,
    names: Sequence[str],
    columns: Mapping[str, str],
    preprocessing: Preprocessing,
    train: ConditionColumns | None = None,
    caption_reader: CaptionReader | None = None,
) -> ConditionColumns | None:
    """Load what the images are conditioned on.

    Args:
        source: of the images.
        names: of the loaded images, in their order.
        columns: from `select_columns`; without any the result is None.
        preprocessing: of the images; all but its channels also applies to images joined to them.
        train: conditions of the training images, for validation images: theirs are of the same classes and shapes.
        caption_reader: of the run's captions; None in a run without a text encoder.

    Raises:
        ConfigError: a value cannot be used; the image is named.
    """
    if not columns:
        return None
    digest = hashlib.sha256()
    labels, concat, contexts, captions = None, None, None, None
    for condition, column in columns.items():
        label = f"--{COLUMN_OPTIONS[condition]} {printable(column, 60)}"
        if condition == "class_labels":
            known = None if train is None else train.class_labels
            labels = read_class_labels(label, source.read_labels(column), names, known)
            digest.update(labels.labels.numpy().tobytes())
            continue
        if condition == "captions":
            texts = source.read_captions(column)
            if caption_reader is None:
                raise ConfigError(f"{label} needs --text_encoder: captions are tokenized and encoded by one")
            captions = caption_reader.read(label, texts, names)
            digest.update(captions.fingerprint.encode())
            continue
        values = source.read_files(column)
        cells = [values[name] for name in names]
        if condition == "concat_inputs":
            # Pictures of their own: in their channels, and in the full range of their dtype.
            own_channels = replace(
                preprocessing, channels=None, reading=replace(preprocessing.reading, data_range=None, range_hint=SCALE)
            )
            images = _CellImages(label, names, cells)
            loaded = decode_source(images, own_channels, skip_bad=False, memory_limit=MEMORY_LIMIT_OF_JOINED_IMAGES)
            concat = loaded.images
            digest.update(loaded.fingerprint.encode())
        else:
            contexts = read_embeddings(label, names, cells)
            for context in contexts:
                digest.update(context.tobytes())
    own = ConditionColumns(labels, concat, contexts, digest.hexdigest(), captions)
    if train is not None:
        _check_same_shapes(own, train)
    return own


def read_embeddings(label: str, images: Sequence[str], cells: Sequence[Any]) -> list[np.ndarray]:
    """Read an embedding (tokens, width) for each image, float32, all of one shape.

    Args:
        label: the option and the column, for messages.
        images: names of the images.
        cells: for each image, the file of its embedding, or its values.

    Raises:
        ConfigError: an embedding cannot be used, or all of them do not fit into memory; the image is named.
    """
    contexts: list[np.ndarray] = []
    for image, cell in zip(images, cells, strict=True):
        row = f"{label}: {printable(image)}"
        context = read_embedding(row, cell)
        if contexts and context.shape != contexts[0].shape:
            raise ConfigError(
                f"{row} has an embedding of shape {context.shape} and {printable(images[0])} one of"
                f" {contexts[0].shape}: all must have one shape (tokens, width)"
            )
        if not contexts and context.nbytes * len(images) > (memory := physical_memory()):
            raise ConfigError(
                f"{label}: {len(images):,} embeddings of shape {context.shape} take"
                f" {context.nbytes * len(images) / 1e9:,.1f} GB, more than this machine's {memory / 1e9:,.1f} GB"
            )
        contexts.append(context)
    return contexts


def check_precision(columns: ConditionColumns | None, mixed_precision: str) -> None:
    """Refuse conditions that the network's precision cannot hold.

    Raises:
        ConfigError: an embedding or a label vector has a value above float16's largest, and that is the precision.
    """
    if columns is None or mixed_precision != "fp16":
        return
    limit = float(np.finfo(np.float16).max)
    values = [("--context_column", context) for context in columns.contexts or ()]
    if columns.label_width is not None and columns.labels is not None:
        values.append(("--class_column", columns.labels.numpy()))
    for option, array in values:
        if (largest := float(np.abs(array).max())) > limit:
            raise ConfigError(
                f"{option}: a value of {largest:g} exceeds the {limit:g} of float16: scale the embeddings, or use"
                " --mixed_precision bf16 or no"
            )


def _check_same_shapes(own: ConditionColumns, train: ConditionColumns) -> None:
    """Refuse conditions of validation images that the network of the training images does not take."""
    if own.label_width != train.label_width:
        raise ConfigError(f"--class_column: validation labels have width {own.label_width}, not {train.label_width}")
    if own.concat is not None and train.concat is not None and own.concat.channels != train.concat.channels:
        raise ConfigError(
            f"--concat_column: validation images have {own.concat.channels} channels, not {train.concat.channels}"
        )
    if own.contexts and train.contexts and own.contexts[0].shape != train.contexts[0].shape:
        raise ConfigError(
            f"--context_column: validation embeddings have shape {own.contexts[0].shape},"
            f" not {train.contexts[0].shape}"
        )

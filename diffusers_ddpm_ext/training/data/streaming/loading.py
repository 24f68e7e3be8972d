"""The images of a run with ``--streaming``: a stream to train on, a sample of it, and images to validate on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.training.config.condition_checks import MAX_CLASSES
from diffusers_ddpm_ext.training.config.data_options import DataOptions, as_names
from diffusers_ddpm_ext.training.data.class_labels import ClassLabels, Column, read_class_labels
from diffusers_ddpm_ext.training.data.conditions import ConditionColumns, load_conditions
from diffusers_ddpm_ext.training.data.decoding import Preprocessing
from diffusers_ddpm_ext.training.data.image_set import ImageSet
from diffusers_ddpm_ext.training.data.image_store import LoadedImages, decode_source
from diffusers_ddpm_ext.training.data.mixture import one_each
from diffusers_ddpm_ext.training.data.streaming.lanes import LanePlan, plan_lanes
from diffusers_ddpm_ext.training.data.streaming.mixture import join_opened
from diffusers_ddpm_ext.training.data.streaming.opening import OpenedRows, errors_named, open_dataset, open_folder
from diffusers_ddpm_ext.training.data.streaming.row_images import RowDecoder, row_source
from diffusers_ddpm_ext.training.data.streaming.rows import Row, first_rows, spread_rows

SAMPLE_SIZE = 64
"""Images that are decoded before the run: their kind, previews, and the scale of latents."""
VALIDATION_SIZE = 1000
"""Images of a split or folder to validate on, by default."""


@dataclass(frozen=True)
class Stream:
    """Images that are read in order.

    Attributes:
        opened: their source.
        preprocessing: of each image.
        columns: of each condition.
        shuffle_buffer: rows that are shuffled at a time.
        replaces_bad: replace an unreadable image by another one.
        identity: sha256 over what the stream consists of, in hexadecimal.
    """

    opened: OpenedRows
    preprocessing: Preprocessing
    columns: Mapping[str, str]
    shuffle_buffer: int
    replaces_bad: bool
    identity: str

    def plan(self, effective_batch: int) -> LanePlan:
        """Division of the stream for an effective batch."""
        return plan_lanes(self.opened.rows, effective_batch, self.shuffle_buffer)

    def decoder(self, sample: ImageSet) -> RowDecoder:
        """Decodes the stream's rows to images like those of the sample."""
        return RowDecoder(self.opened, self.preprocessing, self.columns, sample)

    def name(self, number: int) -> str:
        """Name of a row, by its number."""
        return self.opened.rows.name(number)

    @property
    def description(self) -> str:
        """Number of images, and how they are shuffled."""
        rows = self.opened.rows
        shards = f"{rows.num_parts:,} shard{'s' if rows.num_parts > 1 else ''}"
        count = f"{rows.num_rows:,} images" if rows.num_rows is not None else f"images in {shards}"
        shuffled = (
            f"shuffled {self.shuffle_buffer:,} at a time" if self.shuffle_buffer > 1 else "not shuffled in a shard"
        )
        weights = f", weighted {' to '.join(f'{weight:g}' for weight in rows.weights)}" if rows.weights else ""
        return f"a stream of {count} of {self.opened.option.partition(' ')[2]}{weights}, {shuffled},"


class DecodedRows(NamedTuple):
    """Images of some rows, and their conditions."""

    loaded: LoadedImages
    columns: ConditionColumns | None


@dataclass(frozen=True)
class LoadedStream:
    """What a run with ``--streaming`` decodes before its first step.

    Attributes:
        stream: to train on.
        sample: images of the stream.
        validation: held-out images; None without them.
    """

    stream: Stream
    sample: DecodedRows
    validation: DecodedRows | None


@dataclass(frozen=True)
class _Opener:
    """Opens and decodes the sources of a run.

    Attributes:
        options: section ``data`` of a run's configuration.
        preprocessing: of each image.
        columns: of each condition.
        memory_limit: bytes of decoded images in memory.
        progress: show a progress bar if reading takes longer than a second.
    """

    options: DataOptions
    preprocessing: Preprocessing
    columns: Mapping[str, str]
    memory_limit: int
    progress: bool

    def open(self, option: str, folders: Sequence[str], split: str) -> OpenedRows:
        """The folders, or else the split of each --dataset_name."""
        options = self.options
        if folders:
            opened = [open_folder(option, folder, self.columns) for folder in folders]
        else:
            names = options.dataset_names
            configs = one_each(as_names(options.dataset_config_name), len(names))
            images = one_each(as_names(options.image_column), len(names))
            opened = [
                open_dataset(name, split, config, column, options.cache_dir, self.columns)
                for name, config, column in zip(names, configs, images, strict=True)
            ]
        if len(opened) == 1:
            return opened[0]
        return join_opened(opened, options.dataset_weights or (1.0,) * len(opened))

    def decode(self, opened: OpenedRows, rows: Sequence[Row], train: ConditionColumns | None) -> DecodedRows:
        """Images and conditions of rows; ``train`` are conditions of the same classes and shapes."""
        source = row_source(opened, rows)
        loaded = decode_source(
            source, self.preprocessing, skip_bad=self.options.skip_bad_images, memory_limit=self.memory_limit,
            progress=self.progress,
        )  # fmt: skip
        return DecodedRows(loaded, load_conditions(source, loaded.names, self.columns, self.preprocessing, train))


def load_stream(
    options: DataOptions,
    preprocessing: Preprocessing,
    columns: Mapping[str, str],
    *,
    memory_limit: int,
    progress: bool,
) -> LoadedStream:
    """Open the stream that the options select, and decode a sample of it and the images to validate on.

    Args:
        options: section ``data`` of a run's configuration.
        preprocessing: of each image.
        columns: of each condition.
        memory_limit: bytes of held-out images in memory.
        progress: show a progress bar if reading takes longer than a second.

    Raises:
        ConfigError: the source, a column or an image is not usable.
    """
    opener = _Opener(options, preprocessing, columns, memory_limit, progress)
    opened = opener.open("--train_data_dir", options.data_dirs, "train")
    with errors_named(opened.option):
        opened, held_out = _hold_out(opener, opened)
        rows = spread_rows(opened.rows, SAMPLE_SIZE)
        if not rows:
            raise ConfigError(f"{opened.option} has no rows.")
        opened, classes = _known_classes(opener, opened, rows)
    sample, validation = opener.decode(opened, rows, classes), None
    if held_out is not None:
        source = held_out[0] if opened.class_names is None else replace(held_out[0], class_names=opened.class_names)
        validation = opener.decode(source, held_out[1], sample.columns)
    class_names = () if sample.columns is None else sample.columns.class_names
    parts = [opened.identity, str(options.validation_examples), *class_names]
    identity = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()
    stream = Stream(opened, preprocessing, columns, options.shuffle_buffer, options.skip_bad_images, identity)
    return LoadedStream(stream, sample, validation)


def _hold_out(opener: _Opener, opened: OpenedRows) -> tuple[OpenedRows, tuple[OpenedRows, list[Row]] | None]:
    """The stream to train on, and the rows to validate on with their source; None without them."""
    options, count = opener.options, opener.options.validation_examples
    folders = as_names(options.validation_data_dir)
    if folders or options.validation_split is not None:
        source = opener.open("--validation_data_dir", folders, str(options.validation_split))
        rows = first_rows(source.rows, VALIDATION_SIZE if count is None else count)
        if not rows:
            raise ConfigError(f"{source.option}, split {options.validation_split!r}, has no rows.")
        return opened, (source, rows)
    if not count:
        return opened, None
    rows = first_rows(opened.rows, count)
    rest = opened.rows.without_first(min(count, len(rows)))
    if rest.num_parts == 0 or rest.num_rows == 0:
        raise ConfigError(
            f"--validation_examples {count} holds out all {len(rows):,} images of {opened.option}: leave some"
        )
    return replace(opened, rows=rest), (opened, rows)


def _known_classes(
    opener: _Opener, opened: OpenedRows, sample: Sequence[Row]
) -> tuple[OpenedRows, ConditionColumns | None]:
    """The source, and all classes of its column: declared ones, --class_names, or those that a first pass finds.

    No classes are known before where there is no such column, or its labels are vectors.
    """
    column, names = opened.class_column, opener.options.class_names
    if column is None or (opened.class_names is not None and names is None):
        return opened, None
    label = f"--class_column {printable(column, 60)}"
    if isinstance(sample[0].cells[column], list | tuple):
        if names is not None:
            raise ConfigError(f"--class_names has no effect: the labels in {label} are vectors")
        return opened, None
    if names is not None and opened.class_names is None and opened.has_integer_labels:
        return replace(opened, class_names=names), None
    if names is not None:
        labels = ClassLabels(torch.empty(0, dtype=torch.int64), names, are_named=True)
        return opened, ConditionColumns(labels, None, None, "")
    return opened, ConditionColumns(_first_pass(opener, opened, label, column), None, None, "")


def _first_pass(opener: _Opener, opened: OpenedRows, label: str, column: str) -> ClassLabels:
    """Read the column of classes of all rows, to know which there are."""
    rows = opened.rows.only(column)
    found: dict[Any, str] = {}
    bar = tqdm(
        total=rows.num_rows, desc="reading classes", unit="row", delay=1, leave=False, disable=not opener.progress
    )
    parts = 1 if rows.num_rows is not None else rows.num_parts
    with bar:
        for row in (row for part in range(parts) for row in rows.read(part, parts)):
            bar.update()
            value = row.cells[column]
            if value.__hash__ is None:
                raise ConfigError(f"{label}: {rows.name(row.number)} has a {type(value).__name__}, not a class")
            if value not in found:
                found[value] = rows.name(row.number)
            if len(found) > MAX_CLASSES:
                raise ConfigError(f"{label} has more than {MAX_CLASSES:,} classes: use fewer")
    values = {name: value for value, name in found.items()}
    return read_class_labels(label, Column(values, None, opened.labels_are_names), list(values))

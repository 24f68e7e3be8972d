"""The images of a run: what is trained on, and what is held out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.config.options import DataOptions
from diffusers_ddpm_ext.training.data.bit_depth import DEEP, SHALLOW
from diffusers_ddpm_ext.training.data.condition_tables import DigitTable, FolderTable, RowTable, Table
from diffusers_ddpm_ext.training.data.conditions import ConditionColumns, column_names, read_columns
from diffusers_ddpm_ext.training.data.decoding import CHANNEL_NAMES, Preparation, Size
from diffusers_ddpm_ext.training.data.image_set import ImageSet
from diffusers_ddpm_ext.training.data.image_store import LazyImages, PackedImages, Reading, check_alike, read
from diffusers_ddpm_ext.training.data.sources import (
    FolderSource,
    RowSource,
    digit_labels,
    digit_levels,
    digit_rows,
    load_rows,
    scan_folder,
)
from diffusers_ddpm_ext.utils import random_keys as keys

MEMORY_LIMIT = 2 * 1024**3  # bytes of resized pixels; while they are packed there are twice as many for a moment
DIGITS = "digits of scikit-learn"
DIGITS_SIZE = (8, 8)
DIGITS_LEVELS = 17


@dataclass(frozen=True)
class ImageData:
    """All images of a run.

    Attributes:
        train: images to train on.
        validation: images held out; None where there are none.
        description: one line for the plan.
        fingerprint: sha256 over the names and the pixels of both sets, in hexadecimal.
        skipped: how many unreadable images were left out.
        warning: what is to be said of the values of the pixels; None where there is nothing.
    """

    train: ImageSet
    validation: ImageSet | None
    description: str
    fingerprint: str
    skipped: int = 0
    warning: str | None = None

    @property
    def channels(self) -> int:
        """Channels of every image."""
        return self.train.shape[0]

    @property
    def size(self) -> Size:
        """Height and width of every image, in pixels."""
        return self.train.size


def load_data(
    options: DataOptions,
    conditioning_key: str | None = None,
    *,
    progress: bool = False,
    memory_limit: int = MEMORY_LIMIT,
) -> ImageData:
    """Read the images that the options name, every one of them once, and hold some out for validation.

    Args:
        options: the section ``data`` of a run's configuration.
        conditioning_key: of the run: which columns are read.
        progress: show a bar where reading takes longer than a second.
        memory_limit: bytes of resized pixels that are kept in memory; more are decoded again when asked for.

    Raises:
        ConfigError: a folder, file, dataset or option is not usable; the message names it and the way out.
    """
    if options.channels not in (None, *CHANNEL_NAMES):
        raise ConfigError(f"--channels {options.channels}: say 1 (grey), 3 (colour) or 4 (colour with transparency).")
    preparation = Preparation(options.resolution, options.channels, options.center_crop)
    read_one = partial(read, skip_bad=options.skip_bad_images, memory_limit=memory_limit, progress=progress)
    digits = options.train_data_dir is None and options.dataset_name is None
    wanted = column_names(conditioning_key, options, digits=digits, folder=options.train_data_dir is not None)
    if digits:
        return _digits(options, preparation, wanted)
    source = _source(options, "--train_data_dir", options.train_data_dir, "train")
    reading = read_one(source, preparation)
    columns = read_columns(_table(source), reading.names, wanted, preparation)
    held_out = held_columns = None
    if options.validation_data_dir is not None or options.validation_split is not None:
        place, split = options.validation_data_dir, options.validation_split
        apart = _source(options, "--validation_data_dir", place, str(split))
        held_out = read_one(apart, preparation)
        names = None if columns is None else columns.class_names
        held_columns = read_columns(_table(apart), held_out.names, wanted, preparation, names)
    where = options.train_data_dir if options.train_data_dir is not None else options.dataset_name
    return _assemble(options, f"images of {where}", reading, held_out, columns=columns, held_columns=held_columns)


def _source(options: DataOptions, option: str, folder: str | None, split: str) -> FolderSource | RowSource:
    """A folder, or else a split of the dataset."""
    return scan_folder(option, folder) if folder is not None else _rows(options, split)


def _table(source: FolderSource | RowSource) -> Table:
    """Where the columns of a source's images are."""
    if isinstance(source, FolderSource):
        return FolderTable(source.option, source.folder, source.names)
    return RowTable(source.option, source.names, source.table)


def _digits(options: DataOptions, preparation: Preparation, wanted: Mapping[str, str]) -> ImageData:
    """Take the digits: as they are, in their 17 levels, or as any other images where another size is asked for."""
    if options.resolution != DIGITS_SIZE or options.channels not in (None, 1):
        reading = read(digit_rows(), preparation, skip_bad=False, memory_limit=MEMORY_LIMIT)
        return _assemble(options, DIGITS, reading, None, columns=_digit_columns(reading.names, wanted, preparation))
    values = digit_levels()
    names = [str(index) for index in range(len(values))]
    fingerprint = hashlib.sha256(values.numpy().tobytes()).hexdigest()
    reading = Reading(PackedImages(list(values)), names, 0, 0, fingerprint, DIGITS_LEVELS - 1)
    columns = _digit_columns(names, wanted, preparation)
    return _assemble(options, DIGITS, reading, None, levels=DIGITS_LEVELS, columns=columns)


def _digit_columns(
    names: Sequence[str], wanted: Mapping[str, str], preparation: Preparation
) -> ConditionColumns | None:
    return read_columns(DigitTable(names, digit_labels() if wanted else [0] * len(names)), names, wanted, preparation)


def _rows(options: DataOptions, split: str) -> RowSource:
    """Open a split of --dataset_name."""
    return load_rows(
        str(options.dataset_name), split, options.dataset_config_name, options.image_column, options.cache_dir
    )


def _assemble(
    options: DataOptions,
    what: str,
    reading: Reading,
    held_out: Reading | None,
    levels: int | None = None,
    columns: ConditionColumns | None = None,
    held_columns: ConditionColumns | None = None,
) -> ImageData:
    """Divide what was read into the two sets, and describe them."""
    rows, apart = torch.arange(len(reading.names)), torch.empty(0, dtype=torch.int64)
    if held_out is None:
        rows, apart = _divide(reading.names, options.validation_fraction or 0, by_key=what != DIGITS)
    else:
        check_alike(reading, held_out)
    train = ImageSet(
        reading.images,
        rows,
        options.resolution,
        reading.images.levels if levels is None else levels,
        options.random_flip,
        reading.names,
        options.skip_bad_images and columns is None,  # another image would be given the condition of this one
        columns,
    )
    validation = None
    if held_out is not None:
        rows = torch.arange(len(held_out.names))
        validation = replace(train, images=held_out.images, rows=rows, random_flip=False, names=held_out.names)
        validation = replace(validation, columns=held_columns)
    elif len(apart):
        validation = replace(train, rows=apart, random_flip=False)
    readings = [one for one in (reading, held_out) if one is not None]
    marks = [one.fingerprint for one in readings] + [str(row) for row in apart.tolist()]
    marks += [one.fingerprint for one in (columns, held_columns) if one is not None]
    return ImageData(
        train,
        validation,
        _describe(options, what, readings, train, validation),
        hashlib.sha256(" ".join(marks).encode()).hexdigest(),
        sum(one.skipped for one in readings),
        _doubt(readings),
    )


def _divide(names: Sequence[str], fraction: float, *, by_key: bool) -> tuple[Tensor, Tensor]:
    """Divide images into those to train on and those to validate on, at least one on each side where there are two.

    An image's side follows from its name: whatever the seed, runs are judged on the same images, and few change sides
    when images are added. Without keys the last ones are held out.
    """
    count = len(names)
    apart = min(count - 1, max(1, round(fraction * count))) if fraction > 0 else 0
    order = list(range(count))
    if by_key:
        order.sort(key=lambda i: (keys.key(keys.SPLIT, names[i]), i))
    sides = torch.tensor(order, dtype=torch.int64)
    return sides[: count - apart].sort().values, sides[count - apart :].sort().values


def _doubt(readings: Sequence[Reading]) -> str | None:
    """What is to be said of images of 16 bits that use few of them, as those of scanners with 12 bits do."""
    highest = max(one.highest for one in readings)
    if readings[0].images.levels != DEEP or highest >= DEEP // 4:
        return None
    return (
        f"the images have 16 bits, but no pixel is above {highest:,} of 65,535, so that the network sees almost black:"
        " scale them to the whole range"
    )


def _describe(
    options: DataOptions, what: str, readings: Sequence[Reading], train: ImageSet, validation: ImageSet | None
) -> str:
    """Say in one line what was read."""
    height, width = train.size
    facts = [
        f"{len(train):,} {what} to train on",
        f"{len(validation):,} to validate on" if validation is not None else "none to validate on",
        f"{height}x{width}, {train.shape[0]} channel{'s' if train.shape[0] > 1 else ''}",
    ]
    if train.levels != SHALLOW:
        facts.append("16 bits" if train.levels == DEEP else f"{train.levels} levels")
    if what != DIGITS:
        facts.append("middle crop" if options.center_crop else "random crop")
    if options.random_flip:
        facts.append("random flip")
    if enlarged := sum(one.enlarged for one in readings):
        facts.append(f"{enlarged:,} smaller ones enlarged")
    if skipped := sum(one.skipped for one in readings):
        facts.append(f"{skipped:,} unreadable one{'s' if skipped > 1 else ''} left out")
    if any(isinstance(one.images, LazyImages) for one in readings):
        facts.append("too many for memory: decoded whenever they are needed (see --dataloader_num_workers)")
    return ", ".join(facts)

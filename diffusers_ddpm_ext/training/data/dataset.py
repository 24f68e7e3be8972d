"""Images of a run: training and validation set, selected by the options of section ``data``."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

import torch

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.config.condition_checks import select_columns
from diffusers_ddpm_ext.training.config.data_options import DataOptions, as_names
from diffusers_ddpm_ext.training.data.cached_images import CachedImages
from diffusers_ddpm_ext.training.data.captions import CaptionReader, CaptionTable, Tokenizes
from diffusers_ddpm_ext.training.data.class_labels import ClassLabels
from diffusers_ddpm_ext.training.data.conditions import ConditionColumns, load_conditions
from diffusers_ddpm_ext.training.data.decoding import Preprocessing
from diffusers_ddpm_ext.training.data.geometry import augmentation_of, describe_geometry, preprocessing_of
from diffusers_ddpm_ext.training.data.image_cache import load_images
from diffusers_ddpm_ext.training.data.image_set import ImageSet
from diffusers_ddpm_ext.training.data.image_store import (
    LazyImages,
    LoadedImages,
    PackedImages,
    check_same_kind,
    decode_source,
)
from diffusers_ddpm_ext.training.data.mixture import describe_sources, one_each, read_balanced_classes, weighted_draws
from diffusers_ddpm_ext.training.data.mixture_sources import MixtureSource, join_images, stores_of
from diffusers_ddpm_ext.training.data.resizing import Size
from diffusers_ddpm_ext.training.data.sources import (
    DIGIT_COLUMN,
    FOLDER_COLUMN,
    DigitSource,
    Source,
    describe_other_images,
    digit_levels,
    open_dataset_split,
    scan_folder,
)
from diffusers_ddpm_ext.training.data.streaming.loading import LoadedStream, Stream, load_stream
from diffusers_ddpm_ext.training.data.validation_split import split_rows
from diffusers_ddpm_ext.utils.pixel_format import PixelFormat

MEMORY_LIMIT = 2 * 1024**3  # bytes of resized pixels; packing them takes twice as much for a moment
DIGITS = "digits of scikit-learn"
DIGITS_SIZE = (8, 8)
DIGITS_LEVELS = 17
DIGITS_FORMAT = PixelFormat("uint8", 0, DIGITS_LEVELS - 1)
DIM_16_BIT = 65536 // 4
"""Images of 16 bits without a value above this use few of their bits, as those of 12-bit scanners do."""


@dataclass(frozen=True)
class ImageData:
    """All images of a run.

    Attributes:
        train: images to train on.
        validation: held-out images; None without them.
        description: one line for the printed plan.
        fingerprint: sha256 over the names and the pixels of both sets, in hexadecimal.
        skipped: number of unreadable images that were left out.
        warning: about the values of the pixels; None if they look right.
        captions: of all images, with their tokens; None without captions.
        stream: of the images to train on, of which ``train`` is a sample; None in a run without ``streaming``.
    """

    train: ImageSet
    validation: ImageSet | None
    description: str
    fingerprint: str
    skipped: int = 0
    warning: str | None = None
    captions: CaptionTable | None = None
    stream: Stream | None = None

    def name(self, index: int) -> str:
        """Name of a training image, by its number in a `Batch`."""
        return self.train.name(index) if self.stream is None else self.stream.name(index)

    @property
    def channels(self) -> int:
        """Channels of every image."""
        return self.train.shape[0]

    @property
    def size(self) -> Size:
        """Height and width of every image, in pixels."""
        return self.train.size

    @property
    def pixel_format(self) -> PixelFormat:
        """Dtype and range of every pixel; the digits count as ordinary images."""
        pixel_format = self.train.images.pixel_format
        return PixelFormat() if pixel_format == DIGITS_FORMAT else pixel_format


@dataclass(frozen=True)
class _LoadedSource:
    """Images of a source or a mixture, with their conditions.

    Attributes:
        loaded: the images.
        columns: their conditions.
        parts: the images of each source.
        classes: of the images, for ``class_balance``.
        other_images: images of types that are not read, by extension: their number.
    """

    loaded: LoadedImages
    columns: ConditionColumns | None
    parts: Sequence[LoadedImages]
    classes: ClassLabels | None = None
    other_images: Mapping[str, int] = field(default_factory=dict)


def load_data(
    options: DataOptions,
    conditioning_key: str | None = None,
    *,
    tokenizer: Tokenizes | None = None,
    progress: bool = False,
    memory_limit: int = MEMORY_LIMIT,
) -> ImageData:
    """Load the images that the options select, decoding each once, and hold some out for validation.

    Args:
        options: section ``data`` of a run's configuration.
        conditioning_key: of the run; determines which columns are read.
        tokenizer: makes tokens of captions, such as a `TextEncoder`; None in a run without captions.
        progress: show a progress bar if loading takes longer than a second.
        memory_limit: bytes of resized pixels to hold in memory; a larger set is decoded again for each use.

    Raises:
        ConfigError: a folder, file, dataset or option is not usable; the message names it and the way out.
    """
    preprocessing = preprocessing_of(options)
    digits = options.train_data_dir is None and options.dataset_name is None
    default_class_column = DIGIT_COLUMN if digits else FOLDER_COLUMN if options.train_data_dir is not None else None
    selected = select_columns(conditioning_key, vars(options), default_class_column)
    if digits:
        return _load_digits(options, preprocessing, selected)
    if options.streaming:
        streamed = load_stream(options, preprocessing, selected, memory_limit=memory_limit, progress=progress)
        return _assemble_stream(options, streamed)
    reader = None if tokenizer is None else CaptionReader(tokenizer)

    def load(sources: Mapping[str, Source], train: ConditionColumns | None = None) -> _LoadedSource:
        limit, parts = memory_limit // len(sources), list(sources.values())
        loaded = [load_images(part, preprocessing, options, memory_limit=limit, progress=progress) for part in parts]
        images = loaded[0] if len(parts) == 1 else join_images(list(sources), loaded)
        source = parts[0] if len(parts) == 1 else MixtureSource(list(sources), parts)
        columns = load_conditions(source, images.names, selected, preprocessing, train, reader)
        classes = None
        if options.class_balance and train is None:
            classes = read_balanced_classes(
                source, images.names, columns, options.class_column or default_class_column
            )
        return _LoadedSource(images, columns, loaded, classes, source.other_images)

    train, held_out = load(_open_sources(options, "--train_data_dir", options.data_dirs, "train")), None
    validation_dirs, split = as_names(options.validation_data_dir), options.validation_split
    if validation_dirs or split is not None:
        held_out = load(_open_sources(options, "--validation_data_dir", validation_dirs, str(split)), train.columns)
    description = f"images of {describe_sources(options)}"
    data = _assemble(options, description, train, held_out)
    return data if reader is None else replace(data, captions=reader.table(progress))


def _open_sources(options: DataOptions, option: str, folders: Sequence[str], split: str) -> dict[str, Source]:
    """The folders, or else the split of each --dataset_name, by name."""
    if folders:
        return {folder: scan_folder(option, folder) for folder in folders}
    names = options.dataset_names
    configs, columns = as_names(options.dataset_config_name), as_names(options.image_column)
    sources: dict[str, Source] = {}
    for name, config, column in zip(names, one_each(configs, len(names)), one_each(columns, len(names)), strict=True):
        called = name if name not in sources else f"{name}, {config}"
        sources[called] = open_dataset_split(name, split, config, column, options.cache_dir)
    return sources


def _load_digits(options: DataOptions, preprocessing: Preprocessing, selected: Mapping[str, str]) -> ImageData:
    """Load the digits: in their 17 levels, or like any other images if another size or color is requested."""
    levels = digit_levels()
    if options.resolution == DIGITS_SIZE and options.channels in (None, 1):
        source = DigitSource(levels, [str(index) for index in range(len(levels))])
        fingerprint = hashlib.sha256(levels.numpy().tobytes()).hexdigest()
        images = PackedImages(list(levels), fingerprint, DIGITS_FORMAT)
        loaded = LoadedImages(images, source.names, 0, 0, fingerprint, DIGITS_LEVELS - 1)
    else:
        source = DigitSource(levels, [f"row {index}" for index in range(len(levels))])
        loaded = decode_source(source, preprocessing, skip_bad=False, memory_limit=MEMORY_LIMIT)
    columns = load_conditions(source, loaded.names, selected, preprocessing)
    classes = None
    if options.class_balance:
        classes = read_balanced_classes(source, loaded.names, columns, options.class_column or DIGIT_COLUMN)
    return _assemble(options, DIGITS, _LoadedSource(loaded, columns, [loaded], classes), None)


def _assemble_stream(options: DataOptions, streamed: LoadedStream) -> ImageData:
    """The images of a run with ``--streaming``; those to train on are a sample."""
    stream = streamed.stream
    other_images = stream.opened.other_images
    loaded, held_out = streamed.sample.loaded, None
    train = _LoadedSource(loaded, streamed.sample.columns, [loaded], other_images=other_images)
    if streamed.validation is not None:
        images, columns = streamed.validation
        held_out = _LoadedSource(images, columns, [images])
    data = _assemble(options, "", train, held_out, stream.description)
    # The hash of the sample tells of images that were changed in place.
    fingerprint = hashlib.sha256(f"{stream.identity} {data.fingerprint}".encode()).hexdigest()
    sample = replace(data.train, replace_unreadable=False)
    return replace(data, train=sample, fingerprint=fingerprint, stream=stream)


def _assemble(
    options: DataOptions,
    description: str,
    train: _LoadedSource,
    held_out: _LoadedSource | None,
    count: str | None = None,
) -> ImageData:
    """Create the training and the validation set, and describe them; ``count`` replaces the number of images."""
    fraction = 0 if held_out is not None else options.validation_fraction or 0
    first = options.validation_examples if count is None else None  # of a stream they were held out before
    splits = [split_rows(part, fraction, by_key=description != DIGITS) for part in train.parts]
    if first is not None and held_out is None:
        splits = [_hold_out_first(part, first) for part in train.parts]
    starts = [0, *accumulate(len(part.names) for part in train.parts)]
    rows, held_out_rows = (
        torch.cat([part + start for start, part in zip(starts, parts, strict=False)])
        for parts in zip(*splits, strict=True)
    )
    if held_out is not None:
        check_same_kind(train.loaded, held_out.loaded)
    train_set = ImageSet(
        train.loaded.images,
        rows,
        options.resolution,
        augmentation_of(options, train.loaded.images.pixel_format, train.loaded.images.channels),
        train.loaded.names,
        options.skip_bad_images and train.columns is None,  # another image would get the conditions of this one
        train.columns,
    )
    validation_set = None
    if held_out is not None:
        loaded, starts = held_out.loaded, [0, *accumulate(len(part.names) for part in held_out.parts)]
        all_rows = torch.cat([torch.arange(*pair)[:first] for pair in pairwise(starts)])
        validation_set = replace(train_set, images=loaded.images, rows=all_rows, names=loaded.names)
        validation_set = replace(validation_set, columns=held_out.columns)
    elif len(held_out_rows):
        validation_set = replace(train_set, rows=held_out_rows)
    if validation_set is not None:
        validation_set = replace(validation_set, augmentation=train_set.augmentation.for_validation())
    train_set = replace(
        train_set, draws=weighted_draws(options, [len(part) for part, _ in splits], rows, train.classes)
    )
    sources = [train] if held_out is None else [train, held_out]
    parts = [source.loaded.fingerprint for source in sources] + [str(row) for row in held_out_rows.tolist()]
    parts += [source.columns.fingerprint for source in sources if source.columns is not None]
    if train.classes is not None:
        parts.append(hashlib.sha256(train.classes.labels.numpy().tobytes()).hexdigest())
    loaded_sources = [source.loaded for source in sources]
    return ImageData(
        train_set,
        validation_set,
        _describe(options, description, sources, train_set, validation_set, count),
        hashlib.sha256(" ".join(parts).encode()).hexdigest(),
        sum(loaded.skipped for loaded in loaded_sources),
        _dark_images_warning(loaded_sources),
    )


def _hold_out_first(part: LoadedImages, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a source to train on, and the first ones, to validate on."""
    rows = torch.arange(len(part.names))
    if count >= len(rows):
        raise ConfigError(f"--validation_examples {count} holds out all {len(rows):,} images: leave some")
    return rows[count:], rows[:count]


def _dark_images_warning(sources: Sequence[LoadedImages]) -> str | None:
    """Warn about images of 16 bits that use few of them."""
    highest = int(max(loaded.highest for loaded in sources))
    pixel_format = sources[0].images.pixel_format
    if (pixel_format.dtype, pixel_format.high) != ("uint16", 65535) or highest >= DIM_16_BIT:
        return None
    return (
        f"the images have 16 bits, but no pixel is above {highest:,} of 65,535, so that the network sees almost"
        f" black: give their range, such as --data_range 0 {2 ** max(highest, 1).bit_length() - 1}"
    )


def _describe_values(pixel_format: PixelFormat) -> str:
    """Dtype and range in a few words."""
    if pixel_format == DIGITS_FORMAT:
        return f"{DIGITS_LEVELS} levels"
    low, high = pixel_format.low, pixel_format.high
    is_16_bit = (pixel_format.dtype, low, high) == ("uint16", 0, 65535)
    return "16 bits" if is_16_bit else f"{pixel_format.dtype} from {low:g} to {high:g}"


def _describe(
    options: DataOptions,
    images: str,
    sources: Sequence[_LoadedSource],
    train: ImageSet,
    validation: ImageSet | None,
    count: str | None,
) -> str:
    """Describe the images in one line."""
    height, width = train.size
    parts = [
        f"{count or f'{len(train):,} {images}'} to train on",
        f"{len(validation):,} to validate on" if validation is not None else "none to validate on",
        f"{height}x{width}, {train.shape[0]} channel{'s' if train.shape[0] > 1 else ''}",
    ]
    if not train.images.pixel_format.is_8_bit:
        parts.append(_describe_values(train.images.pixel_format))
    parts += describe_geometry(options, is_cropped=images != DIGITS)
    if options.class_balance:
        parts.append("each class equally often")
    loaded_sources = [source.loaded for source in sources]
    if enlarged := sum(loaded.enlarged for loaded in loaded_sources):
        parts.append(f"{enlarged:,} smaller ones enlarged")
    if animated := sum(loaded.num_animated for loaded in loaded_sources):
        parts.append(f"the first of several frames in {animated:,} file{'s' if animated > 1 else ''}")
    if skipped := sum(loaded.skipped for loaded in loaded_sources):
        parts.append(f"{skipped:,} unreadable one{'s' if skipped > 1 else ''} left out")
    other_images = sum((Counter(source.other_images) for source in sources), Counter())
    if other_images:
        parts.append(describe_other_images(other_images))
    stores = [store for loaded in loaded_sources for store in stores_of(loaded.images)]
    if any(isinstance(store, LazyImages) for store in stores):
        parts.append("too many for memory: decoded for each use (see --cache_images, --dataloader_num_workers)")
    for store in stores:
        if isinstance(store, CachedImages):
            parts.append(f"{store.num_bytes:,} bytes of pixels in the cache {store.folder}")
    return ", ".join(parts)

"""Opening a source as a stream: a folder of images, files of one format, a dataset on the Hub or a saved one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError, RunError, printable
from diffusers_ddpm_ext.training.data.dataset_files import (
    builder_arguments,
    import_datasets,
    is_saved_dataset,
    saved_split,
)
from diffusers_ddpm_ext.training.data.sources import image_column_of, is_array_feature, one_line, scan_folder
from diffusers_ddpm_ext.training.data.streaming.parquet import (
    MAX_COUNTED_FILES,
    Columns,
    CountedParquet,
    ParquetShards,
    is_remote,
)
from diffusers_ddpm_ext.training.data.streaming.rows import CountedRows, RowStream, ShardedRows
from diffusers_ddpm_ext.training.data.streaming.sources import FolderRows, IterableRows, TableRows
from diffusers_ddpm_ext.utils.input_files import open_input

IDENTIFYING_BYTES = 1 << 14
"""Of the beginning and the end of each local file, which identify it together with its size."""
IMAGE = "image"


@dataclass(frozen=True)
class OpenedRows:
    """A source as a stream.

    Attributes:
        rows: with the columns that a run needs.
        option: the option that names the source, for messages.
        image_column: the column with the images.
        class_column: the column with the classes; None without classes.
        class_names: of a `ClassLabel`; None of other columns.
        labels_are_names: whether labels are names, even those that look like numbers.
        has_integer_labels: whether the column of classes has whole numbers.
        identity: sha256 over what the source is made of, in hexadecimal.
    """

    rows: RowStream
    option: str
    image_column: str
    class_column: str | None
    class_names: Sequence[str] | None
    labels_are_names: bool
    has_integer_labels: bool
    identity: str
    other_images: Mapping[str, int] = field(default_factory=dict)


def open_folder(option: str, folder: str, columns: Mapping[str, str]) -> OpenedRows:
    """Open a folder of images.

    Args:
        option: that names it.
        folder: its path.
        columns: of each condition: the name of the image's folder, or a column of its metadata.

    Raises:
        ConfigError: it has no image, or an image has no value in a column.
    """
    source = scan_folder(option, folder)
    values: dict[str, Mapping[str, Any]] = {}
    are_names = False
    for condition, column in columns.items():
        if condition == "class_labels":
            labels = source.read_labels(column)
            values[column], are_names = labels.values, labels.holds_names
        else:
            values[column] = source.read_files(column)
    rows = FolderRows(source.folder, source.names, values, IMAGE)
    digest = hashlib.sha256()
    for name in source.names:
        digest.update(f"{name}\0{(source.folder / name).stat().st_size}\0".encode("utf-8", "surrogateescape"))
    digest.update(json.dumps(values, default=str, sort_keys=True).encode("utf-8", "surrogateescape"))
    return OpenedRows(
        CountedRows(rows),
        source.option,
        IMAGE,
        columns.get("class_labels"),
        None,
        are_names,
        False,
        digest.hexdigest(),
        source.other_images,
    )


def open_dataset(
    name: str,
    split: str,
    config_name: str | None,
    image_column: str | None,
    cache_dir: str | None,
    columns: Mapping[str, str],
) -> OpenedRows:
    """Open a split of a dataset.

    Args:
        name: Hub id, folder, file, or pattern of files.
        split: of the dataset.
        config_name: configuration, if it has several.
        image_column: column of the images; None selects the only image column.
        cache_dir: folder for what `datasets` downloads.
        columns: of each condition.

    Raises:
        ConfigError: `datasets` is not installed or cannot open it, or there is no such split or column.
    """
    datasets = import_datasets()
    label = f"--dataset_name {printable(name, 200)!r}"
    try:
        if is_saved_dataset(name):
            table, files, kind = saved_split(name, split), [], "table"
            files = [each["filename"] for each in table.cache_files]
        else:
            path, data_files = builder_arguments(name)
            builder = datasets.load_dataset_builder(path, config_name, data_files=data_files, cache_dir=cache_dir)
            table = builder.as_streaming_dataset(split=split)
            files = [str(file) for file in (builder.config.data_files or {}).get(split, ())]
            kind = type(builder.config).__name__.removesuffix("Config").lower()
    except Exception as error:  # `datasets` raises any exception of its readers and the network
        raise ConfigError(f"{label}, split {split!r}, cannot be opened: {one_line(error)}") from error
    if table.features is None:
        raise ConfigError(f"{label}: `datasets` does not know its columns; use parquet, Arrow, WebDataset or a folder")
    column = image_column_of(label, table.features, datasets.Image, image_column)
    chosen = list(dict.fromkeys([column, *columns.values()]))
    for each in chosen:
        if each not in table.features:
            raise ConfigError(f"column {printable(each, 60)!r} is not in {label}: it has {', '.join(table.features)}")
    feature = table.features[column]
    is_file = type(feature).__name__ == "Image" or getattr(feature, "dtype", "").endswith(("binary", "string"))
    if not is_file and not is_array_feature(feature):
        raise ConfigError(f"--image_column {printable(column, 60)!r} of {label} has no images: it has {feature}")
    rows = _rows_of(table, Columns(chosen, [column] if is_array_feature(feature) else []), kind, files)
    class_feature = table.features.get(columns.get("class_labels"))
    names = getattr(class_feature, "names", None)
    with errors_named(label):
        identity = _identity(files, [name if not files else "", split, *chosen])
        if rows.num_rows == 0:
            raise ConfigError(f"{label}, split {split!r}, has no rows.")
    return OpenedRows(
        rows,
        label,
        column,
        columns.get("class_labels"),
        names if isinstance(names, list) else None,
        False,
        str(getattr(class_feature, "dtype", "")).startswith(("int", "uint")),
        identity,
    )


@contextmanager
def errors_named(label: str) -> Iterator[None]:
    """Turn any error of a library that reads rows into a ConfigError that names the source."""
    try:
        yield
    except (ConfigError, RunError):
        raise
    except Exception as error:
        reason = printable(one_line(error), 300)
        raise ConfigError(f"{label} cannot be read: {type(error).__name__} {reason}") from error


def _rows_of(table: Any, columns: Columns, kind: str, files: Sequence[str]) -> RowStream:
    """The rows of files, of a table, or of what `datasets` iterates over."""
    if kind == "parquet" and files:
        counted = len(files) <= MAX_COUNTED_FILES
        return CountedRows(CountedParquet(files, columns)) if counted else _sharded(ParquetShards(files, columns))
    undecoded = table.select_columns(list(columns.names))
    for name in columns.names:
        feature = table.features[name]
        if type(feature).__name__ == "Image":
            undecoded = undecoded.cast_column(name, type(feature)(decode=False))
    if kind == "table":
        return CountedRows(TableRows(undecoded.with_format("arrow"), columns.arrays))
    return _sharded(IterableRows(undecoded, files, columns.arrays))


def _sharded(source: Any) -> ShardedRows:
    return ShardedRows(source, tuple((shard, 0) for shard in range(source.num_shards)))


def _identity(files: Sequence[str], others: Sequence[str]) -> str:
    """Hash of files: a URL of the Hub has the commit; local files by name, size, beginning and end."""
    digest = hashlib.sha256(json.dumps(list(others)).encode())
    for file in files:
        digest.update(file.rsplit("/", 1)[-1].encode("utf-8", "surrogateescape") + b"\0")
        if is_remote(file):
            digest.update(file.encode())
            continue
        with open_input(Path(file)) as handle:
            size = handle.seek(0, 2)
            digest.update(str(size).encode())
            for start in (0, max(0, size - IDENTIFYING_BYTES)):
                handle.seek(start)
                digest.update(handle.read(IDENTIFYING_BYTES))
    return digest.hexdigest()

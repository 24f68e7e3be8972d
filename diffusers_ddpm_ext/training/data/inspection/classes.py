"""Columns of a source that can be classes, and how many images each class has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.training.data.class_labels import ClassLabels, Column, read_class_labels
from diffusers_ddpm_ext.training.data.metadata import FILE_NAME
from diffusers_ddpm_ext.training.data.sources import FOLDER_COLUMN, DatasetSource, FolderSource, Source
from diffusers_ddpm_ext.utils.input_files import iter_json_rows, read_csv_rows

MAX_SHOWN_CLASSES = 1000
"""Columns with more values are taken as classes only on request."""
IMAGES_PER_CLASS = 2
"""A column with fewer images per value, on average, names images and not classes."""
MAX_NAME = 64
MAX_COLUMNS = 8


@dataclass(frozen=True)
class ClassColumn:
    """A column that `--class_column` can name.

    Attributes:
        name: of the column; `folder` stands for the images' folders.
        names: of the classes, in their order.
        train: number of training images of each.
        validation: number of validation images of each; None without a validation set.
    """

    name: str
    names: Sequence[str]
    train: Sequence[int]
    validation: Sequence[int] | None = None

    @property
    def imbalance(self) -> float:
        """Images of the largest class for each of the smallest that has any."""
        present = [count for count in self.train if count]
        return max(present) / min(present)


def find_classes(
    source: Source, validation: Source | None = None, requested: str | None = None
) -> tuple[list[ClassColumn], list[str]]:
    """Find the columns that can be classes, the likeliest first.

    Args:
        source: the training images.
        validation: the validation images.
        requested: name of the one column to read; None looks at all of them.

    Returns:
        The columns, and what is wrong with these and with others that look like classes, one sentence each.

    Raises:
        ConfigError: the requested column cannot be classes.
    """
    found, faults = [], []
    for name in _candidates(source)[:MAX_COLUMNS] if requested is None else [requested]:
        try:
            column = source.read_labels(name)
            if requested is None and not _looks_like_classes(column):
                continue
            labels = _number(source, name, column)
        except ConfigError as error:
            if requested is not None:
                raise
            faults.append(str(error))
            continue
        counts = None
        if validation is not None:
            try:
                counts = _counts(_number(validation, name, validation.read_labels(name), labels), labels)
            except ConfigError as error:
                faults.append(str(error))
        found.append(ClassColumn(name, labels.names, _counts(labels, labels), counts))
    return found, faults


def _candidates(source: Source) -> list[str]:
    """Names of the columns to look at."""
    if isinstance(source, FolderSource):
        folders = {name.rpartition("/")[0] for name in source.names}
        own = [FOLDER_COLUMN] if len(folders) > 1 and "" not in folders else []
        return own + _metadata_columns(source)
    if isinstance(source, DatasetSource):
        features = source.table.features
        declared = [name for name in features if isinstance(getattr(features[name], "names", None), list)]
        plain = [name for name in features if str(getattr(features[name], "dtype", "")).startswith(("int", "string"))]
        return declared + [name for name in plain if name not in declared]
    return ["digit"]


def _metadata_columns(source: FolderSource) -> list[str]:
    """Columns of all metadata files, without that of the names."""
    columns: dict[str, None] = {}
    for file in source.metadata:
        path = source.folder / file
        rows = read_csv_rows(path) if path.suffix == ".csv" else iter_json_rows(path, skip_partial=False)
        for row in rows:
            columns |= dict.fromkeys(row)
    return [name for name in columns if name != FILE_NAME]


def _looks_like_classes(column: Column) -> bool:
    """Whether a column has some short names or whole numbers, each for several images."""
    if column.class_names is not None:
        return True
    values = set()
    for value in column.values.values():
        if isinstance(value, bool) or not isinstance(value, str | int) or len(str(value)) > MAX_NAME:
            return False
        values.add(value)
        if len(values) > MAX_SHOWN_CLASSES:
            return False
    return 2 <= len(values) <= len(column.values) / IMAGES_PER_CLASS


def _number(source: Source, name: str, column: Column, train: ClassLabels | None = None) -> ClassLabels:
    """Number the classes as a run would."""
    label = f"column {printable(name, 60)!r} of {source.option}"
    labels = read_class_labels(label, column, list(column.values), train)
    if not labels.names:
        raise ConfigError(f"{label} holds vectors, not classes: name another --class_column")
    return labels


def _counts(labels: ClassLabels, train: ClassLabels) -> list[int]:
    counts: list[int] = np.bincount(labels.labels.numpy(), minlength=len(train.names)).tolist()
    return counts

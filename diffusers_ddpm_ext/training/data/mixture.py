"""How often the images of several sources, or of several classes, are drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.training.data.class_labels import ClassLabels, read_class_labels
from diffusers_ddpm_ext.training.data.conditions import ConditionColumns
from diffusers_ddpm_ext.training.data.sources import ColumnSource
from diffusers_ddpm_ext.training.data.weighted_turns import WeightedDraws


def read_balanced_classes(
    source: ColumnSource, names: Sequence[str], conditions: ConditionColumns | None, column: str | None
) -> ClassLabels:
    """Read the classes that ``class_balance`` draws equally often.

    Args:
        source: of the images.
        names: of the loaded images.
        conditions: of the images; their classes are taken, if they have some.
        column: with the classes otherwise.

    Raises:
        ConfigError: an image has no class, or its label is a vector.
    """
    label = f"--class_column {printable(str(column), 60)}"
    if conditions is not None and conditions.class_labels is not None:
        classes = conditions.class_labels
    else:
        classes = read_class_labels(label, source.read_labels(str(column)), names)
    if not classes.names:
        raise ConfigError(f"--class_balance: the labels of {label} are vectors, not classes: leave it out")
    return classes


def weighted_draws(
    options: DataOptions, counts: Sequence[int], rows: Tensor, classes: ClassLabels | None
) -> WeightedDraws | None:
    """How often each image is drawn; None where all are drawn equally often.

    Args:
        options: with ``dataset_weights`` or ``class_balance``.
        counts: of the images to train on, of each source.
        rows: of the images to train on, (n,).
        classes: of all images, for ``class_balance``.

    Raises:
        ConfigError: all images to train on are of one class.
    """
    if classes is not None:
        labels = classes.labels[rows]
        present, sizes = labels.unique(return_counts=True)
        if len(present) < 2:
            name = printable(classes.names[int(present[0])], 60)
            raise ConfigError(
                f"--class_balance has no effect: all images to train on are of one class, {name}: leave it out"
            )
        return WeightedDraws(labels.argsort(stable=True).split(sizes.tolist()), [1.0] * len(present))
    if options.dataset_weights is None:
        return None
    return WeightedDraws(torch.arange(len(rows)).split(list(counts)), options.dataset_weights)


def describe_sources(options: DataOptions) -> str:
    """The folders or datasets, with their shares where they are weighted: ``photos (75%) and icons (25%)``."""
    names, weights = options.data_dirs or options.dataset_names, options.dataset_weights
    if weights is not None:
        total = sum(weights) / 100
        names = tuple(f"{name} ({weight / total:.3g}%)" for name, weight in zip(names, weights, strict=True))
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def one_each(values: Sequence[str], count: int) -> Sequence[str | None]:
    """One value for each of ``count`` sources, from one for all, one each, or none."""
    return values if len(values) == count else [values[0] if values else None] * count

"""Number of images of each class, for the printed plan and the records of a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffusers_ddpm_ext.errors import printable
from diffusers_ddpm_ext.training.data.dataset import ImageData
from diffusers_ddpm_ext.training.data.image_set import ImageSet

SHOWN_CLASSES = 20
NAME_WIDTH = 40


@dataclass(frozen=True)
class ClassCount:
    """A class, by its name or its number in digits, and its images to train and to validate on."""

    name: str
    train: int
    validation: int


def count_classes(data: ImageData) -> list[ClassCount]:
    """Count the images of each class, in the order of class numbers; empty without classes, and of a stream."""
    columns = data.train.columns
    if columns is None or not columns.class_names or data.stream is not None:
        return []
    names = columns.class_names
    train, validation = _counts(data.train, len(names)), _counts(data.validation, len(names))
    return [ClassCount(*row) for row in zip(names, train, validation, strict=True)]


def _counts(images: ImageSet | None, classes: int) -> list[int]:
    if images is None or images.columns is None or images.columns.labels is None:
        return [0] * classes
    counts: list[int] = torch.bincount(images.columns.labels[images.rows], minlength=classes).tolist()
    return counts


def describe_classes(counts: list[ClassCount]) -> str:
    """A table of classes and their images as lines to print; of many classes the first, and what the others have."""
    present = [count for count in counts if count.train or count.validation]
    empty = len(counts) - len(present)
    title = f"{len(present):,} classes" if len(present) != 1 else "1 class"
    if empty:
        title += f", and {empty:,} without images"
    shown = [(printable(count.name, NAME_WIDTH), count) for count in present[:SHOWN_CLASSES]]
    width = max([len("class"), *(len(name) for name, _ in shown)])
    lines = [title, f"  {'class':<{width}}  {'train':>9}  {'validate':>9}"]
    lines += [f"  {name:<{width}}  {count.train:>9,}  {count.validation:>9,}" for name, count in shown]
    rest = [count.train for count in present[SHOWN_CLASSES:]]
    if rest:
        lines.append(f"  and {len(rest):,} more classes with {min(rest):,} to {max(rest):,} images to train on")
    untrained = [count.name for count in present if not count.train]
    if untrained:
        more = f" and {len(untrained) - 3:,} more" if len(untrained) > 3 else ""
        names = ", ".join(printable(name, NAME_WIDTH) for name in untrained[:3])
        lines.append(f"  no image to train on: {names}{more}")
    return "\n".join(lines)

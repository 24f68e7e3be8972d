"""Class labels of a run's images: which class number an image has, and the names of the classes.

A label is a name or a number, and what it is does not depend on what Python's ``int`` would accept:

    folders            names, always: `1`, `01` and `1.0` are three classes
    `ClassLabel`       of `datasets`: its numbers, and the names that it declares
    another column     numbers, if every value is a plain decimal integer (``0``, ``7``, ``12``); otherwise names
    lists              vectors of one width, for a projected embedding

Names are numbered in alphabetical order, or by value if all are plain decimal integers.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.training.config.condition_checks import MAX_CLASSES
from diffusers_ddpm_ext.training.data.row_names import distinct_values

MAX_NAME_LENGTH = 255
_DECIMAL = re.compile(r"0|[1-9][0-9]*")
_NOT_A_NUMBER = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)


@dataclass(frozen=True)
class Column:
    """A column of a source.

    Attributes:
        values: by name of the image.
        class_names: of a `ClassLabel` of `datasets`, whose values are positions in it; None for other columns.
        holds_names: whether the values are names, even those that look like numbers.
    """

    values: Mapping[str, Any]
    class_names: Sequence[str] | None = None
    holds_names: bool = False


@dataclass(frozen=True)
class ClassLabels:
    """Labels of images.

    Attributes:
        labels: (n,), int64, class numbers; or (n, width), float32, vectors.
        names: of the classes, by number: decimal digits where classes have only numbers. Empty for vectors.
        are_named: whether the classes have names.
    """

    labels: Tensor
    names: Sequence[str] = field(default=())
    are_named: bool = False


def read_class_labels(
    label: str, column: Column, images: Sequence[str], train: ClassLabels | None = None
) -> ClassLabels:
    """Read the labels of images.

    Args:
        label: the option and the column, for messages.
        column: with a value for each image.
        images: names of the images, in the order of the result.
        train: labels of the training images, for validation images: these have the same classes.

    Raises:
        ConfigError: a value is no label; the image is named.
    """
    distinct, first, numbers = distinct_values(column.values, images)
    rows = [(f"{label}: {printable(images[at])}", value) for at, value in zip(first.tolist(), distinct, strict=True)]
    if column.class_names is None and rows and isinstance(rows[0][1], list | tuple):
        every = [(f"{label}: {printable(image)}", column.values[image]) for image in images]
        return _vectors(label, [(row, list(value) if isinstance(value, tuple) else value) for row, value in every])
    classes = _read_classes(label, rows, column, train)
    return replace(classes, labels=torch.from_numpy(classes.labels.numpy()[numbers]))


def _read_classes(
    label: str, rows: Sequence[tuple[str, Any]], column: Column, train: ClassLabels | None
) -> ClassLabels:
    """The classes of different values, each with the first image that has it."""
    if column.class_names is not None:
        return _declared(rows, column.class_names, train)
    for row, value in rows:
        _check_value(row, value, column.holds_names)
    numbers = None if column.holds_names else _plain_numbers([value for _, value in rows])
    if train is not None and not train.names:
        raise ConfigError(f"{label} has classes, but the labels of the training images are vectors")
    if numbers is None or (train is not None and train.are_named):
        return _named(rows, [_text(value) for _, value in rows], train)
    return _numbered(rows, numbers, train)


def _overflows(text: str) -> bool:
    """Whether a text is a number that no float can hold."""
    try:
        return not text.strip().lstrip("+-").isdigit() and math.isinf(float(text))
    except ValueError:
        return False


def _check_value(row: str, value: Any, is_name: bool) -> None:
    """Refuse a value that is neither a name nor a class number."""
    if isinstance(value, str):
        if not value.strip():
            raise ConfigError(f"{row} has no class: its value is empty")
        if not is_name and (_NOT_A_NUMBER.fullmatch(value.strip()) or _overflows(value)):
            raise ConfigError(f"{row} has the class {value.strip()}, which stands for no value: give it a class")
        if len(value) > MAX_NAME_LENGTH:
            raise ConfigError(
                f"{row} has a class name of {len(value):,} characters ({printable(value, limit=40)}): use at most"
                f" {MAX_NAME_LENGTH}"
            )
        if any(0xD800 <= ord(character) <= 0xDFFF for character in value):
            raise ConfigError(f"{row} has the class {printable(value)}, which is not valid UTF-8: rename it")
    elif value is None or (isinstance(value, Real) and not math.isfinite(value)):
        raise ConfigError(f"{row} has no class: its value is {'empty' if value is None else value}")
    elif isinstance(value, bool) or not isinstance(value, Integral):
        what = "a fraction" if isinstance(value, Real) and not isinstance(value, bool) else type(value).__name__
        raise ConfigError(
            f"{row} has the label {printable(str(value), limit=40)} ({what}): a class is a whole number or a name,"
            " a label vector a list of numbers"
        )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(int(value))


def _plain_numbers(values: Sequence[Any]) -> list[int] | None:
    """The values as integers; None if one of them is not a plain decimal integer."""
    texts = [value.strip(" \t") if isinstance(value, str) else str(int(value)) for value in values]
    if not all(_DECIMAL.fullmatch(text.removeprefix("-")) for text in texts):
        return None
    # Python refuses to convert thousands of digits; the size of such numbers does not matter here.
    return [int(text[:20]) for text in texts]


def _numbered(rows: Sequence[tuple[str, Any]], numbers: Sequence[int], train: ClassLabels | None) -> ClassLabels:
    """Labels from class numbers; those of the training images determine how many there are."""
    limit = MAX_CLASSES if train is None else len(train.names)
    for (row, value), number in zip(rows, numbers, strict=True):
        if number < 0:
            raise ConfigError(f"{row} has the class {number}: class numbers begin at 0")
        if number >= limit:
            advice = (
                f"class numbers are below {MAX_CLASSES:,}, because the network has weights for each; use names, or"
                " numbers without gaps"
                if train is None
                else f"the training images have the classes 0 to {limit - 1}"
            )
            raise ConfigError(f"{row} has the class {printable(str(value), limit=40)}: {advice}")
    names = [str(number) for number in range(max(numbers, default=-1) + 1)] if train is None else train.names
    return ClassLabels(torch.tensor(numbers, dtype=torch.int64), names)


def _named(rows: Sequence[tuple[str, Any]], texts: Sequence[str], train: ClassLabels | None) -> ClassLabels:
    """Labels from names; those of the training images determine their numbers."""
    names = sorted(set(texts), key=_order(set(texts))) if train is None else list(train.names)
    if len(names) > MAX_CLASSES:
        raise ConfigError(f"{rows[0][0].rsplit(': ', 1)[0]} has {len(names):,} classes: use at most {MAX_CLASSES:,}")
    if train is not None and not train.are_named:
        raise ConfigError(f"{rows[0][0]} has the class {printable(texts[0])}, but the training images have numbers")
    number_of = {name: number for number, name in enumerate(names)}
    normalized = {unicodedata.normalize("NFC", name): number for name, number in number_of.items()}
    labels = []
    for (row, _), text in zip(rows, texts, strict=True):
        number = number_of.get(text)
        if number is None and len(normalized) == len(names):  # another file system may decompose accents
            number = normalized.get(unicodedata.normalize("NFC", text))
        if number is None:
            raise ConfigError(f"{row} has the class {printable(text)}, which no training image has")
        labels.append(number)
    return ClassLabels(torch.tensor(labels, dtype=torch.int64), names, are_named=True)


def _order(names: set[str]) -> Any:
    """Sort key of class names: by value where all are plain decimal integers, so that 10 comes after 9."""
    if all(_DECIMAL.fullmatch(name) for name in names):
        return lambda name: (len(name), name)
    return lambda name: name


def _declared(rows: Sequence[tuple[str, Any]], class_names: Sequence[str], train: ClassLabels | None) -> ClassLabels:
    """Labels of a `ClassLabel`: positions in the names that it declares."""
    if len(class_names) > MAX_CLASSES:
        raise ConfigError(f"{rows[0][0].rsplit(': ', 1)[0]} declares {len(class_names):,} classes: use fewer")
    for row, value in rows:
        if not isinstance(value, Integral) or not 0 <= int(value) < len(class_names):
            raise ConfigError(f"{row} has no class: its value is {value}, the {len(class_names)} classes begin at 0")
    if train is not None:  # another split may declare them in another order
        return _named(rows, [class_names[int(value)] for _, value in rows], train)
    numbers = torch.tensor([int(value) for _, value in rows], dtype=torch.int64)
    return ClassLabels(numbers, list(class_names), are_named=True)


def _vectors(label: str, rows: Sequence[tuple[str, Any]]) -> ClassLabels:
    """Labels that are vectors, one list of numbers for each image."""
    width = len(rows[0][1])
    for row, value in rows:
        if not isinstance(value, list) or len(value) != width or not width:
            raise ConfigError(
                f"{row} has another label than a list of {max(width, 1)} numbers, as the first image has"
            )
        if not all(isinstance(number, Real) and not isinstance(number, bool) for number in value):
            raise ConfigError(f"{row} has a label vector with an entry that is not a number")
    vectors = torch.tensor([[_finite(number) for number in value] for _, value in rows], dtype=torch.float32)
    wrong = torch.nonzero(~torch.isfinite(vectors).all(dim=1))
    if len(wrong):
        raise ConfigError(f"{rows[int(wrong[0])][0]} has a label vector with an entry that float32 cannot hold")
    return ClassLabels(vectors)


def _finite(number: Real) -> float:
    try:
        return float(number)
    except OverflowError:  # an integer beyond float64
        return math.inf

"""Checks of single values, and how messages show them.

Neither torch nor NumPy is imported; NumPy's scalars are numbers all the same.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffusers_ddpm_ext.errors import printable

LONGEST = 80  # characters of a value in a message


def describe(value: Any) -> str:
    """A value in a message: short ones as Python writes them, arrays and long ones as their type and size."""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and (shape or not isinstance(value, numbers.Number)):
        return f"{type(value).__name__} of {getattr(value, 'dtype', '?')}, shape {tuple(shape)}"
    if isinstance(value, (list, tuple, set, Mapping)) and len(value) > 4:
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"{'-' if value < 0 else ''}2^{abs(value).bit_length()}"
    if isinstance(value, str | bytes):
        value = value[:LONGEST] if len(value) > LONGEST else value
    elif not isinstance(value, numbers.Number | list | tuple | set | Mapping | None):
        return type(value).__name__
    return printable(repr(value), LONGEST)


def is_number(value: Any) -> bool:
    """Whether it is a real number that a float can hold (NaN and infinity included); True and False are none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def checked_number(name: str, value: Any, allowed: str, accepts: Callable[[float], bool] = math.isfinite) -> float:
    """A number as JSON can hold it.

    Args:
        name: of the argument.
        value: what the caller passed.
        allowed: what it must be, for the message.
        accepts: whether a number is allowed.

    Raises:
        ValueError: it is no number, or not an allowed one.
    """
    if not is_number(value) or not accepts(value):
        raise ValueError(f"{name}={describe(value)} must be {allowed}.")
    plain: float = value if type(value) in (int, float) else getattr(value, "item", value.__float__)()
    return plain


def checked_integer(name: str, value: Any, allowed: str = "an integer", low: int = -(2**53), high: int = 2**53) -> int:
    """An integer in [low, high], also NumPy's or of a 0-dim tensor; ValueError for booleans and everything else."""
    try:
        number = None if type(value).__name__.startswith("bool") else operator.index(value)
    except TypeError:
        number = None
    if number is None or not low <= number <= high:
        raise ValueError(f"{name}={describe(value)} must be {allowed}.")
    return number


def checked_flag(name: str, value: Any) -> bool:
    """True or False, also NumPy's and 0 or 1; else ValueError."""
    is_flag = type(value).__name__.startswith("bool") or isinstance(value, numbers.Integral)
    if is_flag and value in (0, 1):
        return bool(value)
    raise ValueError(f"{name}={describe(value)} must be True or False.")


def check_one_of(name: str, value: Any, allowed: Sequence[str], way_out: str = "") -> None:
    """Raise ValueError unless the value is one of the names; ``way_out`` ends the message."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}={describe(value)} is unknown: choose one of {', '.join(allowed)}{way_out}.")

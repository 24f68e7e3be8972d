"""Checks of the options that select and drop conditions, against the conditioning key of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.utils.vocabulary import REQUIRED_CONDITIONS

COLUMN_OPTIONS = {
    "class_labels": "class_column",
    "concat_inputs": "concat_column",
    "encoder_hidden_states": "context_column",
}
MAX_CLASSES = 100_000
"""More would be image numbers or dates by mistake: the network has a row of weights for each."""


@dataclass(frozen=True)
class Dropped:
    """How often a condition is dropped, and what replaces it; None selects the default."""

    probability: float
    null: float | None


def select_columns(
    conditioning_key: str | None, options: Mapping[str, Any], default_class_column: str | None
) -> dict[str, str]:
    """Column of each condition that a run needs.

    Args:
        conditioning_key: of the run.
        options: names of the columns, by option.
        default_class_column: of the images' source.

    Raises:
        ConfigError: a column is missing, or named without effect.
    """
    columns: dict[str, str] = {}
    for condition, option in COLUMN_OPTIONS.items():
        column = options[option]
        if condition in REQUIRED_CONDITIONS[conditioning_key]:
            column = default_class_column if column is None and condition == "class_labels" else column
            if column is None:
                raise ConfigError(
                    f"--conditioning_key {conditioning_key} needs --{option}: the column with its {condition}"
                )
            columns[condition] = column
        elif column is not None:
            raise ConfigError(
                f"--{option} {column} has no effect with --conditioning_key {conditioning_key or 'none'}"
            )
    return columns


def read_dropout(option: Mapping[str, Any] | None, conditioning_key: str | None) -> dict[str, Dropped]:
    """The conditions that are dropped, from ``--conditioning_dropout``.

    Args:
        option: condition to probability, or to ``{"p": probability, "val": null value}``.
        conditioning_key: of the run.

    Raises:
        ConfigError: the run has no such condition, or a number is out of range.
    """
    dropped = {}
    for name, value in (option or {}).items():
        label = f"--conditioning_dropout {printable(name, 60)!r}"
        if name not in REQUIRED_CONDITIONS[conditioning_key]:
            allowed = ", ".join(REQUIRED_CONDITIONS[conditioning_key]) or "none, without --conditioning_key"
            raise ConfigError(f"{label}: the conditions of this run are {allowed}")
        entry = value if isinstance(value, Mapping) else {"p": value}
        if set(entry) - {"p", "val"} or not _is_number(entry.get("p")) or not 0 <= entry["p"] <= 1:
            raise ConfigError(f"{label} must be a probability, or {{'p': 0.1, 'val': 0}}")
        null = entry.get("val")
        if null is not None and not _is_number(null):
            raise ConfigError(f"{label}: val {printable(str(null), 60)!r} must be a finite number")
        dropped[name] = Dropped(float(entry["p"]), null)
    return dropped


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 2**64 if isinstance(value, int) else math.isfinite(value)

"""Checks of the options that select and drop conditions, against the conditioning key of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.utils.vocabulary import CLASS_TOKEN_KEYS, required_conditions

COLUMN_OPTIONS = {
    "class_labels": "class_column",
    "concat_inputs": "concat_column",
    "encoder_hidden_states": "context_column",
    "captions": "caption_column",
}
TEXT_FILES = "txt"
"""Name of --caption_column that reads the text file beside each image of a folder."""
MAX_CLASSES = 100_000
"""More would be image numbers or dates by mistake: the network has a row of weights for each."""


@dataclass(frozen=True)
class Dropped:
    """How often a condition is dropped, and what replaces it; None selects the default."""

    probability: float
    null: float | None


def embeds_classes(conditioning_key: str | None, options: Mapping[str, Any]) -> bool:
    """Whether classes become tokens of cross attention: no column has these, but one has classes, or the digits do.

    Args:
        conditioning_key: of the run.
        options: of section ``data``, by name.
    """
    if conditioning_key not in CLASS_TOKEN_KEYS:
        return False
    if options["context_column"] is not None or options["caption_column"] is not None:
        return False
    on_digits = options["train_data_dir"] is None and options["dataset_name"] is None
    return on_digits or options["class_column"] is not None


def data_conditions(conditioning_key: str | None, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Conditions that the data of a run has: captions or classes in place of embeddings where these are made of them.

    Args:
        conditioning_key: of the run.
        options: of section ``data``, by name.
    """
    names = required_conditions(conditioning_key, embeds_classes(conditioning_key, options))
    if options["caption_column"] is None:
        return names
    return tuple("captions" if name == "encoder_hidden_states" else name for name in names)


def select_columns(
    conditioning_key: str | None, options: Mapping[str, Any], default_class_column: str | None
) -> dict[str, str]:
    """Column of each condition that a run needs.

    Args:
        conditioning_key: of the run.
        options: of section ``data``, by name.
        default_class_column: of the images' source.

    Raises:
        ConfigError: a column is missing, or named without effect.
    """
    columns: dict[str, str] = {}
    balances = options.get("class_balance", False)
    if balances and options["class_column"] is None and default_class_column is None:
        raise ConfigError("--class_balance needs --class_column: the column with the class of each image")
    required = data_conditions(conditioning_key, options)
    for condition, option in COLUMN_OPTIONS.items():
        column = options[option]
        if condition in required:
            column = default_class_column if column is None and condition == "class_labels" else column
            if column is None:
                tokens = condition == "encoder_hidden_states" and conditioning_key in CLASS_TOKEN_KEYS
                raise ConfigError(
                    f"--conditioning_key {conditioning_key} needs --{option}: the column with its {condition}"
                    + (", --caption_column with --text_encoder" if condition == "encoder_hidden_states" else "")
                    + (", or --class_column: a token is then trained for each class" if tokens else "")
                )
            columns[condition] = column
        elif column is not None and condition == "encoder_hidden_states" and "captions" in required:
            raise ConfigError(
                f"--{option} {column} and --caption_column {options['caption_column']} both fill the cross attention:"
                " leave one of them out"
            )
        elif column is not None and not (condition == "class_labels" and balances):
            raise ConfigError(
                f"--{option} {column} has no effect with --conditioning_key {conditioning_key or 'none'}"
            )
    return columns


def read_dropout(option: Mapping[str, Any] | None, required: Sequence[str]) -> dict[str, Dropped]:
    """The conditions that are dropped, from ``--conditioning_dropout``.

    Args:
        option: condition to probability, or to ``{"p": probability, "val": null value}``.
        required: conditions of the run.

    Raises:
        ConfigError: the run has no such condition, or a number is out of range.
    """
    dropped = {}
    for name, value in (option or {}).items():
        label = f"--conditioning_dropout {printable(name, 60)!r}"
        if name not in required:
            allowed = ", ".join(required) or "none, without --conditioning_key"
            raise ConfigError(f"{label}: the conditions of this run are {allowed}")
        entry = value if isinstance(value, Mapping) else {"p": value}
        if name == "captions" and entry.get("val") == "":
            entry = {"p": entry.get("p")}  # the empty prompt, as in CompVis' configurations
        if set(entry) - {"p", "val"} or not _is_number(entry.get("p")) or not 0 <= entry["p"] <= 1:
            raise ConfigError(f"{label} must be a probability, or {{'p': 0.1, 'val': 0}}")
        null = entry.get("val")
        if null is not None and name == "captions":
            raise ConfigError(f"{label}: val {printable(str(null), 60)!r} must be left out: the empty prompt is used")
        if null is not None and not _is_number(null):
            raise ConfigError(f"{label}: val {printable(str(null), 60)!r} must be a finite number")
        dropped[name] = Dropped(float(entry["p"]), null)
    return dropped


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 2**64 if isinstance(value, int) else math.isfinite(value)

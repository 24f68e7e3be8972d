"""Values of options: text or YAML to the declared type, with choices and range checked."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.utils.option import Option

TRUE, FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}
NONE = {"none", "null"}
LIMITS = {"low": "at least", "above": "above", "high": "at most", "below": "below"}


def convert_value(option: Option, value: Any, label: str) -> Any:
    """Convert a value, from the command line (text, or a list of texts) or YAML, to the option's type, and check it.

    Raises:
        ConfigError: it cannot be read as that type, is not one of the choices, or is out of range; ``label`` names
            the option in the message.
    """
    is_none = isinstance(value, str) and value.lower() in NONE and option.hint not in (str, Path)
    if isinstance(value, str) and option.metadata["none"] == value:
        return None
    if value is None or (is_none and option.optional and not option.choices):
        if option.optional and not (is_none and option.element is int):
            return None
        if value is None:
            raise ConfigError(f"{label} takes {expected_value(option)}, got nothing: leave it out for the default")
    read = _READERS.get(option.hint, _read_tuple if option.element else _read_dict)
    try:
        result = (_read_choice if option.choices else read)(option, value)
    except (ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            colon = "" if str(error).startswith("'") else ":"
            raise ConfigError(f"{label}{colon} {error}") from None
        text = " ".join(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value
        raise ConfigError(f"{label} takes {expected_value(option)}, got {text!r}") from None
    _check_range(option, result, label)
    return result


def expected_value(option: Option) -> str:
    """What an option takes, for messages."""
    if option.choices:
        return f"one of {', '.join(map(str, option.choices))}"
    if option.hint == tuple[int, int]:
        return "one or two whole numbers"
    if option.metadata["none"]:
        return f"{option.metadata['none']} or a whole number"
    if option.takes_pairs:
        return "KEY=VALUE pairs"
    if option.element is float:
        return (
            "a list of numbers in JSON, or a .json or .npy file that holds one"
            if option.length is None
            else f"{option.length} numbers"
        )
    if option.element:
        return "text" if option.element is str else "whole numbers"
    kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return kinds.get(option.hint, "a JSON object")


def unknown_option(
    name: str, known: Iterable[str], dashes: str = "--", explain: Callable[[str], str | None] | None = None
) -> ConfigError:
    """The error for a flag or key that does not exist.

    Args:
        name: the flag without its dashes, or the key.
        known: the names that exist.
        dashes: what stands before a name on the command line; nothing for a key.
        explain: answers names of other programs; None: it has no answer.

    Returns:
        The error, to be raised; it explains another program's name, or suggests the nearest one.
    """
    explanation = None if explain is None else explain(name)
    if explanation is not None:
        return ConfigError(explanation)
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"did you mean {dashes}{near[0]}?" if near else "--help lists those that exist"
    return ConfigError(f"unknown {'option' if dashes else 'key'} {dashes}{name}: {hint}")


def _check_range(option: Option, value: Any, label: str) -> None:
    limits = option.metadata["limits"]
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        out_of_range = (
            ("low" in limits and number < limits["low"])
            or ("high" in limits and number > limits["high"])
            or ("above" in limits and number <= limits["above"])
            or ("below" in limits and number >= limits["below"])
        )
        if out_of_range:
            allowed = " and ".join(f"{text} {limits[key]:g}" for key, text in LIMITS.items() if key in limits)
            raise ConfigError(f"{label} must be {allowed}, got {number}")


def _finite_number(kind: type, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)) or (kind is int and type(value) is float):
        raise ValueError
    number = kind(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _read_int(option: Option, value: Any) -> int:
    return int(_finite_number(int, value))


def _read_float(option: Option, value: Any) -> float:
    return float(_finite_number(float, value))


def _read_bool(option: Option, value: Any) -> bool:
    text = str(value).lower() if isinstance(value, (bool, str)) else ""
    if text not in TRUE | FALSE:
        raise ValueError
    return text in TRUE


def _read_str(option: Option, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError
    return value


def _read_path(option: Option, value: Any) -> Path:
    return Path(_read_str(option, value))


def _read_choice(option: Option, value: Any) -> Any:
    if value is False and "no" in option.choices:  # YAML 1.1 reads a bare `no` as false
        return "no"
    for choice in option.choices:
        if str(choice) == str(value):
            return choice
    if value in option.metadata["answers"]:
        raise ConfigError(option.metadata["answers"][value])
    near = difflib.get_close_matches(str(value), map(str, option.choices), n=1)
    hint = f": did you mean {near[0]}?" if near else ""
    raise ConfigError(f"{value!r} is not {expected_value(option)}{hint}")


def _read_texts(option: Option, value: Any) -> tuple[str, ...]:
    value = value.split() if isinstance(value, str) else value
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(v, str) and v.strip() for v in value):
        raise ValueError
    return tuple(value)


def _read_tuple(option: Option, value: Any) -> tuple[Any, ...]:
    if option.hint == tuple[float, ...]:
        value = _read_number_list(value) if isinstance(value, str) else value
        if value == []:
            raise ValueError
    elif isinstance(value, (str, int)):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise ValueError
    if all(isinstance(v, str) for v in value):
        value = [part for part in re.split(r"[\s,]+|(?<=\d)x(?=\d)", " ".join(value)) if part]
        value = [] if [part.lower() for part in value] in ([word] for word in NONE) else value
    numbers = tuple(_finite_number(option.element or float, v) for v in value)
    if option.length is not None:
        numbers = numbers * 2 if len(numbers) == 1 and option.hint == tuple[int, int] else numbers
        if len(numbers) != option.length:
            raise ValueError
    return numbers


def _read_number_list(text: str) -> Any:
    """Numbers from a JSON list in place, or from a file that holds one."""
    if text.lstrip().startswith("["):
        return json.loads(text)
    path = Path(text)
    if path.suffix not in (".json", ".npy"):
        raise ValueError
    try:
        if path.suffix == ".json":
            return json.loads(path.read_text())
        import numpy as np

        table = np.load(path, allow_pickle=False)
        return table.tolist()
    except OSError as error:
        raise ConfigError(f"cannot read {text}: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"{text} does not hold a list of numbers: {error}") from None


def _read_dict(option: Option, value: Any) -> dict[str, Any]:
    if option.takes_pairs and isinstance(value, list):
        return dict(map(_read_pair, value))
    value = json.loads(value) if isinstance(value, str) else value
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError
    return dict(value)


def _read_pair(text: str) -> tuple[str, Any]:
    """KEY=VALUE; numbers, true, false and null are read as such."""
    key, equals, value = text.partition("=")
    if not (equals and key.isidentifier()):
        raise ConfigError(f"{text!r} is not KEY=VALUE, e.g. timestep_spacing=trailing")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


_READERS: dict[Any, Callable[[Option, Any], Any]] = {
    int: _read_int,
    float: _read_float,
    bool: _read_bool,
    str: _read_str,
    Path: _read_path,
    tuple[str, ...]: _read_texts,
}

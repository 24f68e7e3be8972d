"""Values of options: text or YAML to the declared type, with choices and range checked."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.utils.input_files import check_nesting, parse_json, read_json
from diffusers_ddpm_ext.utils.option import Option

TRUE, FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}
NONE = {"none", "null"}
MAX_INTEGER = 2**63 - 1
MAX_ELEMENTS = 1_000_000
MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4096
LIMITS = {"low": "at least", "above": "above", "high": "at most", "below": "below"}


def convert_value(option: Option, value: Any, label: str) -> Any:
    """Convert a value, from the command line (text, or a list of texts) or YAML, to the option's type, and check it.

    Raises:
        ConfigError: it cannot be read as that type, is not one of the choices, or is out of range; ``label`` names
            the option in the message.
    """
    if option.metadata["several"] and isinstance(value, list | tuple) and len(value) == 1:
        value = value[0] if isinstance(value[0], str | int | float) else value
    is_none = isinstance(value, str) and value.lower() in NONE and option.hint not in (str, Path)
    if value and isinstance(value, str) and option.metadata["none"] == value:
        return None
    if isinstance(value, str) and value in option.words:
        return value
    if option.metadata["bare"] and str(value).lower() in ("true", "false"):
        value = option.metadata["bare"] if str(value).lower() == "true" else None
    if option.metadata["several"] and option.hint is str and isinstance(value, list | tuple):
        return _read_several(option, value, label)
    if value is None or (is_none and option.optional and not option.choices):
        if option.optional and not (is_none and option.element is int):
            return None
        if value is None:
            raise ConfigError(f"{label} takes {expected_value(option)}, got nothing: leave it out for the default")
    read = _READERS.get(option.hint, _read_tuple if option.element else _read_dict)
    try:
        result = (_read_choice if option.choices else read)(option, value)
    except (ValueError, TypeError, OverflowError) as error:
        if isinstance(error, ConfigError):
            colon = "" if str(error).startswith("'") else ":"
            raise ConfigError(f"{label}{colon} {error}") from None
        text = " ".join(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value
        raise ConfigError(f"{label} takes {expected_value(option)}, got {_shown(text)}") from None
    _check_range(option, result, label)
    return result


def _read_several(option: Option, values: Sequence[Any], label: str) -> tuple[str, ...]:
    """Several texts, each converted and checked."""
    if not values or not all(isinstance(value, str) for value in values):
        raise ConfigError(f"{label} takes {expected_value(option)}, or a list of such, got {_shown(values)}")
    return tuple(convert_value(option, value, label) for value in values)


def expected_value(option: Option) -> str:
    """What an option takes, for messages."""
    if option.choices:
        return f"one of {', '.join(map(str, option.choices))}"
    if option.words:
        return f"a {'whole ' if option.hint is int else ''}number, or {' or '.join(option.words)}"
    if option.hint == tuple[int, int]:
        return "one or two whole numbers"
    if option.metadata["none"]:
        return f"{option.metadata['none']} or a whole number"
    if option.takes_pairs:
        return "KEY=VALUE pairs"
    if option.element is float and option.metadata["several"]:
        return "numbers"
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
    near = difflib.get_close_matches(name[:MAX_NAME_BYTES], list(known), n=1)
    hint = f"did you mean {dashes}{near[0]}?" if near else "--help lists those that exist"
    return ConfigError(f"unknown {'option' if dashes else 'key'} {dashes}{printable(name, 80)}: {hint}")


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
    if not math.isfinite(number) or (kind is int and abs(number) > MAX_INTEGER):
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
    if option.is_path:
        return expand_path(value)
    check_nesting(value, "the value")  # a lone surrogate, from bytes that are not UTF-8
    return value


def _read_path(option: Option, value: Any) -> Path:
    return Path(_read_str(option, value))


def expand_path(text: str) -> str:
    """A path with the home folder of ``~`` or ``~user`` in full, as a shell would have written it.

    Raises:
        ConfigError: there is no such user, or no file can have this name.
    """
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        user = printable(expanded.split("/")[0], 80)
        if expanded == text and not os.path.lexists(text):
            raise ConfigError(
                f"{printable(text, 200)} begins with {user}: there is no such user; ./{user} is a folder"
            )
    encoded = os.fsencode(expanded)
    longest = max(map(len, encoded.split(b"/")))
    if b"\0" in encoded or longest > MAX_NAME_BYTES or len(encoded) > MAX_PATH_BYTES:
        what = "holds a NUL" if b"\0" in encoded else f"has a name of {longest:,} bytes"
        raise ConfigError(f"{printable(text, 80)} {what}: no file can have that name")
    return expanded


def _read_choice(option: Option, value: Any) -> Any:
    if value is False and "no" in option.choices:  # YAML 1.1 reads a bare `no` as false
        return "no"
    for choice in option.choices:
        if str(choice) == str(value):
            return choice
    if value in option.metadata["answers"]:
        raise ConfigError(option.metadata["answers"][value])
    near = difflib.get_close_matches(str(value)[:MAX_NAME_BYTES], map(str, option.choices), n=1)
    hint = f": did you mean {near[0]}?" if near else ""
    raise ConfigError(f"{_shown(value)} is not {expected_value(option)}{hint}")


def _shown(value: Any) -> str:
    """A value in a message: its start and end, if it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        text = type(value).__name__
    return printable(text, 200)


def _read_texts(option: Option, value: Any) -> tuple[str, ...]:
    phrases = option.metadata["phrases"]
    if isinstance(value, str):
        value = [value] if phrases else value.split()
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(text, str) for text in value):
        raise ValueError
    if phrases:
        check_nesting(list(value), "the value")  # a lone surrogate, from bytes that are not UTF-8
    elif not all(text.strip() for text in value):
        raise ValueError
    return tuple(expand_path(text) for text in value) if option.is_path else tuple(value)


def _read_tuple(option: Option, value: Any) -> tuple[Any, ...]:
    if option.hint == tuple[float, ...] and not option.metadata["several"]:
        value = _read_number_list(value) if isinstance(value, str) else value
        if value == []:
            raise ValueError
    elif isinstance(value, (str, int, float)):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise ValueError
    if all(isinstance(v, str) for v in value):
        value = [part for part in re.split(r"[\s,]+|(?<=\d)x(?=\d)", " ".join(value)) if part]
        value = [] if [part.lower() for part in value] in ([word] for word in NONE) else value
    if len(value) > MAX_ELEMENTS:
        raise ConfigError(f"{len(value):,} numbers are too many: at most {MAX_ELEMENTS:,}")
    if not value and option.metadata["several"]:
        raise ValueError
    numbers = tuple(_finite_number(option.element or float, v) for v in value)
    if option.length is not None:
        numbers = numbers * 2 if len(numbers) == 1 and option.hint == tuple[int, int] else numbers
        if len(numbers) != option.length:
            raise ValueError
    return numbers


def _read_number_list(text: str) -> Any:
    """Numbers from a JSON list in place, or from a file that holds one."""
    if text.lstrip().startswith("["):
        return parse_json(text, "the list")
    path = Path(expand_path(text))
    if path.suffix not in (".json", ".npy"):
        raise ValueError
    if path.suffix == ".npy":
        from diffusers_ddpm_ext.utils.array_files import read_array  # not at the top: `--help` does not load NumPy

        numbers = read_array(path).tolist()
    else:
        numbers = read_json(path)
    if not isinstance(numbers, list):
        raise ConfigError(f"{printable(text, 200)} does not hold a list of numbers")
    return numbers


def _read_dict(option: Option, value: Any) -> dict[str, Any]:
    if option.takes_pairs and isinstance(value, list):
        return dict(map(_read_pair, value))
    value = parse_json(value, "the JSON object") if isinstance(value, str) else value
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError
    check_nesting(value, "the object")
    _check_numbers(value)
    return dict(value)


def _check_numbers(value: Any) -> None:
    """Refuse numbers that are not finite, or integers that nobody means, anywhere in lists and objects."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{value} is not a finite number")
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise ConfigError(f"an integer of over {len(str(MAX_INTEGER))} digits is too large")
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    for item in inner:
        _check_numbers(item)


def _read_pair(text: str) -> tuple[str, Any]:
    """KEY=VALUE; numbers, true, false and null are read as such."""
    key, equals, value = text.partition("=")
    if not (equals and key.isidentifier()):
        raise ConfigError(f"{text!r} is not KEY=VALUE, e.g. timestep_spacing=trailing")
    try:
        json.loads(value, parse_int=str)
    except RecursionError:
        pass  # the reader below says so
    except ValueError:
        check_nesting(value, key)
        return key, value
    return key, parse_json(value, key)


_READERS: dict[Any, Callable[[Option, Any], Any]] = {
    int: _read_int,
    float: _read_float,
    bool: _read_bool,
    str: _read_str,
    Path: _read_path,
    tuple[str, ...]: _read_texts,
}

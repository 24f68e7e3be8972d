"""Names of classes, as a pipeline's config keeps them: ``id2label``, the form of Diffusers' DiTPipeline.

Imports neither torch nor Diffusers: a command checks names before it loads a network.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError, printable

MAX_CLASSES = 1_000_000
SHOWN_NAMES = 8


def read_class_names(id2label: Any, where: str = "id2label") -> dict[int, str]:
    """Check and convert the names of classes.

    Args:
        id2label: class number (an integer, or its decimal digits, as JSON keeps keys) -> name; None for none.
        where: how messages call it.

    Returns:
        The names by number, ascending; empty without names.

    Raises:
        ConfigError: it is not such a mapping, or a number is there twice.
    """
    if id2label is None:
        return {}
    if not isinstance(id2label, Mapping):
        raise ConfigError(f"{where} is {_shown(id2label)}; it must map class numbers to names.")
    if len(id2label) > MAX_CLASSES:
        raise ConfigError(f"{where} names {len(id2label):,} classes; at most {MAX_CLASSES:,} are allowed.")
    names: dict[int, str] = {}
    for key, name in id2label.items():
        number = _class_number(key)
        if number is None:
            raise ConfigError(f"{where} has the key {_shown(key)}; keys are class numbers, 0 or more.")
        if not isinstance(name, str) or not name.strip():
            raise ConfigError(f"{where} names class {number} {_shown(name)}; a name is a text that is not empty.")
        if number in names:
            raise ConfigError(f"{where} names class {number} twice; keep one of the names.")
        names[number] = name
    return dict(sorted(names.items()))


def labels_of_names(labels: Any, names: Mapping[int, str]) -> Any:
    """Class labels of a call with numbers in place of names.

    Args:
        labels: a name, a number, or several in a list or tuple; anything else is returned as it is.
        names: from `read_class_names`.

    Raises:
        ConfigError: as `label_of_name`.
    """
    if isinstance(labels, str):
        return label_of_name(labels, names)
    if isinstance(labels, list | tuple) and any(isinstance(label, str) for label in labels):
        return [label_of_name(label, names) if isinstance(label, str) else label for label in labels]
    return labels


def label_of_name(name: str, names: Mapping[int, str]) -> int:
    """The number of a class by its name, or, as in ImageNet's names, by a part of it between commas.

    Args:
        name: the whole name has priority over a part.
        names: from `read_class_names`.

    Raises:
        ConfigError: no class, or more than one, has this name; the message has the nearest.
    """
    for matches in (
        [number for number, known in names.items() if known == name],
        [number for number, known in names.items() if name in map(str.strip, known.split(","))],
    ):
        if len(matches) > 1:
            numbers = ", ".join(map(str, matches[:SHOWN_NAMES]))
            raise ConfigError(f"class_labels {_shown(name)} names the classes {numbers}: give the number of one.")
        if matches:
            return matches[0]
    if not names:
        raise ConfigError(f"class_labels {_shown(name)}: the classes of this model have no names; give numbers.")
    folded = {known.casefold(): known for known in names.values()}
    near = difflib.get_close_matches(name.casefold(), list(folded), n=1, cutoff=0.5)
    if near:
        raise ConfigError(f"class_labels {_shown(name)} is not a class; did you mean {_shown(folded[near[0]])}?")
    first = ", ".join(_shown(known) for known in list(names.values())[:SHOWN_NAMES])
    more = f" and {len(names) - SHOWN_NAMES:,} more" if len(names) > SHOWN_NAMES else ""
    raise ConfigError(f"class_labels {_shown(name)} is not a class; the classes are {first}{more}.")


def _class_number(key: Any) -> int | None:
    if isinstance(key, int) and not isinstance(key, bool):
        return key if key >= 0 else None
    digits = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 19
    return int(key) if digits and (key == "0" or not key.startswith("0")) else None


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return printable(text, 80)

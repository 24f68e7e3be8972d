"""Options declared as dataclass fields: help, default, type, choices and range of each in one place.

A command of `ddpm-ext`, or a section of a training configuration, is a frozen dataclass whose fields are made by
`option`, `positional` and `embedded`. From them come the flags, ``--help``, the keys of a YAML file, the conversion of
text to values, and the checks of single values (`option_values`). This module imports nothing heavy.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def option(
    default: T,
    help: str,
    *,
    alias: tuple[str, ...] = (),
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    answers: Mapping[str, str] | None = None,
    unset: str = "",
    none: str = "",
    metavar: str = "",
    flag: str = "",
    path: bool = False,
    bare: str = "",
    phrases: bool = False,
    several: bool = False,
) -> T:
    """Declare an option as a dataclass field. Its type is the field's annotation; a `Literal` lists the choices.

    Args:
        default: value where the option is not set.
        help: one or two sentences, units included; ``--help`` adds the choices and the default.
        alias: other names of the flag.
        low: smallest value allowed (of every element, for a tuple).
        above: the value must be larger than this.
        high: largest value allowed.
        below: the value must be smaller than this.
        answers: for a choice, values of other programs and what to use instead.
        unset: what ``--help`` shows as the default instead of None.
        none: text that stands for None on the command line, such as ``all``.
        metavar: placeholder of the value in ``--help``; by default from the type. ``KEY=VALUE`` for a dict that takes
            several pairs instead of a JSON object.
        flag: name of the flag where it is not the field's, such as ``from``.
        path: whether its text is, or may be, a path on this machine: ``~`` is the home folder.
        bare: value of a flag without a value; true and false, on the command line or in YAML, stand for it and None.
        phrases: for several texts: whether they are prompts, which may be empty, and of which one may have spaces.
        several: whether the flag takes several texts or numbers, separated by spaces. One text stays a text, which
            may have spaces; several become a tuple.

    Returns:
        A `dataclasses.Field`, typed as its value.
    """
    limits = {"low": low, "above": above, "high": high, "below": below}
    metadata = {
        "help": help,
        "alias": alias,
        "limits": {name: limit for name, limit in limits.items() if limit is not None},
        "answers": answers or {},
        "unset": unset or none,
        "none": none,
        "metavar": metavar,
        "flag": flag,
        "path": path,
        "bare": bare,
        "phrases": phrases,
        "several": several,
    }
    declared: Any = (
        field(default_factory=lambda: type(default)(default), metadata=metadata)
        if isinstance(default, dict)
        else field(default=default, metadata=metadata)
    )
    return declared


def positional(metavar: str, help: str, default: Any = MISSING, *, path: bool = False) -> Any:
    """Declare a positional argument as a dataclass field; without a default it is required.

    ``metavar`` is its name in ``--help`` and in messages, such as ``FOLDER``; ``path`` as in `option`.
    """
    declared: Any = option(default, help, metavar=metavar, path=path)
    declared.metadata = types.MappingProxyType({**declared.metadata, "positional": True})
    return declared


def option_like(cls: type, name: str) -> Any:
    """Declare an option as another dataclass does; the annotation must be the same."""
    declared = next(item for item in fields(cls) if item.name == name)
    return field(default=declared.default, default_factory=declared.default_factory, metadata=declared.metadata)


def embedded(section: type, description: str) -> dict[str, Any]:
    """Declare a field that holds the options of another section that were typed: converted values by name.

    ``description`` is the text above its flags in ``--help``, instead of the section's docstring.
    """
    declared: Any = field(default_factory=dict, metadata={"section": section, "help": description})
    return declared


@dataclass(frozen=True)
class Option:
    """An option as its dataclass declares it.

    Attributes:
        name: of the field; also the YAML key.
        section: name of the section that holds it, in a training configuration.
        hint: its type without None.
        optional: whether None is allowed.
        words: texts that it takes besides values of its type, declared as ``float | Literal[...]``.
        default: value where it is not set.
        metadata: the remaining arguments of `option`.
    """

    name: str
    section: str
    hint: Any
    optional: bool
    words: tuple[str, ...]
    default: Any
    metadata: Mapping[str, Any]

    @property
    def flag(self) -> str:
        """Name of the flag, without dashes."""
        return self.metadata["flag"] or self.name

    @property
    def is_positional(self) -> bool:
        """Whether it is an argument without a flag."""
        return "positional" in self.metadata

    @property
    def has_default(self) -> bool:
        """Whether it may be left out."""
        return self.default is not MISSING

    @property
    def is_path(self) -> bool:
        """Whether its text is, or may be, a path on this machine."""
        return self.hint is Path or bool(self.metadata["path"])

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values allowed, if it is a choice."""
        return get_args(self.hint) if get_origin(self.hint) is Literal else ()

    @property
    def element(self) -> type | None:
        """Type of the elements, if it is a tuple."""
        return get_args(self.hint)[0] if get_origin(self.hint) is tuple else None

    @property
    def length(self) -> int | None:
        """Number of elements, if it is a tuple of fixed length."""
        return len(get_args(self.hint)) if self.element and get_args(self.hint)[-1] is not ... else None

    @property
    def takes_pairs(self) -> bool:
        """Whether it is a dict written as KEY=VALUE pairs."""
        return bool(self.metadata["metavar"] == "KEY=VALUE")


def options_of(cls: type, section: str = "") -> dict[str, Option]:
    """The options that a dataclass declares, by name, in the order of the fields; embedded sections are left out."""
    options, hints = {}, get_type_hints(cls)
    for item in fields(cls):
        if "section" in item.metadata:
            continue
        hint, optional, words = hints[item.name], False, ()
        if get_origin(hint) in (Union, types.UnionType):
            parts = get_args(hint)
            hint, optional = next(part for part in parts if part is not type(None)), type(None) in parts
            words = next((get_args(part) for part in parts if get_origin(part) is Literal and part is not hint), ())
        default = item.default if item.default_factory is MISSING else item.default_factory()
        options[item.name] = Option(item.name, section, hint, optional, words, default, item.metadata)
    return options

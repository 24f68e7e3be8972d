"""From options to flags and back: the argument parser, and one conversion for flags and YAML alike."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.config.foreign_flags import answer
from diffusers_ddpm_ext.training.config.options import SECTIONS

TRUE, FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}
UNSET = {"none", "null"}


@dataclass(frozen=True)
class Option:
    """What a field of a section says about itself.

    Attributes:
        name: flag and key.
        section: the section it stands in.
        hint: its type without None.
        optional: whether None is allowed.
        default: value when nobody says otherwise.
        metadata: help, aliases, limits; see `options.option`.
    """

    name: str
    section: str
    hint: Any
    optional: bool
    default: Any
    metadata: Mapping[str, Any]

    @property
    def choices(self) -> tuple[str, ...]:
        """The words allowed, if it is a choice."""
        return get_args(self.hint) if get_origin(self.hint) is Literal else ()

    @property
    def element(self) -> type | None:
        """Type of the elements, if it is a tuple."""
        return get_args(self.hint)[0] if get_origin(self.hint) is tuple else None

    @property
    def is_pair(self) -> bool:
        """Whether it is height and width."""
        return self.hint == tuple[int, int]

    @property
    def wants(self) -> str:
        """What it takes, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.is_pair:
            return "one or two whole numbers"
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        if self.element is float:
            return "a list of numbers in JSON, or a .json or .npy file that holds one"
        if self.element is str:
            return "words"
        return "whole numbers" if self.element else words.get(self.hint, "a JSON object")


def _options() -> dict[str, Option]:
    found = {}
    for section, cls in SECTIONS.items():
        hints = get_type_hints(cls)
        for item in fields(cls):
            hint, optional = hints[item.name], False
            if get_origin(hint) in (Union, types.UnionType):
                rest = [part for part in get_args(hint) if part is not type(None)]
                hint, optional = rest[0], True
            found[item.name] = Option(item.name, section, hint, optional, item.default, item.metadata)
    return found


OPTIONS = _options()
CANONICAL = {name: name for name in OPTIONS} | {a: o.name for o in OPTIONS.values() for a in o.metadata["alias"]}
SWITCHES = {f"no_{name}": option for name, option in OPTIONS.items() if option.hint is bool}


def unknown(name: str, known: Iterable[str], *, flag: bool, words: bool = True) -> ConfigError:
    """The error for a flag or key that does not exist: another program's word answered, or the nearest name.

    Args:
        name: the flag without its dashes, or the key.
        known: the names that exist.
        flag: whether it is a flag.
        words: whether other programs' words for a training run are answered.

    Returns:
        The error, to be raised.
    """
    told = answer(name) if words else None
    if told is not None:
        return ConfigError(told)
    dashes = "--" if flag else ""
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"did you mean {dashes}{near[0]}?" if near else "--help lists those that exist"
    return ConfigError(f"unknown {'option' if flag else 'key'} {dashes}{name}: {hint}")


def convert(option: Option, value: Any, label: str) -> Any:
    """A value as it stands on the command line (text) or in YAML, as what the option takes.

    Args:
        option: what is wanted.
        value: text, a list of texts, or whatever YAML or Python holds.
        label: how to call the option in an error.

    Returns:
        The value in the option's type.

    Raises:
        ConfigError: it cannot be read as that type.
    """
    unset = isinstance(value, str) and value.lower() in UNSET and option.hint is not str
    if value is None or (unset and option.optional and not option.choices):
        if option.optional and not (unset and option.element is int):
            return None
        if value is None:
            raise ConfigError(f"{label} takes {option.wants}, got nothing: leave it out for the default")
    reader = _READERS.get(option.hint, _read_tuple if option.element else _read_dict)
    if option.choices:
        reader = _read_choice
    try:
        return reader(option, value)
    except (ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise ConfigError(f"{label}: {error}") from None
        shown = " ".join(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value
        raise ConfigError(f"{label} takes {option.wants}, got {shown!r}") from None


def _number(kind: type, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)) or (kind is int and type(value) is float):
        raise ValueError
    number = kind(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _read_int(option: Option, value: Any) -> int:
    return int(_number(int, value))


def _read_float(option: Option, value: Any) -> float:
    return float(_number(float, value))


def _read_bool(option: Option, value: Any) -> bool:
    word = str(value).lower() if isinstance(value, (bool, str)) else ""
    if word not in TRUE | FALSE:
        raise ValueError
    return word in TRUE


def _read_str(option: Option, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError
    return value


def _read_choice(option: Option, value: Any) -> str:
    if value is False and "no" in option.choices:  # YAML 1.1 reads a bare `no` as false
        return "no"
    if value in option.choices:
        return str(value)
    if value in option.metadata["words"]:
        raise ConfigError(option.metadata["words"][value])
    near = difflib.get_close_matches(str(value), option.choices, n=1)
    raise ConfigError(f"{value!r} is not {option.wants}{f': did you mean {near[0]}?' if near else ''}")


def _read_words(option: Option, value: Any) -> tuple[str, ...]:
    value = value.split() if isinstance(value, str) else value
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(v, str) and v.strip() for v in value):
        raise ValueError
    return tuple(value)


def _read_tuple(option: Option, value: Any) -> tuple[Any, ...]:
    if option.element is float:
        value = _betas(value) if isinstance(value, str) else value
        if value == []:
            raise ValueError
    elif isinstance(value, (str, int)):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise ValueError
    if all(isinstance(v, str) for v in value):
        value = [part for part in re.split(r"[\s,]+|(?<=\d)x(?=\d)", " ".join(value)) if part]
        value = [] if [part.lower() for part in value] in ([word] for word in UNSET) else value
    numbers = tuple(_number(option.element or float, v) for v in value)
    if option.is_pair:
        numbers = numbers * 2 if len(numbers) == 1 else numbers
        if len(numbers) != 2:
            raise ValueError
    return numbers


def _betas(text: str) -> Any:
    """Numbers from a JSON list in place, or from a file of one."""
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
    value = json.loads(value) if isinstance(value, str) else value
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError
    return dict(value)


_READERS: dict[Any, Callable[[Option, Any], Any]] = {
    int: _read_int,
    float: _read_float,
    bool: _read_bool,
    str: _read_str,
    tuple[str, ...]: _read_words,
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `ConfigError`, and which takes no abbreviations."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, add_help=False, **kwargs)
        self.add_argument("-h", "--help", action="help", help="Show this and stop.")

    def parse_checked(self, argv: Sequence[str], *, words: bool = False) -> dict[str, Any]:
        """Parse a command line whose flags are first looked up among this parser's own; see `checked_names`.

        Every command has a function ``parse_<command>_args(argv, prog)`` over this: it imports nothing heavy, writes
        nothing, and returns a dataclass of options that are checked as far as that goes without the model.

        Args:
            argv: the arguments after the command.
            words: whether other programs' words for a training run are answered.

        Returns:
            What was given, by name.

        Raises:
            ConfigError: a flag does not exist, or a value does not fit; one sentence for whoever must put it right.
            SystemExit: ``--help`` was asked for.
        """
        known = [name[2:] for action in self._actions for name in action.option_strings if name.startswith("--")]
        return vars(self.parse_args(checked_names(argv, known, words=words)))

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Args:
            message: argparse's sentence.

        Raises:
            ConfigError: always.
        """
        message = message.replace("unrecognized arguments:", "options begin with two dashes, got")
        raise ConfigError(message.removeprefix("argument "))


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Every spelling once, with one placeholder at the end."""
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{', '.join(action.option_strings)} {self._format_args(action, str(action.metavar))}"


class _Store(argparse.Action):
    """Keep the text. The same option under two spellings (an alias, `--no_`) must say the same thing."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if option_string is not None and option_string.startswith("--no_"):
            values = "false"
        before = getattr(namespace, self.dest, None)
        if before is not None and before[0] != option_string and before[1] != values:
            raise ConfigError(f"{option_string} contradicts {before[0]}: give one of them")
        setattr(namespace, self.dest, (option_string, values))


def _shown(option: Option) -> str:
    value = option.default
    if value is None:
        return option.metadata["unset"] or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return str(value[0]) if option.is_pair and len(set(value)) == 1 else " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def add_options(parser: argparse.ArgumentParser, only: Sequence[str] | None = None, about: str | None = None) -> None:
    """Give a parser every option, one group a section.

    Args:
        parser: the parser to fill.
        only: sections to add; by default all.
        about: what stands above them instead of a section's own words.
    """
    for section, cls in SECTIONS.items():
        if only is not None and section not in only:
            continue
        group = parser.add_argument_group(section, about or cls.__doc__)
        for option in (o for o in OPTIONS.values() if o.section == section):
            metavar = "NAME" if option.choices else _METAVARS.get(option.hint, "N")
            settings: dict[str, Any] = {"metavar": metavar}
            choices = f" One of {', '.join(option.choices)}." if option.choices else ""
            if option.hint is bool:
                settings |= {"nargs": "?", "const": "true"}
                group.add_argument(
                    f"--no_{option.name}", dest=option.name, action=_Store, nargs=0, help=argparse.SUPPRESS
                )
            elif option.element in (int, str):
                settings["nargs"] = "+"
            text = f"{option.metadata['help']}{choices} (default: {_shown(option)})".replace("%", "%%")
            names = [f"--{name}" for name in (option.name, *option.metadata["alias"])]
            group.add_argument(*names, dest=option.name, action=_Store, help=text, **settings)


_METAVARS: dict[Any, str] = {
    bool: "true|false",
    str: "TEXT",
    float: "X",
    dict[str, Any]: "JSON",
    tuple[float, ...]: "JSON|FILE",
    tuple[str, ...]: "TEXT",
}


def checked_names(argv: Sequence[str], known: Iterable[str], *, words: bool = False) -> list[str]:
    """Arguments with every flag spelled as ours (`--learning-rate` becomes `--learning_rate`).

    Args:
        argv: the arguments.
        known: the flags that exist, without dashes.
        words: whether other programs' words for a training run are answered.

    Returns:
        The same arguments, flags normalised.

    Raises:
        ConfigError: a flag does not exist; the message answers another program's word or names the nearest.
    """
    names = {*known, "help"}
    checked = []
    for token in argv:
        head, equals, tail = token.partition("=")
        name = head[2:].replace("-", "_")
        if token.startswith("--") and name:
            if name not in names:
                raise unknown(name, names, flag=True, words=words)
            if equals and name in SWITCHES:
                raise ConfigError(f"--{name} takes no value, got {tail!r}: leave that out")
            token = f"--{name}{equals}{tail}"
        checked.append(token)
    return checked

"""Command-line flags from declared options: the argument parser of every command, and its ``--help``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.utils.next_command import next_command
from diffusers_ddpm_ext.utils.option import Option
from diffusers_ddpm_ext.utils.option_values import convert_value, unknown_option

_METAVARS: dict[Any, str] = {
    bool: "true|false",
    str: "TEXT",
    Path: "PATH",
    float: "X",
    dict[str, Any]: "JSON",
    tuple[float, ...]: "JSON|FILE",
    tuple[str, ...]: "TEXT",
}


class Parser(argparse.ArgumentParser):
    """An argument parser for declared options. Its errors are `ConfigError`, and flags cannot be abbreviated."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, add_help=False, **kwargs)
        self.add_argument("-h", "--help", action="help", help="Show this help and exit.")
        self._declared: dict[str, Option] = {}

    def add_options(
        self, options: Iterable[Option], title: str = "", description: str | None = None, negatable: bool = False
    ) -> None:
        """Add the flags and positional arguments of options.

        Args:
            options: in the order of ``--help``.
            title: of their group in ``--help``; by default none.
            description: text under the title.
            negatable: whether a switch also takes true or false, and has a flag ``--no_NAME``. Only where no
                positional argument follows, which the switch would take as its value.
        """
        group = self.add_argument_group(title, description) if title else self
        options = list(options)
        self._declared |= {option.name: option for option in options}
        # A flag of several texts would take a positional argument behind it, too.
        several = not any(option.is_positional for option in self._declared.values())
        for option in options:
            settings = _settings(option, negatable, several)
            if option.is_positional:
                group.add_argument(option.name, action=_Store, **settings)
                continue
            names = [f"--{name}" for name in (option.flag, *option.metadata["alias"])]
            group.add_argument(*names, dest=option.name, action=_Store, **settings)
            if option.hint is bool and negatable:
                settings = {"nargs": 0, "const": "false", "help": argparse.SUPPRESS}
                group.add_argument(f"--no_{option.name}", dest=option.name, action=_Store, **settings)

    def parse_values(self, argv: Sequence[str], explain: Callable[[str], str | None] | None = None) -> dict[str, Any]:
        """Parse a command line and convert its values.

        Args:
            argv: the arguments after the command.
            explain: answers flags of other programs; see `unknown_option`.

        Returns:
            The options on the command line by name, converted and checked. What was left out is not included.

        Raises:
            ConfigError: a flag does not exist, or a value is not allowed.
            SystemExit: ``--help`` was requested.
        """
        # Arguments of one list may stand before and behind a flag: `report A --out page.html B`.
        has_list = any(option.is_positional and option.element for option in self._declared.values())
        parse = self.parse_intermixed_args if has_list else self.parse_args
        typed = {k: v for k, v in vars(parse(self._normalize(argv, explain))).items() if v is not None}
        return {
            name: convert_value(self._declared[name], value, flag or self._declared[name].metadata["metavar"])
            for name, (flag, value) in typed.items()
        }

    def _normalize(self, argv: Sequence[str], explain: Callable[[str], str | None] | None) -> list[str]:
        """Arguments with every flag in its declared spelling (`--learning-rate` becomes `--learning_rate`)."""
        known = {name[2:]: action for action in self._actions for name in action.option_strings if name[:2] == "--"}
        normalized = []
        for token in argv:
            head, equals, tail = token.partition("=")
            name = head[2:].replace("-", "_")
            if token.startswith("--") and name:
                if name not in known:
                    raise unknown_option(name, known, explain=explain)
                if equals and known[name].nargs == 0:
                    raise ConfigError(f"--{name} takes no value, got {tail!r}: leave that out")
                token = f"--{name}{equals}{tail}"
            normalized.append(token)
        return normalized

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Args:
            message: argparse's sentence.

        Raises:
            ConfigError: always.
        """
        message = message.replace("unrecognized arguments:", "options begin with two dashes, got")
        raise ConfigError(f"{message.removeprefix('argument ')}{next_command(message.split()[-1])}")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Every spelling once, with one placeholder at the end."""
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{', '.join(action.option_strings)} {self._format_args(action, str(action.metavar))}"


class _Store(argparse.Action):
    """Store (flag, text). Two spellings of one option (an alias, `--no_NAME`) must have the same value."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        values = self.const if self.nargs == 0 else values
        before = getattr(namespace, self.dest, None)
        if before is not None and before[0] != option_string and before[1] != values:
            raise ConfigError(f"{option_string} contradicts {before[0]}: use one of them")
        if option_string is not None or values not in (None, []):
            setattr(namespace, self.dest, (option_string, values))


def _settings(option: Option, negatable: bool, several: bool) -> dict[str, Any]:
    """Return the arguments of ``add_argument`` for an option, except its names."""
    default_metavar = "NAME" if str in map(type, option.choices) else _METAVARS.get(option.hint, "N")
    metavar: Any = option.metadata["metavar"] or "|".join([default_metavar, *option.words])
    if option.is_positional:
        optional = {"nargs": "*" if option.element else "?", "default": None}
        return {"metavar": metavar, "help": option.metadata["help"]} | (optional if option.has_default else {})
    choices = f" One of {', '.join(map(str, option.choices))}." if option.choices else ""
    text = f"{option.metadata['help']}{choices}"
    if option.hint is not bool or negatable:
        text += f" (default: {_default_text(option)})"
    settings: dict[str, Any] = {"metavar": metavar, "help": text.replace("%", "%%")}
    if option.hint is bool:
        return settings | {"nargs": "?" if negatable else 0, "const": "true"}
    if option.metadata["bare"]:
        return settings | {"nargs": "?", "const": option.metadata["bare"]}
    if option.hint == tuple[float, float]:
        return settings | {"nargs": 2, "metavar": tuple(metavar.split())}
    if option.element in (int, str) or option.takes_pairs or (option.metadata["several"] and several):
        settings["nargs"] = "+"
    return settings


def _default_text(option: Option) -> str:
    value = option.default
    if value in (None, {}, ()):
        return option.metadata["unset"] or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return str(value[0]) if option.length and len(set(value)) == 1 else " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)

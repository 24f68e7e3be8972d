"""The command line of one command, parsed into the dataclass of its options."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.config.flags import Parser
from diffusers_ddpm_ext.utils.option import Option, options_of

OptionsType = TypeVar("OptionsType")


def parse_options(
    cls: type[OptionsType], argv: Sequence[str], command: str, examples: str, description: str = ""
) -> OptionsType:
    """Parse a command line into the dataclass that declares the options; see `utils.option`.

    Every command has a function ``parse_<command>_args(argv)`` over this. It imports nothing heavy, writes nothing,
    and adds the checks that compare two options.

    Args:
        cls: a dataclass of `option`, `positional` and `embedded` fields.
        argv: the arguments after the command.
        command: its name.
        examples: text under the options in ``--help``.
        description: text above the options in ``--help``; by default the dataclass' docstring.

    Returns:
        The options: each value converted, and checked against its choices and range.

    Raises:
        ConfigError: a flag does not exist, or a value is not allowed; one sentence with the way out.
        SystemExit: ``--help`` was requested.
    """
    options = options_of(cls)
    sections = {item.name: item.metadata for item in fields(cls) if "section" in item.metadata}  # type: ignore[arg-type]
    positionals = [each for each in options.values() if each.is_positional]
    names = [f"[{_placeholder(o)}]" if o.has_default else o.metadata["metavar"] for o in positionals]
    parser = Parser(
        usage=" ".join(["ddpm-ext", command, *names, "[options]"]),
        description=inspect.cleandoc(description or cls.__doc__ or ""),
        epilog=examples,
    )
    parser.add_options(options.values(), negatable=not positionals)
    for name, metadata in sections.items():
        parser.add_options(options_of(metadata["section"]).values(), name, metadata["help"], negatable=True)
    typed = parser.parse_values(argv)
    for item in positionals:
        if not item.has_default and typed.get(item.name) is None:
            raise ConfigError(f"{item.metadata['metavar']} is empty: {item.metadata['help']}")
    embedded: dict[str, dict[str, Any]] = {
        name: {key: typed.pop(key) for key in options_of(metadata["section"]) if key in typed}
        for name, metadata in sections.items()
    }
    return cls(**typed, **embedded)


def _placeholder(option: Option) -> str:
    """What stands for a positional argument in the usage line; dots where it takes several."""
    return f"{option.metadata['metavar']} ..." if option.element else str(option.metadata["metavar"])

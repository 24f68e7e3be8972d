"""The options of a command that trains: by section, by name, and under every name that a flag or key may have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from diffusers_ddpm_ext.training.config.options import OPTIONS, SECTIONS
from diffusers_ddpm_ext.utils.option import Option


@dataclass(frozen=True)
class OptionTable:
    """The options of one command.

    Attributes:
        command: its name.
        sections: name to the dataclass that declares the options.
        options: name to option; sections may declare more than the command has.
    """

    command: str
    sections: Mapping[str, type]
    options: Mapping[str, Option]

    @cached_property
    def canonical_names(self) -> dict[str, str]:
        """Flag or key, including aliases, to the name of the option."""
        return {alias: o.name for o in self.options.values() for alias in (o.name, *o.metadata["alias"])}


TRAIN = OptionTable("train", SECTIONS, OPTIONS)


def changed(option: Option, default: Any, **metadata: str) -> Option:
    """An option with another default, and other arguments of `utils.option.option`, in another command."""
    return replace(option, default=default, metadata={**option.metadata, **metadata})

"""Arguments of an original conditioning stage, checked, with a row for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_ddpm_ext.compvis.conditioner.kinds import ConditionerConfig, ConditionerKind
from diffusers_ddpm_ext.compvis.conditioner.registry import KINDS
from diffusers_ddpm_ext.compvis.config.ddpm import suggestion
from diffusers_ddpm_ext.compvis.config.run_keys import as_mapping
from diffusers_ddpm_ext.compvis.schema import ConfigRow, check_values, one_line


def find_kind(section: Any) -> ConditionerKind | None:
    """The kind of an original conditioning stage; None for a class that is not in the registry."""
    return KINDS.get(str(section.get("target")).rpartition(".")[2]) if isinstance(section, Mapping) else None


def read_conditioner(section: Any, prefix: str) -> ConditionerConfig | None:
    """Read and check the configuration of an original conditioning stage.

    Args:
        section: ``target`` and ``params``, as in the file.
        prefix: of its keys, for messages and rows, such as ``model.params.cond_stage_config``.

    Returns:
        None for a class that is not in the registry.

    Raises:
        ValueError: an argument is missing, unknown, or not allowed; the message names it.
    """
    kind = find_kind(section)
    if kind is None:
        return None
    path = f"{prefix}.params"
    given = as_mapping(section.get("params"), path)
    types = {name: argument.allowed for name, argument in kind.arguments.items() if argument.allowed is not None}
    given = check_values(given, types, f"{path}.")
    missing = [name for name, argument in kind.arguments.items() if argument.required and given.get(name) is None]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: give the configuration that belongs to the weights.")
    rows = []
    for name, value in given.items():
        if name not in kind.arguments:
            why = suggestion(name, tuple(kind.arguments), f"not an argument of {kind.name}")
            raise ValueError(f"{path}.{one_line(name)} {one_line(value)} is not supported: {why}.")
        argument = kind.arguments[name]
        rows.append(ConfigRow(f"{path}.{name}", value, argument.fate, argument.note))
    params = {name: argument.default for name, argument in kind.arguments.items()} | dict(given)
    return ConditionerConfig(kind, section, params, tuple(rows))

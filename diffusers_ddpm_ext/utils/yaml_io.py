"""YAML in and out: safe, no key twice, lists on one line. The one module that needs PyYAML."""

from __future__ import annotations

from typing import Any

import yaml

from diffusers_ddpm_ext.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, of which plain YAML keeps the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"{key} is given twice: keep one of them")
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Plain YAML with lists on one line."""


_Dumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)


def load(text: str) -> dict[Any, Any]:
    """Options from the text of a YAML file.

    Args:
        text: the file's content; empty means no option.

    Returns:
        The mapping at its top.

    Raises:
        ConfigError: it is not YAML, holds a key twice, or is not a mapping. The file is not named.
    """
    try:
        loaded = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise ConfigError(f"not YAML: {where}{getattr(error, 'problem', None) or error}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError("not a list of options: write `name: value` lines")
    return loaded


def dump(options: dict[str, Any]) -> str:
    """Options as the text of a YAML file that `load` reads back to the same values.

    Args:
        options: plain values by name, nested mappings too.

    Returns:
        The text, in the order of the mapping.
    """
    return str(yaml.dump(options, Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True))

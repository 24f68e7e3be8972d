"""Strict YAML: a safe loader that refuses duplicate keys, for option files and CompVis configurations; a dumper."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError

MAX_BYTES = 4 * 2**20
MAX_ALIASES = 8  # a few aliases of aliases expand to more text than fits into memory


def load_options(text: str) -> dict[Any, Any]:
    """Read the text of an option file, a mapping; empty text means no option.

    Raises:
        ConfigError: it is not YAML, holds a duplicate key, or is not a mapping. The message does not name the file.
    """
    yaml = _yaml()
    try:
        loaded = yaml.load(text, Loader=_strict_loader())
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise ConfigError(f"not YAML: {where}{getattr(error, 'problem', None) or error}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError("not a list of options: write `name: value` lines")
    return loaded


def load_compvis_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a CompVis configuration file, a mapping where ``1e-4`` is a number.

    Raises:
        ValueError: the file is missing, too large, not YAML, holds a duplicate key or many aliases, or is not a
            mapping.
    """
    yaml, file = _yaml(), Path(path)
    if not file.is_file():
        raise ValueError(f"{file} {'is a folder' if file.is_dir() else 'does not exist'}: give the YAML file.")
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"{file.name} is larger than any configuration: give the YAML file, not the checkpoint.")
    try:
        text = file.read_bytes().decode("utf-8")
        if len(re.findall(r"(?<![\w'\"])\*\w", text)) > MAX_ALIASES:
            raise ValueError("it has too many aliases")
        content = yaml.load(text, Loader=_compvis_loader())
    except (UnicodeDecodeError, RecursionError):
        raise ValueError(f"{file.name} is not a text file: give the YAML file.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{file.name} cannot be read as YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} holds no configuration: it must have a section model with target and params.")
    return content


def dump_options(options: dict[str, Any]) -> str:
    """Options as YAML text, in their order, each list on one line; `load_options` reads back the same values."""
    yaml = _yaml()

    class Dumper(yaml.SafeDumper):  # type: ignore[name-defined]
        pass

    Dumper.add_representer(
        list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
    )
    return str(yaml.dump(options, Dumper=Dumper, sort_keys=False, width=100, allow_unicode=True))


def _yaml() -> Any:
    """PyYAML, imported on first use."""
    try:
        import yaml
    except ModuleNotFoundError:
        raise ConfigError("PyYAML is not installed: pip install diffusers-ddpm-ext[train]") from None
    return yaml


@cache
def _strict_loader() -> Any:
    """PyYAML's safe loader, which would use the last of duplicate keys silently, with an error instead."""
    yaml = _yaml()

    class StrictLoader(yaml.SafeLoader):  # type: ignore[name-defined]
        repeatable: tuple[str, ...] = ()

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if key.value not in self.repeatable]
            for key in keys:
                if keys.count(key) > 1:
                    raise ConfigError(f"{key} is given twice: keep one of them")
            mapping: dict[Any, Any] = super().construct_mapping(node, deep)
            return mapping

    return StrictLoader


@cache
def _compvis_loader() -> Any:
    """The strict loader for CompVis files: several merge keys ``<<`` are allowed, and ``1e-4`` is a float."""

    class CompVisLoader(_strict_loader()):  # type: ignore[misc]
        repeatable = ("<<",)

    CompVisLoader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
    return CompVisLoader

"""Strict YAML: a safe loader that refuses duplicate keys, for option files and CompVis configurations; a dumper."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.utils.input_files import MAX_DEPTH, check_nesting, read_text

MAX_BYTES = 2**20
MAX_NODES = 50_000  # of the file, and again of what its aliases expand to
MAX_NUMBER_LENGTH = 100
TAGS = ("null", "bool", "int", "float", "str", "seq", "map", "merge", "value")


def load_options(text: str) -> dict[Any, Any]:
    """Read the text of an option file, a mapping; empty text means no option.

    Raises:
        ConfigError: it is not YAML, holds a duplicate key, or is not a mapping. The message does not name the file.
    """
    loaded = _load(text, _strict_loader())
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError("not a list of options: write `name: value` lines")
    return loaded


def load_compvis_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a CompVis configuration file, a mapping where ``1e-4`` is a number.

    Raises:
        ValueError: the file is missing, too large, not YAML, is nested or expands without end, holds a duplicate key,
            or is not a mapping.
    """
    file = Path(path)
    text = read_text(file, max_bytes=MAX_BYTES)
    try:
        content = _load(text, _compvis_loader())
    except ConfigError as error:
        reason = str(error).removeprefix("not YAML: ")
        raise ConfigError(f"{printable(file.name)} cannot be read as YAML: {reason}.") from None
    if not isinstance(content, dict):
        raise ConfigError(
            f"{printable(file.name)} holds no configuration: it must have a section model with target and params."
        )
    return content


def _load(text: str, loader: Any) -> Any:
    """Parse YAML within the limits of nodes, depth and aliases."""
    yaml = _yaml()
    try:
        loaded = yaml.load(text, Loader=loader)
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError, AttributeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"not YAML: {where}{printable(str(problem), 200)}") from None
    check_nesting(loaded, "it")
    return loaded


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
        yaml_implicit_resolvers: ClassVar = {  # dates stay text
            first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def __init__(self, stream: Any) -> None:
            super().__init__(stream)
            self.nodes, self.depth = 0, 0
            self.expanded: dict[int, int] = {}  # nodes below each node, aliases written out, by the node's id

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.nodes, self.depth = self.nodes + 1, self.depth + 1
            if self.depth > MAX_DEPTH:
                raise ConfigError(f"it is nested more than {MAX_DEPTH} levels deep")
            alias = self.check_event(yaml.AliasEvent)
            node = super().compose_node(parent, index)
            self.depth -= 1
            if alias and id(node) not in self.expanded:
                raise ConfigError("it contains itself: an alias is inside of what it refers to")
            if not alias:
                children = node.value if isinstance(node.value, list) else []
                parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
                self.expanded[id(node)] = 1 + sum(self.expanded[id(part)] for part in parts)
            if max(self.nodes, self.expanded[id(node)]) > MAX_NODES:
                raise ConfigError(f"it has more than {MAX_NODES:,} values, its aliases written out")
            return node

        def construct_object(self, node: Any, deep: bool = False) -> Any:
            if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.rpartition(":")[2] not in TAGS:
                raise ConfigError(f"line {node.start_mark.line + 1}: the tag {printable(node.tag, 60)} is not allowed")
            number = node.tag.endswith((":int", ":float"))
            if number and len(node.value) > MAX_NUMBER_LENGTH:
                raise ConfigError(f"line {node.start_mark.line + 1}: a number of {len(node.value):,} characters")
            return super().construct_object(node, deep)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[tuple[str, str]] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value not in self.repeatable:
                    if (key.tag, key.value) in seen:
                        raise ConfigError(f"{printable(key.value, 60)} is given twice: keep one of them")
                    seen.add((key.tag, key.value))
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

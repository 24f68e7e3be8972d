"""YAML files as data: safe, no key twice, few aliases, numbers as people write them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

MOST_BYTES = 4 * 2**20
MOST_ALIASES = 8  # more could stand for more text than any memory holds


def load_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML file as data. Keys that stand twice are refused.

    Args:
        path: of the file.

    Returns:
        Its content.

    Raises:
        ValueError: it cannot be read, or is no mapping.
    """
    try:
        import yaml
    except ImportError:
        raise ValueError("Reading a YAML configuration needs PyYAML: pip install diffusers-ddpm-ext[train].") from None
    place = Path(path)
    if not place.is_file():
        raise ValueError(f"{place} {'is a folder' if place.is_dir() else 'does not exist'}: give the YAML file.")
    if place.stat().st_size > MOST_BYTES:
        raise ValueError(f"{place.name} is larger than any configuration: give the YAML file, not the checkpoint.")
    try:
        text = place.read_bytes().decode("utf-8")
        if len(re.findall(r"(?<![\w'\"])\*\w", text)) > MOST_ALIASES:
            raise ValueError("it has too many aliases")
        content = yaml.load(text, _loader())
    except (UnicodeDecodeError, RecursionError):
        raise ValueError(f"{place.name} is no text file: give the YAML file.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{place.name} cannot be read as YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{place.name} holds no configuration: it must have a section model with target and params.")
    return content


def _loader() -> Any:
    """PyYAML's safe loader that refuses a key twice, and reads 1e-4 as the number it is."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            twice = next((key for key in keys if keys.count(key) > 1), None)
            if twice is not None:
                raise ValueError(f"{twice} stands twice")
            made: dict[Any, Any] = super().construct_mapping(node, deep)
            return made

    number = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.yaml_implicit_resolvers = {key: list(rest) for key, rest in yaml.SafeLoader.yaml_implicit_resolvers.items()}
    for first in "-+.0123456789":
        Loader.yaml_implicit_resolvers.setdefault(first, []).insert(0, ("tag:yaml.org,2002:float", number))
    return Loader

"""References of OmegaConf, ``${model.params.image_size}``, in original configurations."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

WHOLE_REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*(?:\.\w+)*)\}")
MAX_CHAIN = 16
MAX_DEPTH = 64


def resolve_references(content: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a configuration, with each text that is one reference to a number, text or boolean replaced by it.

    Other references (to a section, to a missing key, to the environment, inside of a text) stay as they are: they are
    only an error where their value is needed.

    Raises:
        ValueError: the configuration contains itself, or is nested over 64 levels deep.
    """

    def resolve(value: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError("The configuration contains itself, or is nested too deeply: replace aliases by values.")
        if isinstance(value, Mapping):
            return {key: resolve(inner, depth + 1) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [resolve(inner, depth + 1) for inner in value]
        return _follow(value, content)

    return {key: resolve(inner, 1) for key, inner in content.items()}


def _follow(value: Any, content: Mapping[str, Any]) -> Any:
    """The value that a chain of references leads to; ``value`` itself if it leads nowhere."""
    target = value
    for _ in range(MAX_CHAIN):
        match = WHOLE_REFERENCE.fullmatch(target) if isinstance(target, str) else None
        if match is None:
            return value if isinstance(target, Mapping | list | tuple) else target
        target = content
        for part in match[1].split("."):
            if not isinstance(target, Mapping) or part not in target:
                return value
            target = target[part]
    return value

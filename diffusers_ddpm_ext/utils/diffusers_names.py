"""Names of this package in Diffusers' namespace, resolved on first use.

Diffusers finds the class that a saved folder names with ``getattr(diffusers, name)``. After `offer_names` that works
from the moment this package is imported, before or after Diffusers, and neither is loaded earlier for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

HOST = "diffusers"


def offer_names(names: Sequence[str], resolve: Callable[[str], Any]) -> None:
    """Let ``diffusers`` have attributes that are resolved on first use.

    Args:
        names: names that Diffusers itself does not have.
        resolve: from a name to its value; called once per name.
    """
    loaded = sys.modules.get(HOST)
    if loaded is not None:
        _extend(loaded, names, resolve)
    else:
        sys.meta_path.insert(0, _AfterImport(names, resolve))


class _AfterImport(MetaPathFinder):
    """Extends Diffusers' module right after its import; finds nothing itself."""

    def __init__(self, names: Sequence[str], resolve: Callable[[str], Any]) -> None:
        self.names, self.resolve = names, resolve
        self.searching = False

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != HOST or self.searching:
            return None
        self.searching = True
        try:
            spec = find_spec(HOST)
        finally:
            self.searching = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_extend(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:  # until here: a search for the module does not always import it
                sys.meta_path.remove(self)
            _extend(sys.modules.get(HOST, module), self.names, self.resolve)  # Diffusers replaces its own module

        spec.loader.exec_module = execute_and_extend  # type: ignore[method-assign]
        return spec


def _extend(module: ModuleType, names: Sequence[str], resolve: Callable[[str], Any]) -> None:
    """Give a module's class a ``__getattr__`` that knows more names."""
    kind = type(module)

    class Extended(kind):  # type: ignore[misc, valid-type]
        def __getattr__(self, name: str) -> Any:
            if name in names:
                value = resolve(name)
                setattr(self, name, value)
                return value
            inherited = getattr(super(), "__getattr__", None)
            if inherited is None:
                raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
            return inherited(name)

    Extended.__name__, Extended.__qualname__, Extended.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    module.__class__ = Extended

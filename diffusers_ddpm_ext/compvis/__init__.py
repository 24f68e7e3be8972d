"""The border with original checkpoints: their files, their configuration, their weights, both ways.

Names are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers_ddpm_ext.compvis.load import load_compvis
    from diffusers_ddpm_ext.compvis.save import save_compvis

__all__ = ["load_compvis", "save_compvis"]
_MODULES = {"load_compvis": "load", "save_compvis": "save"}


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

"""The border with original checkpoints: their files, their configuration, their weights, both ways.

Names are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers_ddpm_ext.compvis.checkpoint import load_compvis
    from diffusers_ddpm_ext.compvis.export import save_compvis

__all__ = ["load_compvis", "save_compvis"]
_ROOMS = {"load_compvis": "checkpoint", "save_compvis": "export"}


def __getattr__(name: str) -> Any:
    """Import a public name from its room on first use."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)

"""Atomic checkpoints of a training run, and its output folder. Importing this loads no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers_ddpm_ext.training.checkpoints.folders import list_checkpoints, newest
    from diffusers_ddpm_ext.training.checkpoints.manifest import Checkpoint, DamagedCheckpoint, verify

__all__ = ["Checkpoint", "DamagedCheckpoint", "list_checkpoints", "newest", "verify"]
_MODULES = {
    "Checkpoint": "manifest",
    "DamagedCheckpoint": "manifest",
    "list_checkpoints": "folders",
    "newest": "folders",
    "verify": "manifest",
}


def __getattr__(name: str) -> Any:
    """Import a documented name from its module on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

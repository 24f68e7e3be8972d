"""Options of a training run: declared, parsed, checked, and written down."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers_ddpm_ext.training.config.train_config import TrainConfig, parse_train_args

__all__ = ["TrainConfig", "parse_train_args"]
_MODULES = {"TrainConfig": "train_config", "parse_train_args": "train_config"}


def __getattr__(name: str) -> Any:
    """Import a documented name from its module on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

"""Images and their conditions: sources, decoding, data sets, batches."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers_ddpm_ext.training.data.dataset import ImageData, load_data
    from diffusers_ddpm_ext.training.data.image_set import ImageSet

__all__ = ["ImageData", "ImageSet", "load_data"]
_MODULES = {"ImageData": "dataset", "ImageSet": "image_set", "load_data": "dataset"}


def __getattr__(name: str) -> Any:
    """Import a documented name from its module on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

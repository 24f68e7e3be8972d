"""The original classes of a checkout outside this repository, with what only their training needs replaced."""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import io
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import nn

REPLACED = ("pytorch_lightning", "torchvision", "clip", "kornia", "omegaconf", "ftfy")


class _AnyAttribute(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class _Replacement(types.ModuleType):
    """A module whose every attribute is an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "LightningModule":
            return type(name, (nn.Module,), {"device": torch.device("cpu")})
        return _AnyAttribute(name, (), {"__init__": lambda self, *a, **k: None})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        known = name.split(".")[0] in REPLACED
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Replacement(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []


def import_original(module: str, *checkouts: Path | None) -> Any:
    """A module such as ``ldm.models.autoencoder``; einops must be installed, everything else is replaced.

    Args:
        module: its full name.
        checkouts: folders to import from.
    """
    sys.meta_path.insert(0, _Finder())
    sys.path[:0] = [str(path) for path in checkouts if path is not None]
    with contextlib.redirect_stdout(io.StringIO()):
        return importlib.import_module(module)


def forget_original() -> None:
    """Let the next `import_original` import another checkout's package of the same name."""
    for name in [name for name in sys.modules if name.split(".")[0] == "ldm"]:
        del sys.modules[name]


def build_quietly(cls: Any, **arguments: Any) -> Any:
    """An instance in eval mode, without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        return cls(**arguments).eval().requires_grad_(False)

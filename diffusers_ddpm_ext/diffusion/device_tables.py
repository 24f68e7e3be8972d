"""Tables of a schedule as tensors, converted and transferred once for each device and precision.

A read-only NumPy table keeps its tensors as long as it lives. Another one may change at any time, so that it is
converted at each use.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from diffusers_ddpm_ext.diffusion.schedule import Table

_Key = tuple[int, torch.device, torch.dtype]
_kept: dict[_Key, tuple[weakref.ref[Table], Tensor]] = {}


def table_tensor(table: Table, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The table (T,) on a device: not a copy, so that the caller must not change it."""
    if table.flags.writeable or torch.compiler.is_compiling():
        return _converted(table, device, dtype)
    key = id(table), device, dtype
    entry = _kept.get(key)
    if entry is not None and entry[0]() is table:
        return entry[1]
    with torch.inference_mode(False):  # a tensor of inference mode could not be used in a backward pass later
        values = _converted(table, device, dtype)
    if type(values) is Tensor:  # not one of a tracer, which must not outlive it
        _kept[key] = weakref.ref(table, lambda _: _kept.pop(key, None)), values
    return values


def _converted(table: Table, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(table.copy()).to(dtype).to(device)

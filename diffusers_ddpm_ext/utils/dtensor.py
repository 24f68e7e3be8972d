"""Tensors of which every process holds a part: how to tell them from plain ones, and the ways between the two.

``fully_shard`` turns parameters into DTensors. What works element by element works on each process's own part; what
needs the whole is a call that all processes enter. Plain tensors pass through all of this as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor.

    Args:
        tensor: any.

    Returns:
        False for a plain tensor, found without importing torch's distributed tensors, which takes a second.
    """
    if type(tensor) is Tensor or type(tensor) is nn.Parameter:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part.

    Args:
        tensor: plain or sharded.

    Returns:
        The live part, empty where there are fewer rows than processes; a plain tensor itself.
    """
    if not is_sharded(tensor):
        return tensor  # at once: entering no_grad for each of some hundred tensors costs a third of an EMA step
    with torch.no_grad():
        return tensor.to_local()


@torch.no_grad()
def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor; all processes enter.

    Args:
        tensor: plain or sharded.

    Returns:
        A plain tensor on the same device; a plain one itself.
    """
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def processes() -> int:
    """Processes of the default group, 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that reads and writes files."""
    return processes() == 1 or dist.get_rank() == 0


@torch.no_grad()
def spread(whole: Tensor, like: Tensor, from_first: bool) -> Tensor:
    """Lay a plain tensor out as another tensor is: sharded or not, on the same device, with the same strides.

    Args:
        whole: plain, of the shape of ``like``; keeps its dtype.
        like: plain or sharded.
        from_first: take the values from the first process, where all enter and the others give any tensor of that
            shape and dtype, which is overwritten; otherwise each process takes its part of its own.

    Returns:
        A new tensor, which shares no memory.
    """
    if is_sharded(like):
        from torch.distributed.tensor import distribute_tensor

        source = 0 if from_first else None
        return distribute_tensor(whole.detach(), like.device_mesh, like.placements, src_data_rank=source).clone()
    values = whole.detach()
    if from_first and processes() > 1:
        values = values.to(like.device).contiguous()
        dist.broadcast(values, src=0)
    return torch.empty_like(like, dtype=whole.dtype, requires_grad=False).copy_(values)


@torch.no_grad()
def copy_into(target: Tensor, source: Tensor) -> None:
    """``target.copy_(source)`` between any two of plain and sharded; all processes enter.

    Args:
        target: plain or sharded, its dtype stays.
        source: of the same shape; where both are sharded, in the same way.
    """
    if is_sharded(target):
        part = source if is_sharded(source) else spread(source, target, from_first=False)
        local(target).copy_(local(part))
    else:
        target.copy_(full(source))


def reshard(module: nn.Module) -> None:
    """Drop the whole weights that ``fully_shard`` keeps after a forward pass without a backward pass.

    While they are there, changes of the parts would be overlooked: the next forward pass would use the old weights.

    Args:
        module: the outermost one that was sharded; one that was not is left alone.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()

"""DTensor helpers: the same code for plain tensors and for parameters sharded by ``fully_shard``.

Elementwise work is done on the local shard of each process; what needs all values is a collective call. Plain tensors
pass through every function unchanged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor; for a plain one, without the second that importing DTensor takes."""
    if type(tensor) is Tensor or type(tensor) is nn.Parameter:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_tensor(tensor: Tensor) -> Tensor:
    """The local shard of a DTensor (not a copy; empty with fewer rows than processes), or the plain tensor itself."""
    if not is_sharded(tensor):
        return tensor  # before no_grad: entering it for each of some hundred tensors costs a third of an EMA step
    with torch.no_grad():
        return tensor.to_local()


@torch.no_grad()
def full_tensor(tensor: Tensor) -> Tensor:
    """All values of a DTensor as a plain tensor on the same device, or the plain tensor itself.

    Collective call: every process must make it.
    """
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def world_size() -> int:
    """Number of processes in the default group; 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main_process() -> bool:
    """Whether this is the main process (rank 0), which reads and writes files."""
    return world_size() == 1 or dist.get_rank() == 0


@torch.no_grad()
def distribute_like(values: Tensor, like: Tensor, from_main_process: bool) -> Tensor:
    """Distribute a plain tensor as another tensor is: same sharding, device and strides.

    Args:
        values: plain, of the shape of ``like``; keeps its dtype.
        like: plain or sharded.
        from_main_process: broadcast the main process's values. Collective call: every process must make it, with a
            tensor of the same shape and dtype. Otherwise each process uses its own values.

    Returns:
        A new tensor that shares no memory with the others.
    """
    if is_sharded(like):
        from torch.distributed.tensor import distribute_tensor

        source = 0 if from_main_process else None
        return distribute_tensor(values.detach(), like.device_mesh, like.placements, src_data_rank=source).clone()
    values = values.detach()
    dtype = values.dtype
    if from_main_process and world_size() > 1:
        values = values.to(like.device).contiguous()
        dist.broadcast(values, src=0)
    return torch.empty_like(like, dtype=dtype, requires_grad=False).copy_(values)


@torch.no_grad()
def copy_into(target: Tensor, source: Tensor) -> None:
    """``target.copy_(source)`` for plain and sharded tensors. Collective call: every process must make it.

    Args:
        target: plain or sharded; keeps its dtype.
        source: of the same shape; sharded in the same way if both are sharded.
    """
    if is_sharded(target):
        shard = source if is_sharded(source) else distribute_like(source, target, from_main_process=False)
        local_tensor(target).copy_(local_tensor(shard))
    else:
        target.copy_(full_tensor(source))


def reshard(module: nn.Module) -> None:
    """Free the unsharded weights that ``fully_shard`` keeps after a forward pass without a backward pass.

    Until then the next forward pass would use them and ignore changes of the shards.

    Args:
        module: the outermost sharded module; an unsharded one is left unchanged.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule

    for submodule in module.modules():
        if isinstance(submodule, FSDPModule):
            submodule.reshard()


def gather_in_method(module: nn.Module, name: str) -> None:
    """Let a method of a module gather sharded weights as ``forward`` does; nothing is done to one that is not sharded.

    Args:
        module: that ``fully_shard`` was applied to, or not.
        name: of the method, which is called in place of ``forward``.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    if isinstance(module, FSDPModule):
        register_fsdp_forward_method(module, name)

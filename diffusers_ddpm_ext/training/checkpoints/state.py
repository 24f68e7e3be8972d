"""How the state of a run is taken and put back, the same in one process, in data-parallel and in sharded ones.

Every function here is entered by all processes at the same step. Whole tensors exist in the first process only, one
at a time while they travel, whatever the engine; so that a run goes on in another number of processes, or in another
engine. Taking the state changes nothing of a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from diffusers_ddpm_ext.models.ema import LitEMA
from diffusers_ddpm_ext.training.checkpoints.snapshot import (
    Progress,
    ScalarState,
    Snapshot,
)
from diffusers_ddpm_ext.utils.dtensor import full_tensor, is_main_process, is_sharded, local_tensor

COMPILED = "_orig_mod."
NESTED = "/"
SCHEDULE = ("last_epoch", "_step_count", "base_lrs", "_last_lr")
"""The numbers of a LambdaLR. Its ``state_dict`` also holds the lambdas' attributes, whatever they are."""

AVERAGE = ("decay", "use_num_updates", "num_updates")
"""The numbers of a LitEMA."""


@dataclass(frozen=True)
class TrainingObjects:
    """The objects of a run that have state.

    Attributes:
        task: DenoisingTask, with or without wrappers (DDP, ``torch.compile``), or sharded.
        optimizer: over the task's parameters, with or without Accelerate's wrapper.
        lr_scheduler: of that optimizer.
        ema: the moving average, if there is one.
        scaler: float16's loss scaler, if there is one.
    """

    task: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: LambdaLR
    ema: LitEMA | None = None
    scaler: torch.amp.GradScaler | None = None

    @property
    def plain_task(self) -> nn.Module:
        """The task without the wrappers around it."""
        task = self.task
        while True:
            if isinstance(task, DistributedDataParallel):
                task = task.module
            elif isinstance(task, torch._dynamo.eval_frame.OptimizedModule):
                task = task._orig_mod
            else:
                return task

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer without Accelerate's wrapper."""
        optimizer = self.optimizer
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        return optimizer

    @property
    def names(self) -> dict[Tensor, str]:
        """Parameter to its name without any wrapper's part; the first one where weights are tied."""
        return {p: name.replace(COMPILED, "") for name, p in self.plain_task.named_parameters()}


def capture_snapshot(live: TrainingObjects, progress: Progress, share_memory: bool = False) -> Snapshot | None:
    """Take the state of a run between two optimizer steps; all processes enter.

    Args:
        live: of the run; nothing of it is changed.
        progress: where the run stands.
        share_memory: let the snapshot share memory with a run on the CPU, which saves a copy if the snapshot is
            written before the next step.

    Returns:
        The snapshot in the first process, None in the others.

    Raises:
        ValueError: the EMA weights are in the network just now, or the optimizer has state that no file can hold.
    """
    if live.ema is not None and live.ema.in_scope:
        raise ValueError("a snapshot inside LitEMA.scope() would take the EMA weights for the raw ones.")
    task, optimizer = live.plain_task, live.torch_optimizer
    _check_slots(optimizer)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model = get_model_state_dict(task, options=whole)
    # Asked before its first step, torch would take one, with gradients of zero, to have something to show.
    held = get_optimizer_state_dict(task, optimizer, options=whole) if optimizer.state else {}
    ema = None if live.ema is None else _gather(live.ema.shadow)
    if not is_main_process():
        return None
    state: Any = held.get("state", {})
    tensors, slots = _split_slots({name.replace(COMPILED, ""): kept for name, kept in state.items()})
    taken = set() if share_memory else {t.untyped_storage().data_ptr() for t in _live_tensors(live)}
    numbers = ScalarState(
        groups=group_options(live),
        slots=slots,
        lr_scheduler={name: getattr(live.lr_scheduler, name) for name in SCHEDULE},
        scaler=None if live.scaler is None or not live.scaler.is_enabled() else live.scaler.state_dict(),
        ema=None if live.ema is None else {name: getattr(live.ema, name) for name in AVERAGE},
    )
    average = None if ema is None else _own(ema, taken)
    plain: Any = model
    return Snapshot(_own(plain, taken), _own(tensors, taken), average, numbers, progress)


def _gather(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU of the first process, one at a time; nothing in the others."""
    whole = {}
    for name, tensor in tensors.items():
        value = full_tensor(tensor)
        if is_main_process():
            whole[name] = value.cpu()
    return whole


def _live_tensors(live: TrainingObjects) -> Iterator[Tensor]:
    yield from map(local_tensor, live.plain_task.parameters())
    yield from live.plain_task.buffers()
    for slots in live.torch_optimizer.state.values():
        yield from (local_tensor(value) for value in slots.values() if isinstance(value, Tensor))
    if live.ema is not None:
        yield from map(local_tensor, live.ema.shadow.values())


def _own(tensors: dict[str, Tensor], taken: set[int]) -> dict[str, Tensor]:
    """Contiguous tensors, each with memory of its own; copied only where it is not so already.

    Args:
        tensors: on the CPU.
        taken: addresses of memory that is in use; those of the result are added.
    """
    owned = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        storage = tensor.untyped_storage()
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes
        if not whole or storage.data_ptr() in taken:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        taken.add(tensor.untyped_storage().data_ptr())
        owned[name] = tensor
    return owned


def _check_slots(optimizer: torch.optim.Optimizer) -> None:
    """Refuse state that no file can hold, in all processes, before they exchange anything."""
    for slots in optimizer.state.values():
        for slot, value in slots.items():
            plain = value is None or isinstance(value, bool | int | float | str)
            if "." in slot or not (plain or type(value) is Tensor or is_sharded(value)):
                raise ValueError(
                    f"the optimizer keeps {slot!r} as {type(value).__name__}, which no checkpoint can hold; "
                    "use an optimizer whose state is tensors and numbers."
                )


def _split_slots(state: dict[str, dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """An optimizer's state as tensors with one key each, and plain numbers."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for name, slots in state.items():
        for slot, value in _flat(slots).items():
            if isinstance(value, Tensor):
                tensors[f"{name}.{slot}"] = value
            else:
                numbers.setdefault(name, {})[slot] = value
    return tensors, numbers


def _flat(slots: dict[str, Any]) -> dict[str, Any]:
    """Slots in which bitsandbytes has put some of its own into a dict: ``outer/inner`` for those."""
    flat: dict[str, Any] = {}
    for slot, value in slots.items():
        inner = {f"{slot}{NESTED}{key}": item for key, item in value.items()} if isinstance(value, dict) else None
        flat |= {slot: value} if inner is None else inner
    return flat


def group_options(live: TrainingObjects) -> list[dict[str, Any]]:
    names = live.names
    groups = []
    for group in live.torch_optimizer.param_groups:
        options = {k: v.item() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}
        groups.append({"params": [names[p] for p in group["params"]]} | options)
    return groups

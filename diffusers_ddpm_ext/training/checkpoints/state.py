"""Training state of a run, captured as a snapshot: the same for single-process, data-parallel and sharded runs.

Unsharded tensors exist in the main process only and, during communication, one at a time, so that a run can resume
with another number of processes or another engine. Capturing changes nothing in the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from diffusers_ddpm_ext.models.ema import LitEMA
from diffusers_ddpm_ext.training.checkpoints.snapshot import Progress, ScalarState, Snapshot
from diffusers_ddpm_ext.utils.dtensor import full_tensor, is_main_process, is_sharded, local_tensor

COMPILE_PREFIX = "_orig_mod."
NESTED_SEPARATOR = "/"
LR_SCHEDULER_KEYS = ("last_epoch", "_step_count", "base_lrs", "_last_lr")
"""State of a LambdaLR. Its ``state_dict`` also holds the attributes of the lambdas, which may be anything."""

EMA_KEYS = ("decay", "use_num_updates", "num_updates")
"""State of every LitEMA besides its weights."""


@dataclass(frozen=True)
class TrainingObjects:
    """The objects of a run that have state.

    Attributes:
        task: DenoisingTask, with or without wrappers (DDP, ``torch.compile``), or sharded.
        optimizer: over the task's parameters, with or without Accelerate's wrapper.
        lr_scheduler: of that optimizer.
        ema: the EMA, if there is one.
        scaler: float16's gradient scaler, if there is one.
    """

    task: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: LambdaLR
    ema: LitEMA | None = None
    scaler: torch.amp.GradScaler | None = None

    @property
    def unwrapped_task(self) -> nn.Module:
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
    def unwrapped_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer without Accelerate's wrapper."""
        optimizer = self.optimizer
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        return optimizer

    @property
    def parameter_names(self) -> dict[Tensor, str]:
        """Parameter to its name without the wrappers' prefixes; the first name if weights are tied."""
        return {p: name.replace(COMPILE_PREFIX, "") for name, p in self.unwrapped_task.named_parameters()}

    @property
    def group_options(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups as JSON: names for parameters, numbers for tensors."""
        names = self.parameter_names
        groups = []
        for group in self.unwrapped_optimizer.param_groups:
            options = {k: v.item() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}
            groups.append({"params": [names[p] for p in group["params"]]} | options)
        return groups


def capture_snapshot(objects: TrainingObjects, progress: Progress, share_memory: bool = False) -> Snapshot | None:
    """Capture the state of a run between two optimizer steps. Collective call: every process must make it.

    Args:
        objects: of the run; unchanged.
        progress: of the run.
        share_memory: let the snapshot share memory with a run on the CPU, which saves a copy if the snapshot is
            written before the next step.

    Returns:
        The snapshot in the main process, None in the others.

    Raises:
        ValueError: the EMA weights are in the network, or the optimizer has state that cannot be stored.
    """
    if objects.ema is not None and objects.ema.in_scope:
        raise ValueError("a snapshot inside LitEMA.scope() would store the EMA weights as the raw weights.")
    task, optimizer = objects.unwrapped_task, objects.unwrapped_optimizer
    _check_slots(optimizer)
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model: Any = get_model_state_dict(task, options=full)
    # Before the optimizer's first step torch would create its state by a step with zero gradients.
    optimizer_state: Any = get_optimizer_state_dict(task, optimizer, options=full) if optimizer.state else {}
    ema = None if objects.ema is None else _gather_on_cpu(objects.ema.shadow)
    if not is_main_process():
        return None
    state = {name.replace(COMPILE_PREFIX, ""): slots for name, slots in optimizer_state.get("state", {}).items()}
    slots, scalar_slots = _split_slots(state)
    in_use = set() if share_memory else {t.untyped_storage().data_ptr() for t in _tensors_in_use(objects)}
    model, slots, ema_weights = _without_shared_memory([model, slots, ema or {}], in_use)
    scalars = ScalarState(
        groups=objects.group_options,
        slots=scalar_slots,
        lr_scheduler={name: getattr(objects.lr_scheduler, name) for name in LR_SCHEDULER_KEYS},
        scaler=None if objects.scaler is None or not objects.scaler.is_enabled() else objects.scaler.state_dict(),
        ema=None if objects.ema is None else objects.ema.scalars,
    )
    return Snapshot(model, slots, None if ema is None else ema_weights, scalars, progress)


def _gather_on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Unsharded tensors on the CPU of the main process, one at a time; nothing in the other processes."""
    gathered = {}
    for name, tensor in tensors.items():
        value = full_tensor(tensor)
        if is_main_process():
            gathered[name] = value.cpu()
    return gathered


def _tensors_in_use(objects: TrainingObjects) -> Iterator[Tensor]:
    yield from map(local_tensor, objects.unwrapped_task.parameters())
    yield from objects.unwrapped_task.buffers()
    for slots in objects.unwrapped_optimizer.state.values():
        yield from (local_tensor(value) for value in slots.values() if isinstance(value, Tensor))
    if objects.ema is not None:
        yield from map(local_tensor, objects.ema.shadow.values())


def _without_shared_memory(tables: list[dict[str, Tensor]], in_use: set[int]) -> list[dict[str, Tensor]]:
    """Contiguous CPU tensors that share no memory, also not at the addresses in use; copied only where necessary."""
    used = set(in_use)
    results = []
    for tensors in tables:
        result = {}
        for name, tensor in tensors.items():
            tensor = tensor.detach()
            storage = tensor.untyped_storage()
            fills_storage = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes
            if not fills_storage or storage.data_ptr() in used:
                tensor = tensor.clone(memory_format=torch.contiguous_format)
            used.add(tensor.untyped_storage().data_ptr())
            result[name] = tensor
        results.append(result)
    return results


def _check_slots(optimizer: torch.optim.Optimizer) -> None:
    """Refuse state that cannot be stored, in every process, before any communication."""
    for slots in optimizer.state.values():
        for slot, value in slots.items():
            scalar = value is None or isinstance(value, bool | int | float | str)
            if "." in slot or not (scalar or type(value) is Tensor or is_sharded(value)):
                raise ValueError(
                    f"the optimizer's state {slot!r} is a {type(value).__name__}, which a checkpoint cannot store; "
                    "use an optimizer whose state is tensors and numbers."
                )


def _split_slots(state: dict[str, dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Split an optimizer's state into tensors, with one key each, and values that are not tensors."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for name, slots in state.items():
        for slot, value in _flatten(slots).items():
            if isinstance(value, Tensor):
                tensors[f"{name}.{slot}"] = value
            else:
                scalars.setdefault(name, {})[slot] = value
    return tensors, scalars


def _flatten(slots: dict[str, Any]) -> dict[str, Any]:
    """Slots without the inner dicts of bitsandbytes: ``outer/inner`` for their keys."""
    flat: dict[str, Any] = {}
    for slot, value in slots.items():
        if isinstance(value, dict):
            flat |= {f"{slot}{NESTED_SEPARATOR}{key}": item for key, item in value.items()}
        else:
            flat[slot] = value
    return flat

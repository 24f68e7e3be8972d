"""Restoring a snapshot into a run: the same for single-process, data-parallel and sharded runs.

The main process checks that the snapshot fits the run and broadcasts a header; then the tensors follow, one at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from diffusers_ddpm_ext.models.ema import LitEMA
from diffusers_ddpm_ext.training.checkpoints.snapshot import Snapshot, first_difference, tensor_specs
from diffusers_ddpm_ext.training.checkpoints.state import (
    COMPILE_PREFIX,
    EMA_KEYS,
    LR_SCHEDULER_KEYS,
    NESTED_SEPARATOR,
    TrainingObjects,
)
from diffusers_ddpm_ext.training.checkpoints.state_file import (
    EMA_FILE,
    MODEL_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    Progress,
    ScalarState,
    TensorSpecs,
)
from diffusers_ddpm_ext.utils.dtensor import (
    distribute_like,
    is_main_process,
    is_sharded,
    local_tensor,
    reshard,
    world_size,
)

IMPLEMENTATION_OPTIONS = ("params", "foreach", "fused", "capturable", "differentiable")
"""Options of a parameter group that select an implementation; they follow the current device, not the snapshot."""

PARAMETER_SHAPED_SLOTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
"""Slots of an optimizer that have the shape of their parameter."""


@dataclass(frozen=True)
class BroadcastHeader:
    """A snapshot without its large tensors, of which it has the specs; sent before them.

    The optimizer's tensors without dimensions, ``scalar_slots``, are too many to send one by one.
    """

    progress: Progress
    scalars: ScalarState
    ema: TensorSpecs
    slots: TensorSpecs
    scalar_slots: dict[str, Tensor]


def restore_snapshot(
    snapshot: Snapshot | None, objects: TrainingObjects, keep_current_options: bool = False
) -> Progress:
    """Restore the state of a snapshot in a run. Collective call: every process must make it.

    The LR scheduler must have been created on the optimizer before. Gradients are dropped.

    Args:
        snapshot: in the main process; ignored in the others, where it may be None.
        objects: of the run, of any engine, with the parameters of the snapshot's run.
        keep_current_options: use the run's own learning rates, decay and other options of optimizer and EMA, and
            follow its own schedule from the snapshot's step on. By default the snapshot's are used.

    Returns:
        The snapshot's progress, in every process.

    Raises:
        ValueError: the snapshot belongs to another network, optimizer or EMA; raised in every process, with file and
            key, before anything is changed.
    """
    source = snapshot if is_main_process() else None
    header_or_problem = [_make_header(source, objects, keep_current_options) if is_main_process() else None]
    if world_size() > 1:
        dist.broadcast_object_list(header_or_problem, src=0)
    header = header_or_problem[0]
    if not isinstance(header, BroadcastHeader):
        raise ValueError(header)
    task, optimizer = objects.unwrapped_task, objects.unwrapped_optimizer
    optimizer.zero_grad(set_to_none=True)
    reshard(task)
    if world_size() > 1:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    else:
        options = StateDictOptions(full_state_dict=any(map(is_sharded, task.parameters())))
    set_model_state_dict(task, {} if source is None else dict(source.model), options=options)
    _restore_optimizer(header, {} if source is None else source.optimizer, objects, keep_current_options)
    if objects.ema is not None:
        _restore_ema(header, (None if source is None else source.ema) or {}, objects.ema, keep_current_options)
    _restore_lr_scheduler(header.scalars.lr_scheduler, objects.lr_scheduler, optimizer, keep_current_options)
    if objects.scaler is not None and objects.scaler.is_enabled() and header.scalars.scaler is not None:
        objects.scaler.load_state_dict(header.scalars.scaler)
    return header.progress


def _make_header(
    snapshot: Snapshot | None, objects: TrainingObjects, keep_current_options: bool
) -> BroadcastHeader | str:
    """The header of a snapshot, or why it does not fit the run."""
    if snapshot is None:
        return "the main process has no snapshot to load."
    problem = mismatch(snapshot, objects, keep_current_options)
    if problem:
        return problem
    slots = tensor_specs({key: value for key, value in snapshot.optimizer.items() if value.ndim > 0})
    scalar_slots = {key: value.clone() for key, value in snapshot.optimizer.items() if value.ndim == 0}
    return BroadcastHeader(snapshot.progress, snapshot.scalars, tensor_specs(snapshot.ema or {}), slots, scalar_slots)


def mismatch(snapshot: Snapshot, objects: TrainingObjects, keep_current_options: bool) -> str:
    """Why a snapshot cannot be restored in a run, with file and key; empty if it can."""
    try:
        return (
            _model_mismatch(snapshot, objects)
            or _optimizer_mismatch(snapshot, objects)
            or _ema_mismatch(snapshot, objects.ema, keep_current_options)
        )
    except (KeyError, TypeError, AttributeError) as error:  # a state.json that this package did not write
        return f"{STATE_FILE} cannot be used: {type(error).__name__} {error}"


def _model_mismatch(snapshot: Snapshot, objects: TrainingObjects) -> str:
    own = {name.replace(COMPILE_PREFIX, ""): t for name, t in objects.unwrapped_task.state_dict().items()}
    difference = first_difference(tensor_specs(own), tensor_specs(snapshot.model))
    return f"{MODEL_FILE} belongs to another model: {difference}." if difference else ""


def _optimizer_mismatch(snapshot: Snapshot, objects: TrainingObjects) -> str:
    scalars, shapes = snapshot.scalars, {name: parameter.shape for parameter, name in objects.parameter_names.items()}
    stored, own = ([group.get("params") for group in groups] for groups in (scalars.groups, objects.group_options))
    if stored != own:
        group_of = [
            {name: f"group {i}" for i, names in enumerate(groups) for name in names or ()} for groups in (own, stored)
        ]
        difference = first_difference(*group_of) or "its parameters have another order"
        return f"{STATE_FILE} belongs to another optimizer: {difference}."
    for key, value in snapshot.optimizer.items():
        name, _, slot = key.rpartition(".")
        if name not in shapes:
            return f"{OPTIMIZER_FILE}: {key} belongs to no parameter."
        if slot in PARAMETER_SHAPED_SLOTS and value.shape != shapes[name]:
            return f"{OPTIMIZER_FILE}: {key} has shape {tuple(value.shape)}, its parameter {tuple(shapes[name])}."
    if not scalars.slots.keys() <= shapes.keys():
        unknown = min(scalars.slots.keys() - shapes.keys())
        return f"{STATE_FILE}: numbers.slots names {unknown}, which is not a parameter."
    missing = set(LR_SCHEDULER_KEYS) - scalars.lr_scheduler.keys()
    if missing:
        return f"{STATE_FILE}: numbers.lr_scheduler.{min(missing)} is missing."
    if len(scalars.lr_scheduler["base_lrs"]) != len(own):
        return f"{STATE_FILE}: numbers.lr_scheduler.base_lrs does not have one rate for each of {len(own)} groups."
    return ""


def _ema_mismatch(snapshot: Snapshot, ema: LitEMA | None, keep_current_options: bool) -> str:
    if ema is None:
        dropped = snapshot.ema is not None and not keep_current_options
        return f"{EMA_FILE}: the checkpoint has an EMA, but this run has none." if dropped else ""
    if snapshot.ema is None or snapshot.scalars.ema is None:
        return f"{EMA_FILE} is missing: the checkpoint has no EMA, but this run has one."
    missing = set(EMA_KEYS) - snapshot.scalars.ema.keys()
    if missing:
        return f"{STATE_FILE}: numbers.ema.{min(missing)} is missing."
    own, stored = tensor_specs(ema.shadow), tensor_specs(snapshot.ema)
    if keep_current_options:  # --ema_dtype may be another one
        own, stored = ({name: shape for name, (_, shape) in specs.items()} for specs in (own, stored))
    difference = first_difference(own, stored)
    return f"{EMA_FILE} belongs to another network: {difference}." if difference else ""


def _restore_optimizer(
    header: BroadcastHeader, tensors: dict[str, Tensor], objects: TrainingObjects, keep_current_options: bool
) -> None:
    """Load the slots, none for parameters that were never updated, and the options of the parameter groups."""
    optimizer, names = objects.unwrapped_optimizer, objects.parameter_names
    parameters = {names[p]: p for group in optimizer.param_groups for p in group["params"]}
    received = dict(header.scalar_slots)
    for key, spec in header.slots.items():
        received[key] = _receive(tensors.get(key), spec, parameters[key.rpartition(".")[0]])
    state: dict[str, dict[str, Any]] = {name: dict(slots) for name, slots in header.scalars.slots.items()}
    for key, value in received.items():
        name, _, slot = key.rpartition(".")
        state.setdefault(name, {})[slot] = value
    state_by_index = {index: _unflatten(state[name]) for index, name in enumerate(parameters) if name in state}
    groups = optimizer.state_dict()["param_groups"]
    if not keep_current_options:
        groups = [_with_stored_options(own, new) for own, new in zip(groups, header.scalars.groups, strict=True)]
    optimizer.load_state_dict({"state": state_by_index, "param_groups": groups})


def _unflatten(slots: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `state._flatten`."""
    nested: dict[str, Any] = {}
    for slot, value in slots.items():
        outer, _, inner = slot.rpartition(NESTED_SEPARATOR)
        if outer:
            nested.setdefault(outer, {})[inner] = value
        else:
            nested[slot] = value
    return nested


def _with_stored_options(own: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """A parameter group with the stored values of the options that it has."""
    group = dict(own)
    for name in own.keys() & stored.keys() - set(IMPLEMENTATION_OPTIONS):
        if isinstance(own[name], Tensor):
            group[name] = torch.full_like(own[name], stored[name])
        else:
            group[name] = tuple(stored[name]) if isinstance(own[name], tuple) else stored[name]
    return group


def _receive(tensor: Tensor | None, spec: list[Any], like: Tensor) -> Tensor:
    """A new tensor with the main process's values: sharded as ``like`` if it has its shape, otherwise not sharded."""
    dtype, shape = spec
    if tensor is None:
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
    if tensor.shape != like.shape:
        like = torch.empty(shape, dtype=tensor.dtype, device=local_tensor(like).device)
    return distribute_like(tensor, like, from_main_process=True)


def _restore_ema(header: BroadcastHeader, tensors: dict[str, Tensor], ema: LitEMA, keep_current_options: bool) -> None:
    shadow = tensors  # load_state_dict copies the values
    if world_size() > 1:
        shadow = {name: _receive(tensors.get(name), spec, ema.shadow[name]) for name, spec in header.ema.items()}
    scalars = dict(header.scalars.ema or {})
    if keep_current_options:
        num_updates = max(scalars["num_updates"], 0) if ema.use_num_updates else -1
        scalars |= {"decay": ema.decay, "use_num_updates": ema.use_num_updates, "num_updates": num_updates}
    ema.load_state_dict({"shadow": shadow} | scalars)


def _restore_lr_scheduler(
    stored: dict[str, Any], scheduler: LambdaLR, optimizer: Optimizer, keep_current_options: bool
) -> None:
    names = LR_SCHEDULER_KEYS[:2] if keep_current_options else LR_SCHEDULER_KEYS
    state = {name: list(stored[name]) if isinstance(stored[name], list) else stored[name] for name in names}
    scheduler.load_state_dict(state | {"lr_lambdas": [None] * len(scheduler.lr_lambdas)})
    if keep_current_options:
        step = scheduler.last_epoch
        rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        scheduler._last_lr = rates
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

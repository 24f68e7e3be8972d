"""Restore."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from diffusers_ddpm_ext.models.ema import LitEMA
from diffusers_ddpm_ext.training.checkpoints.snapshot import (
    EMA,
    MODEL,
    OPTIMIZER,
    STATE,
    Progress,
    ScalarState,
    Snapshot,
    first_difference,
    tensor_specs,
)
from diffusers_ddpm_ext.training.checkpoints.state import (
    AVERAGE,
    COMPILED,
    NESTED,
    SCHEDULE,
    TrainingObjects,
    group_options,
)
from diffusers_ddpm_ext.utils.dtensor import (
    distribute_like,
    is_main_process,
    is_sharded,
    local_tensor,
    reshard,
    world_size,
)

IMPLEMENTATION = ("params", "foreach", "fused", "capturable", "differentiable")
"""What a group of an optimizer says about how, not what; it stays that of the device at hand."""

AS_PARAMETER = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
"""Slots that have the shape of their parameter."""


@dataclass
class _Letter:
    """What the first process tells the others before tensors travel: all there is to know but the tensors."""

    problem: str = ""
    progress: Progress | None = None
    scalars: ScalarState | None = None
    average: dict[str, list[Any]] = field(default_factory=dict)  # name to [dtype, shape]
    slots: dict[str, list[Any]] = field(default_factory=dict)  # key to [dtype, shape]
    small: dict[str, Tensor] = field(default_factory=dict)  # slots of one number: too many to send one by one


def restore_snapshot(snapshot: Snapshot | None, live: TrainingObjects, keep_current_options: bool = False) -> Progress:
    """Put a run where a snapshot was taken; all processes enter.

    The learning-rate schedule must have been made on the optimizer before. Gradients are dropped.

    Args:
        snapshot: in the first process; the others' is not looked at and may be None.
        live: of the run, of any engine; without a difference in what is trained.
        keep_current_options: use the run's own learning rates, decay and other options of optimizer and EMA, and
            follow its own schedule from the snapshot's step on. By default the snapshot's are used.

    Returns:
        Where the run stands now, in every process.

    Raises:
        ValueError: the snapshot is of another network, optimizer or average, in every process; file and key are
            named, and nothing is changed.
    """
    first = is_main_process()
    letter = _letter(snapshot, live, keep_current_options) if first else _Letter()
    if world_size() > 1:
        letters = [letter]
        dist.broadcast_object_list(letters, src=0)
        letter = letters[0]
    if letter.problem:
        raise ValueError(letter.problem)
    assert letter.scalars is not None
    assert letter.progress is not None
    task, optimizer = live.plain_task, live.torch_optimizer
    optimizer.zero_grad(set_to_none=True)
    reshard(task)
    if world_size() > 1:
        travelling = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(task, dict(snapshot.model) if first and snapshot else {}, options=travelling)
    elif snapshot is not None:
        options = StateDictOptions(full_state_dict=any(map(is_sharded, task.parameters())))
        set_model_state_dict(task, dict(snapshot.model), options=options)
    _apply_optimizer(letter, snapshot.optimizer if first and snapshot else {}, live, keep_current_options)
    if live.ema is not None and letter.scalars.ema is not None:
        _apply_average(letter, (snapshot.ema if first and snapshot else None) or {}, live.ema, keep_current_options)
    _apply_schedule(letter.scalars.lr_scheduler, live, keep_current_options)
    if live.scaler is not None and live.scaler.is_enabled() and letter.scalars.scaler is not None:
        live.scaler.load_state_dict(letter.scalars.scaler)
    return letter.progress


def _letter(snapshot: Snapshot | None, live: TrainingObjects, keep_current_options: bool) -> _Letter:
    if snapshot is None:
        return _Letter("the first process has no snapshot to load.")
    try:
        problem = _problem(snapshot, live, keep_current_options)
    except (KeyError, TypeError, AttributeError) as error:  # a state.json that nobody's program wrote
        problem = f"{STATE} cannot be used: {type(error).__name__} {error}"
    if problem:
        return _Letter(problem)
    slots = tensor_specs({key: value for key, value in snapshot.optimizer.items() if value.ndim > 0})
    small = {key: value.clone() for key, value in snapshot.optimizer.items() if value.ndim == 0}
    return _Letter("", snapshot.progress, snapshot.scalars, tensor_specs(snapshot.ema or {}), slots, small)


def _problem(snapshot: Snapshot, live: TrainingObjects, keep_current_options: bool) -> str:
    """Why a snapshot is not one of this run; empty if it is."""
    here = {name.replace(COMPILED, ""): t for name, t in live.plain_task.state_dict().items()}
    difference = first_difference(tensor_specs(here), tensor_specs(snapshot.model))
    if difference:
        return f"{MODEL} is of another model: {difference}."
    return _optimizer_problem(snapshot, live) or _average_problem(snapshot, live.ema, keep_current_options)


def _optimizer_problem(snapshot: Snapshot, live: TrainingObjects) -> str:
    numbers, shapes = snapshot.scalars, {name: parameter.shape for parameter, name in live.names.items()}
    held, own = ([group.get("params") for group in groups] for groups in (numbers.groups, group_options(live)))
    if held != own:
        groups = ({name: f"group {i}" for i, names in enumerate(side) for name in names or ()} for side in (own, held))
        return f"{STATE} is of another optimizer: {first_difference(*groups) or 'its parameters have another order'}."
    for key, value in snapshot.optimizer.items():
        name, _, slot = key.rpartition(".")
        if name not in shapes:
            return f"{OPTIMIZER}: {key} is of no parameter."
        if slot in AS_PARAMETER and value.shape != shapes[name]:
            return f"{OPTIMIZER}: {key} has shape {tuple(value.shape)}, its parameter {tuple(shapes[name])}."
    if not numbers.slots.keys() <= shapes.keys():
        return f"{STATE}: numbers.slots names {min(numbers.slots.keys() - shapes.keys())}, which is no parameter."
    missing = set(SCHEDULE) - numbers.lr_scheduler.keys()
    if missing:
        return f"{STATE}: numbers.lr_scheduler.{min(missing)} is missing."
    if len(numbers.lr_scheduler["base_lrs"]) != len(own):
        return f"{STATE}: numbers.lr_scheduler.base_lrs has not one rate for each of {len(own)} groups."
    return ""


def _average_problem(snapshot: Snapshot, ema: LitEMA | None, keep_current_options: bool) -> str:
    if ema is None:
        dropped = snapshot.ema is not None and not keep_current_options
        return f"{EMA}: the checkpoint has a moving average, and this run keeps none." if dropped else ""
    if snapshot.ema is None or snapshot.scalars.ema is None:
        return f"{EMA} is missing: the checkpoint's run kept no moving average, and this run does."
    missing = set(AVERAGE) - snapshot.scalars.ema.keys()
    if missing:
        return f"{STATE}: numbers.ema.{min(missing)} is missing."
    difference = first_difference(tensor_specs(ema.shadow), tensor_specs(snapshot.ema))
    return f"{EMA} is of another network: {difference}." if difference else ""


def _apply_optimizer(
    letter: _Letter, tensors: dict[str, Tensor], live: TrainingObjects, keep_current_options: bool
) -> None:
    """Give the optimizer its slots, where parameters never used have none, and its groups' options."""
    assert letter.scalars is not None
    optimizer, names = live.torch_optimizer, live.names
    parameters = {names[p]: p for group in optimizer.param_groups for p in group["params"]}
    state: dict[str, dict[str, Any]] = {name: dict(values) for name, values in letter.scalars.slots.items()}
    for key, value in letter.small.items():
        name, _, slot = key.rpartition(".")
        state.setdefault(name, {})[slot] = value
    for key, facts in letter.slots.items():
        name, _, slot = key.rpartition(".")
        state.setdefault(name, {})[slot] = _receive(tensors.get(key), facts, parameters[name])
    numbered = {number: _nested(state[name]) for number, name in enumerate(parameters) if name in state}
    groups = optimizer.state_dict()["param_groups"]
    if not keep_current_options:
        groups = [_with_options(own, new) for own, new in zip(groups, letter.scalars.groups, strict=True)]
    optimizer.load_state_dict({"state": numbered, "param_groups": groups})


def _nested(slots: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `_flat`."""
    nested: dict[str, Any] = {}
    for slot, value in slots.items():
        outer, _, inner = slot.rpartition(NESTED)
        if outer:
            nested.setdefault(outer, {})[inner] = value
        else:
            nested[slot] = value
    return nested


def _with_options(own: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A group with a snapshot's options, as far as it knows them."""
    group = dict(own)
    for name in own.keys() & new.keys() - set(IMPLEMENTATION):
        kind = own[name]
        if isinstance(kind, Tensor):
            group[name] = torch.full_like(kind, new[name])
        else:
            group[name] = tuple(new[name]) if isinstance(kind, tuple) else new[name]
    return group


def _receive(tensor: Tensor | None, facts: Iterable[Any], like: Tensor) -> Tensor:
    """A new tensor with the values of the first process: laid out as ``like`` where it has its shape, else plain."""
    dtype, shape = facts
    if tensor is None:
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
    if tensor.shape != like.shape:
        like = torch.empty(shape, dtype=tensor.dtype, device=local_tensor(like).device)
    return distribute_like(tensor, like, from_main_process=True)


def _apply_average(letter: _Letter, tensors: dict[str, Tensor], ema: LitEMA, keep_current_options: bool) -> None:
    assert letter.scalars is not None
    shadow = tensors  # copied into place by the average itself
    if world_size() > 1:
        shadow = {name: _receive(tensors.get(name), facts, ema.shadow[name]) for name, facts in letter.average.items()}
    numbers = dict(letter.scalars.ema or {})
    if keep_current_options:
        updates = max(numbers["num_updates"], 0) if ema.use_num_updates else -1
        numbers |= {"decay": ema.decay, "use_num_updates": ema.use_num_updates, "num_updates": updates}
    ema.load_state_dict({"shadow": shadow} | numbers)


def _apply_schedule(numbers: dict[str, Any], live: TrainingObjects, keep_current_options: bool) -> None:
    scheduler, optimizer = live.lr_scheduler, live.torch_optimizer
    names = SCHEDULE[:2] if keep_current_options else SCHEDULE
    state = {name: list(numbers[name]) if isinstance(numbers[name], list) else numbers[name] for name in names}
    scheduler.load_state_dict(state | {"lr_lambdas": [None] * len(scheduler.lr_lambdas)})
    if keep_current_options:
        step = scheduler.last_epoch
        rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        scheduler._last_lr = rates
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

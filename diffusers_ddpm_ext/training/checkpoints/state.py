"""How the state of a run is taken and put back, the same in one process, in data-parallel and in sharded ones.

Every function here is entered by all processes at the same step. Whole tensors exist in the first process only, one
at a time while they travel, whatever the engine; so that a run goes on in another number of processes, or in another
engine. Taking the state changes nothing of a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from diffusers_ddpm_ext.models.ema import LitEMA
from diffusers_ddpm_ext.training.checkpoints.snapshot import (
    EMA,
    MODEL,
    OPTIMIZER,
    STATE,
    Numbers,
    Progress,
    Snapshot,
    describe,
    differences,
)
from diffusers_ddpm_ext.utils.dtensor import full, is_first, is_sharded, local, processes, reshard, spread

COMPILED = "_orig_mod."
NESTED = "/"
IMPLEMENTATION = ("params", "foreach", "fused", "capturable", "differentiable")
"""What a group of an optimizer says about how, not what; it stays that of the device at hand."""

SCHEDULE = ("last_epoch", "_step_count", "base_lrs", "_last_lr")
"""The numbers of a LambdaLR. Its ``state_dict`` also holds the lambdas' attributes, whatever they are."""

AVERAGE = ("decay", "use_num_updates", "num_updates")
"""The numbers of a LitEMA."""

AS_PARAMETER = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
"""Slots that have the shape of their parameter."""


@dataclass(frozen=True)
class Live:
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


def gather(live: Live, progress: Progress, borrow: bool = False) -> Snapshot | None:
    """Take the state of a run between two optimizer steps; all processes enter.

    Args:
        live: of the run; nothing of it is changed.
        progress: where the run stands.
        borrow: let the snapshot share memory with a run on the CPU, which spares a copy of it all where the snapshot
            is written before the next step.

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
    if not is_first():
        return None
    state: Any = held.get("state", {})
    tensors, slots = _split_slots({name.replace(COMPILED, ""): kept for name, kept in state.items()})
    taken = set() if borrow else {t.untyped_storage().data_ptr() for t in _live_tensors(live)}
    numbers = Numbers(
        groups=_groups(live),
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
        value = full(tensor)
        if is_first():
            whole[name] = value.cpu()
    return whole


def _live_tensors(live: Live) -> Iterator[Tensor]:
    yield from map(local, live.plain_task.parameters())
    yield from live.plain_task.buffers()
    for slots in live.torch_optimizer.state.values():
        yield from (local(value) for value in slots.values() if isinstance(value, Tensor))
    if live.ema is not None:
        yield from map(local, live.ema.shadow.values())


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


def _groups(live: Live) -> list[dict[str, Any]]:
    names = live.names
    groups = []
    for group in live.torch_optimizer.param_groups:
        options = {k: v.item() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}
        groups.append({"params": [names[p] for p in group["params"]]} | options)
    return groups


@dataclass
class _Letter:
    """What the first process tells the others before tensors travel: all there is to know but the tensors."""

    problem: str = ""
    progress: Progress | None = None
    numbers: Numbers | None = None
    average: dict[str, list[Any]] = field(default_factory=dict)  # name to [dtype, shape]
    slots: dict[str, list[Any]] = field(default_factory=dict)  # key to [dtype, shape]
    small: dict[str, Tensor] = field(default_factory=dict)  # slots of one number: too many to send one by one


def apply(snapshot: Snapshot | None, live: Live, own_options: bool = False) -> Progress:
    """Put a run where a snapshot was taken; all processes enter.

    The learning-rate schedule must have been made on the optimizer before. Gradients are dropped.

    Args:
        snapshot: in the first process; the others' is not looked at and may be None.
        live: of the run, of any engine; without a difference in what is trained.
        own_options: keep the run's own learning rates, decay and other options of optimizer and average, and follow
            its own schedule from the snapshot's step on. By default they are the snapshot's.

    Returns:
        Where the run stands now, in every process.

    Raises:
        ValueError: the snapshot is of another network, optimizer or average, in every process; file and key are
            named, and nothing is changed.
    """
    first = is_first()
    letter = _letter(snapshot, live, own_options) if first else _Letter()
    if processes() > 1:
        letters = [letter]
        dist.broadcast_object_list(letters, src=0)
        letter = letters[0]
    if letter.problem:
        raise ValueError(letter.problem)
    assert letter.numbers is not None
    assert letter.progress is not None
    task, optimizer = live.plain_task, live.torch_optimizer
    optimizer.zero_grad(set_to_none=True)
    reshard(task)
    if processes() > 1:
        travelling = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(task, dict(snapshot.model) if first and snapshot else {}, options=travelling)
    elif snapshot is not None:
        options = StateDictOptions(full_state_dict=any(map(is_sharded, task.parameters())))
        set_model_state_dict(task, dict(snapshot.model), options=options)
    _apply_optimizer(letter, snapshot.optimizer if first and snapshot else {}, live, own_options)
    if live.ema is not None and letter.numbers.ema is not None:
        _apply_average(letter, (snapshot.ema if first and snapshot else None) or {}, live.ema, own_options)
    _apply_schedule(letter.numbers.lr_scheduler, live, own_options)
    if live.scaler is not None and live.scaler.is_enabled() and letter.numbers.scaler is not None:
        live.scaler.load_state_dict(letter.numbers.scaler)
    return letter.progress


def _letter(snapshot: Snapshot | None, live: Live, own_options: bool) -> _Letter:
    if snapshot is None:
        return _Letter("the first process has no snapshot to load.")
    try:
        problem = _problem(snapshot, live, own_options)
    except (KeyError, TypeError, AttributeError) as error:  # a state.json that nobody's program wrote
        problem = f"{STATE} cannot be used: {type(error).__name__} {error}"
    if problem:
        return _Letter(problem)
    slots = describe({key: value for key, value in snapshot.optimizer.items() if value.ndim > 0})
    small = {key: value.clone() for key, value in snapshot.optimizer.items() if value.ndim == 0}
    return _Letter("", snapshot.progress, snapshot.numbers, describe(snapshot.ema or {}), slots, small)


def _problem(snapshot: Snapshot, live: Live, own_options: bool) -> str:
    """Why a snapshot is not one of this run; empty if it is."""
    here = {name.replace(COMPILED, ""): t for name, t in live.plain_task.state_dict().items()}
    difference = differences(describe(here), describe(snapshot.model))
    if difference:
        return f"{MODEL} is of another model: {difference}."
    return _optimizer_problem(snapshot, live) or _average_problem(snapshot, live.ema, own_options)


def _optimizer_problem(snapshot: Snapshot, live: Live) -> str:
    numbers, shapes = snapshot.numbers, {name: parameter.shape for parameter, name in live.names.items()}
    held, own = ([group.get("params") for group in groups] for groups in (numbers.groups, _groups(live)))
    if held != own:
        groups = ({name: f"group {i}" for i, names in enumerate(side) for name in names or ()} for side in (own, held))
        return f"{STATE} is of another optimizer: {differences(*groups) or 'its parameters have another order'}."
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


def _average_problem(snapshot: Snapshot, ema: LitEMA | None, own_options: bool) -> str:
    if ema is None:
        dropped = snapshot.ema is not None and not own_options
        return f"{EMA}: the checkpoint has a moving average, and this run keeps none." if dropped else ""
    if snapshot.ema is None or snapshot.numbers.ema is None:
        return f"{EMA} is missing: the checkpoint's run kept no moving average, and this run does."
    missing = set(AVERAGE) - snapshot.numbers.ema.keys()
    if missing:
        return f"{STATE}: numbers.ema.{min(missing)} is missing."
    difference = differences(describe(ema.shadow), describe(snapshot.ema))
    return f"{EMA} is of another network: {difference}." if difference else ""


def _apply_optimizer(letter: _Letter, tensors: dict[str, Tensor], live: Live, own_options: bool) -> None:
    """Give the optimizer its slots, where parameters never used have none, and its groups' options."""
    assert letter.numbers is not None
    optimizer, names = live.torch_optimizer, live.names
    parameters = {names[p]: p for group in optimizer.param_groups for p in group["params"]}
    state: dict[str, dict[str, Any]] = {name: dict(values) for name, values in letter.numbers.slots.items()}
    for key, value in letter.small.items():
        name, _, slot = key.rpartition(".")
        state.setdefault(name, {})[slot] = value
    for key, facts in letter.slots.items():
        name, _, slot = key.rpartition(".")
        state.setdefault(name, {})[slot] = _receive(tensors.get(key), facts, parameters[name])
    numbered = {number: _nested(state[name]) for number, name in enumerate(parameters) if name in state}
    groups = optimizer.state_dict()["param_groups"]
    if not own_options:
        groups = [_with_options(own, new) for own, new in zip(groups, letter.numbers.groups, strict=True)]
    optimizer.load_state_dict({"state": numbered, "param_groups": groups})


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
        like = torch.empty(shape, dtype=tensor.dtype, device=local(like).device)
    return spread(tensor, like, from_first=True)


def _apply_average(letter: _Letter, tensors: dict[str, Tensor], ema: LitEMA, own_options: bool) -> None:
    assert letter.numbers is not None
    shadow = tensors  # copied into place by the average itself
    if processes() > 1:
        shadow = {name: _receive(tensors.get(name), facts, ema.shadow[name]) for name, facts in letter.average.items()}
    numbers = dict(letter.numbers.ema or {})
    if own_options:
        updates = max(numbers["num_updates"], 0) if ema.use_num_updates else -1
        numbers |= {"decay": ema.decay, "use_num_updates": ema.use_num_updates, "num_updates": updates}
    ema.load_state_dict({"shadow": shadow} | numbers)


def _apply_schedule(numbers: dict[str, Any], live: Live, own_options: bool) -> None:
    scheduler, optimizer = live.lr_scheduler, live.torch_optimizer
    names = SCHEDULE[:2] if own_options else SCHEDULE
    state = {name: list(numbers[name]) if isinstance(numbers[name], list) else numbers[name] for name in names}
    scheduler.load_state_dict(state | {"lr_lambdas": [None] * len(scheduler.lr_lambdas)})
    if own_options:
        step = scheduler.last_epoch
        rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        scheduler._last_lr = rates
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

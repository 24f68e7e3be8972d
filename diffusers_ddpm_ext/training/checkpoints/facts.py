"""Facts of a checkpoint that its run cannot have written, although every checksum is right.

A snapshot is compared with the run that resumes from it before anything is changed: steps, counts, learning rates and
options follow from the step and the run's options, and no stored number may be anything but finite.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from diffusers_ddpm_ext.errors import printable
from diffusers_ddpm_ext.training.checkpoints.restore import IMPLEMENTATION_OPTIONS, mismatch
from diffusers_ddpm_ext.training.checkpoints.snapshot import Snapshot
from diffusers_ddpm_ext.training.checkpoints.state import TrainingObjects
from diffusers_ddpm_ext.training.checkpoints.state_file import (
    EMA_FILE,
    MODEL_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    is_finite,
)

ADAM_SLOTS = {"step", "exp_avg", "exp_avg_sq"}
LR_TOLERANCE = 1e-6
MOST_EMA_UPDATES = 10**12
"""The count does not follow from the step: a run that starts from another one's weights continues its count."""

SAMPLER_COUNTS, SAMPLER_LOSSES = "timestep_sampler.counts", "timestep_sampler.losses"


def check_facts(snapshot: Snapshot, objects: TrainingObjects, options_changed: bool) -> None:
    """Refuse a snapshot that does not fit the run, or whose facts contradict each other or the run.

    Args:
        snapshot: as read.
        objects: of the run, before the snapshot is restored.
        options_changed: whether the run may have other options than the snapshot's.

    Raises:
        ValueError: file, key and value of the first such fact.
    """
    step = snapshot.progress.step
    problem = mismatch(snapshot, objects, options_changed)
    if problem:
        raise ValueError(problem)
    problem = (
        _tensor_problem(snapshot)
        or _optimizer_problem(snapshot, objects, step)
        or _lr_problem(snapshot, objects, step, options_changed)
        or _ema_problem(snapshot, objects, options_changed)
    )
    if not problem and not options_changed:
        problem = _group_problem(snapshot, objects)
    if problem:
        raise ValueError(problem + ": no run writes that, so the checkpoint was changed; use another one")


def _tensor_problem(snapshot: Snapshot) -> str:
    for file, tensors in snapshot.files.items():
        for name, tensor in tensors.items():
            if tensor.is_complex() or (tensor.is_floating_point() and not bool(tensor.isfinite().all())):
                return f"{file}: {name} has values that are not finite"
    counts, losses = (snapshot.model.get(name) for name in (SAMPLER_COUNTS, SAMPLER_LOSSES))
    if counts is not None and losses is not None and bool(((counts < 0) | (counts > losses.shape[-1])).any()):
        return f"{MODEL_FILE}: {SAMPLER_COUNTS} has counts outside 0 to {losses.shape[-1]}"
    return ""


def _optimizer_problem(snapshot: Snapshot, objects: TrainingObjects, step: int) -> str:
    slots: dict[str, set[str]] = {}
    is_adam = type(objects.unwrapped_optimizer) is torch.optim.AdamW
    dtypes = {name: parameter.dtype for parameter, name in objects.parameter_names.items()}
    for key, tensor in snapshot.optimizer.items():
        name, _, slot = key.rpartition(".")
        slots.setdefault(name, set()).add(slot)
        if is_adam and slot == "step" and tensor.ndim > 0:
            return f"{OPTIMIZER_FILE}: {key} is not one number"
        if slot == "step" and tensor.ndim == 0 and not (0 <= tensor.item() <= step and tensor.item() % 1 == 0):
            return f"{OPTIMIZER_FILE}: {key} is {tensor.item():g}, not a number of steps up to {step}"
        if slot in ("exp_avg_sq", "max_exp_avg_sq") and not bool((tensor >= 0).all()):
            return f"{OPTIMIZER_FILE}: {key} has negative mean squares"
        expected = torch.float32 if slot == "step" else dtypes[name]
        if is_adam and tensor.dtype != expected:
            return f"{OPTIMIZER_FILE}: {key} is of {tensor.dtype}, not {expected}"
    if is_adam:
        for name, own in slots.items():
            complete = own | snapshot.scalars.slots.get(name, {}).keys()
            if differing := ADAM_SLOTS ^ complete:
                kind = "missing" if differing & ADAM_SLOTS else "unexpected"
                return f"{OPTIMIZER_FILE}: {name}.{printable(min(differing), 60)} is {kind}"
    return ""


def _lr_problem(snapshot: Snapshot, objects: TrainingObjects, step: int, options_changed: bool) -> str:
    state, scheduler = snapshot.scalars.lr_scheduler, objects.lr_scheduler
    for name, expected in (("last_epoch", step), ("_step_count", step + 1)):
        if state.get(name, expected) != expected:
            return f"{STATE_FILE}: numbers.lr_scheduler.{name} is {state[name]}, after step {step}"
    if options_changed:
        return ""
    bases = [float(rate) for rate in scheduler.base_lrs]
    rates = [base * factor(step) for base, factor in zip(bases, scheduler.lr_lambdas, strict=True)]
    groups = [group.get("lr") for group in snapshot.scalars.groups]
    stored = {"base_lrs": (state.get("base_lrs"), bases), "_last_lr": (state.get("_last_lr"), rates)}
    for name, (values, expected_rates) in stored.items():
        if not _are_close(values, expected_rates):
            return f"{STATE_FILE}: numbers.lr_scheduler.{name} is {printable(str(values), 100)}, not {expected_rates}"
    if not _are_close(groups, rates):
        return f"{STATE_FILE}: numbers.groups have the learning rates {printable(str(groups), 100)}, not {rates}"
    return ""


def _are_close(values: Any, expected: list[float]) -> bool:
    return (
        isinstance(values, list)
        and len(values) == len(expected)
        and all(
            is_finite(value) and math.isclose(value, rate, rel_tol=LR_TOLERANCE, abs_tol=1e-15)
            for value, rate in zip(values, expected, strict=True)
        )
    )


def _group_problem(snapshot: Snapshot, objects: TrainingObjects) -> str:
    """The first option of a parameter group, apart from its learning rate, that is not the run's."""
    for number, (own, stored) in enumerate(zip(objects.group_options, snapshot.scalars.groups, strict=False)):
        for name in sorted(own.keys() & stored.keys() - {"lr", *IMPLEMENTATION_OPTIONS}):
            expected = list(own[name]) if isinstance(own[name], tuple) else own[name]
            if stored[name] != expected or type(stored[name]) is not type(expected):
                value = printable(str(stored[name]), 60)
                return f"{STATE_FILE}: numbers.groups[{number}].{name} is {value}, not {expected}"
    return ""


def _ema_problem(snapshot: Snapshot, objects: TrainingObjects, options_changed: bool) -> str:
    state = snapshot.scalars.ema
    if state is None:
        return ""
    updates, decay = state.get("num_updates"), state.get("decay")
    counts = state.get("use_num_updates")
    if type(counts) is not bool or type(updates) is not int or (updates < 0 if counts else updates != -1):
        return f"{STATE_FILE}: numbers.ema.num_updates is {printable(str(updates), 60)}"
    if updates > MOST_EMA_UPDATES:
        return f"{STATE_FILE}: numbers.ema.num_updates is {updates}, more than {MOST_EMA_UPDATES}"
    if decay is None or not is_finite(decay) or not 0 <= decay <= 1:
        return f"{STATE_FILE}: numbers.ema.decay is {printable(str(decay), 60)}, outside 0 to 1"
    steps = state.get("num_steps", 0)
    if type(steps) is not int or not 0 <= steps <= MOST_EMA_UPDATES:
        return f"{STATE_FILE}: numbers.ema.num_steps is {printable(str(steps), 60)}"
    ema = objects.ema
    if ema is not None and not options_changed and (missing := ema.scalars.keys() - state.keys()):
        return f"{STATE_FILE}: numbers.ema.{min(missing)} is missing"
    if ema is not None and not options_changed:
        for name, own in (("decay", ema.decay), ("use_num_updates", ema.use_num_updates)):
            if state[name] != own:
                return f"{STATE_FILE}: numbers.ema.{name} is {state[name]}, not {own} ({EMA_FILE})"
    return ""

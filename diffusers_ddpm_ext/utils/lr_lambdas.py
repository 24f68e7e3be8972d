"""CompVis' learning-rate lambdas, and the arguments that each learning-rate schedule accepts.

A lambda is a factor of the optimizer's learning rate as a function of the step, ``f(step)``, as
``torch.optim.lr_scheduler.LambdaLR`` takes it. Argument names are CompVis' (``ldm/lr_scheduler.py``), and so is the
value at every step up to the last cycle's end; past it, where the original stops training with a TypeError, the last
value holds.

Symbols: n the step, w the length of a warm-up, L the length of a cycle with its warm-up.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

logger = logging.getLogger(__name__)


def _number(name: str, value: Any, low: float = -math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be a finite number (in YAML write 1.0e-6, since 1e-6 is text).")
    if value < low:
        raise ValueError(f"{name}={value!r} must be at least {low:g}.")
    return value


def _numbers(name: str, values: Any, low: float = -math.inf) -> list[float]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence) or len(values) == 0:
        raise ValueError(f"{name}={values!r} must be a list with one number per cycle.")
    return [_number(f"{name}[{i}]", value, low) for i, value in enumerate(values)]


def _report(verbosity_interval: int, step: float, factor: float) -> None:
    if verbosity_interval > 0 and step % verbosity_interval == 0:
        logger.info("step %s: learning-rate factor %s", step, factor)


def _cosine(high: float, low: float, progress: float) -> float:
    """From ``high`` at progress 0 to ``low`` at 1 along half a cosine."""
    return low + 0.5 * (high - low) * (1 + math.cos(progress * math.pi))


class LambdaWarmUpCosineScheduler:
    """Linear warm-up from ``lr_start`` to ``lr_max``, a cosine to ``lr_min`` at ``max_decay_steps``, then constant.

    Args:
        warm_up_steps: steps of the warm-up, at least 0.
        lr_min: factor at the end.
        lr_max: factor after the warm-up.
        lr_start: factor at step 0.
        max_decay_steps: step at which ``lr_min`` is reached, counted from step 0; at least ``warm_up_steps``.
        verbosity_interval: number of steps between two logged factors (level INFO); 0 for none.

    Raises:
        ValueError: an argument is not a number or out of its range.
    """

    def __init__(
        self,
        warm_up_steps: int,
        lr_min: float,
        lr_max: float,
        lr_start: float,
        max_decay_steps: int,
        verbosity_interval: int = 0,
    ) -> None:
        self.warm_up_steps = _number("warm_up_steps", warm_up_steps, 0)
        self.lr_min, self.lr_max = _number("lr_min", lr_min), _number("lr_max", lr_max)
        self.lr_start = _number("lr_start", lr_start)
        self.max_decay_steps = _number("max_decay_steps", max_decay_steps)
        self.verbosity_interval = int(_number("verbosity_interval", verbosity_interval, 0))
        self.last_lr = 0.0
        if max_decay_steps < warm_up_steps:
            raise ValueError(
                f"max_decay_steps={max_decay_steps} counts from step 0 and must be at least "
                f"warm_up_steps={warm_up_steps}."
            )

    def schedule(self, n: float) -> float:
        """The factor at step ``n``, 0 or more."""
        if n < self.warm_up_steps:
            factor = (self.lr_max - self.lr_start) / self.warm_up_steps * n + self.lr_start
        else:
            span = self.max_decay_steps - self.warm_up_steps
            progress = min((n - self.warm_up_steps) / span, 1.0) if span else float(n > self.warm_up_steps)
            factor = _cosine(self.lr_max, self.lr_min, progress)
        self.last_lr = factor
        _report(self.verbosity_interval, n, factor)
        return factor

    def __call__(self, n: float) -> float:
        """The factor at step ``n``, 0 or more."""
        return self.schedule(n)


class LambdaWarmUpCosineScheduler2:
    """Cycles of a linear warm-up from ``f_start`` to ``f_max`` and a cosine down to ``f_min``; then the last value.

    A step on the border of two cycles belongs to the earlier one, as in the original.

    Args:
        warm_up_steps: steps of each cycle's warm-up, at least 0; one entry per cycle, as in all lists here.
        f_min: factor at each cycle's end.
        f_max: factor after each cycle's warm-up.
        f_start: factor at each cycle's start.
        cycle_lengths: steps of each cycle, warm-up included, above 0.
        verbosity_interval: number of steps between two logged factors (level INFO); 0 for none.

    Raises:
        ValueError: the lists differ in length, or an entry is not a number or out of its range.
    """

    def __init__(
        self,
        warm_up_steps: Sequence[int],
        f_min: Sequence[float],
        f_max: Sequence[float],
        f_start: Sequence[float],
        cycle_lengths: Sequence[int],
        verbosity_interval: int = 0,
    ) -> None:
        self.warm_up_steps = _numbers("warm_up_steps", warm_up_steps, 0)
        self.f_min, self.f_max = _numbers("f_min", f_min), _numbers("f_max", f_max)
        self.f_start = _numbers("f_start", f_start)
        self.cycle_lengths = _numbers("cycle_lengths", cycle_lengths)
        self.verbosity_interval = int(_number("verbosity_interval", verbosity_interval, 0))
        self.last_f = 0.0
        names = ("warm_up_steps", "f_min", "f_max", "f_start", "cycle_lengths")
        lengths = {name: len(getattr(self, name)) for name in names}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                "lists must have one entry per cycle each, got " + ", ".join(f"{n}: {k}" for n, k in lengths.items())
            )
        if min(self.cycle_lengths) <= 0:
            raise ValueError(f"cycle_lengths={list(cycle_lengths)} must all be above 0.")
        self.ends = list(itertools.accumulate(self.cycle_lengths))

    def _decayed(self, n: float, cycle: int) -> float:
        """The factor at step ``n`` of a cycle, after its warm-up."""
        span = self.cycle_lengths[cycle] - self.warm_up_steps[cycle]
        progress = min((n - self.warm_up_steps[cycle]) / span, 1.0) if span else 0.0
        return _cosine(self.f_max[cycle], self.f_min[cycle], progress)

    def schedule(self, n: float) -> float:
        """The factor at step ``n``, 0 or more."""
        within = min(n, self.ends[-1])
        cycle = next(i for i, end in enumerate(self.ends) if within <= end)
        local = within - (self.ends[cycle] - self.cycle_lengths[cycle])
        if local < self.warm_up_steps[cycle]:
            rise = (self.f_max[cycle] - self.f_start[cycle]) / self.warm_up_steps[cycle]
            factor = rise * local + self.f_start[cycle]
        else:
            factor = self._decayed(local, cycle)
        self.last_f = factor
        _report(self.verbosity_interval, n, factor)
        return factor

    def __call__(self, n: float) -> float:
        """The factor at step ``n``, 0 or more."""
        return self.schedule(n)


class LambdaLinearScheduler(LambdaWarmUpCosineScheduler2):
    """Cycles of a linear warm-up and a straight line down to ``f_min``; then the last value.

    The line runs over the complete cycle, ``f_min + (f_max - f_min) (L - n) / L``, so after a warm-up of w steps it
    starts at ``(L - w) / L`` of the way and ``f_max`` is never reached, as in the original. Arguments and errors are
    those of `LambdaWarmUpCosineScheduler2`.
    """

    def _decayed(self, n: float, cycle: int) -> float:
        length = self.cycle_lengths[cycle]
        return self.f_min[cycle] + (self.f_max[cycle] - self.f_min[cycle]) * (length - n) / length


COMPVIS_LAMBDAS: dict[str, type[LambdaWarmUpCosineScheduler | LambdaWarmUpCosineScheduler2]] = {
    kind.__name__: kind for kind in (LambdaLinearScheduler, LambdaWarmUpCosineScheduler, LambdaWarmUpCosineScheduler2)
}
REQUIRED_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "piecewise_constant": ("step_rules",),
    "LambdaWarmUpCosineScheduler": ("warm_up_steps", "lr_min", "lr_max", "lr_start", "max_decay_steps"),
    "LambdaWarmUpCosineScheduler2": ("warm_up_steps", "f_min", "f_max", "f_start", "cycle_lengths"),
    "LambdaLinearScheduler": ("warm_up_steps", "f_min", "f_max", "f_start", "cycle_lengths"),
}
OPTIONAL_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("power",),
    **dict.fromkeys(COMPVIS_LAMBDAS, ("verbosity_interval",)),
}
WITHOUT_WARMUP = {*COMPVIS_LAMBDAS, "constant", "piecewise_constant"}


def check_lr_schedule(name: str, warmup_steps: int, arguments: Mapping[str, Any]) -> None:
    """Check that a learning-rate schedule of Diffusers or CompVis accepts its warm-up and arguments.

    Raises:
        ValueError: it does not; the message begins with the name of the option.
    """
    if name in WITHOUT_WARMUP and warmup_steps:
        other = "warm_up_steps in --lr_scheduler_args" if name in COMPVIS_LAMBDAS else "constant_with_warmup"
        raise ValueError(f"lr_warmup_steps {warmup_steps} has no effect with --lr_scheduler {name}: use {other}")
    required = REQUIRED_ARGUMENTS.get(name, ())
    allowed = (*required, *OPTIONAL_ARGUMENTS.get(name, ()))
    if missing := [key for key in required if key not in arguments]:
        raise ValueError(f"lr_scheduler {name} needs --lr_scheduler_args with {', '.join(missing)}")
    for key in arguments:
        if key not in allowed:
            takes = f"takes {', '.join(allowed)}" if allowed else "takes no arguments"
            raise ValueError(f"lr_scheduler_args {key!r}: {name} {takes}")
    if name in COMPVIS_LAMBDAS:
        try:
            COMPVIS_LAMBDAS[name](**arguments)
        except ValueError as error:
            raise ValueError(f"lr_scheduler_args: {error}") from None

"""Monitor of one metric: the best k validations, and early stopping.

Every process sees the same values and so makes the same decisions; the state is saved in every checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.utils.input_files import JsonObject, json_object

MonitorMode = Literal["auto", "min", "max"]
LARGER_IS_BETTER = ("acc", "psnr", "ssim", "score", "likelihood", "precision", "recall", "density", "coverage")


@dataclass(frozen=True)
class RankedValue:
    """The monitored value of one validation.

    Attributes:
        step: optimizer steps done.
        value: of the metric, finite.
    """

    step: int
    value: float


@dataclass(frozen=True)
class MonitorDecision:
    """What the monitor decides after one validation.

    Attributes:
        in_top_k: whether it is among the best k.
        best: whether it is the best of all.
        evicted_step: step of the validation that it replaces among the best k; None where there were fewer.
        stop: whether to stop early.
    """

    in_top_k: bool
    best: bool
    evicted_step: int | None
    stop: bool


class Monitor:
    """Follows one metric over the validations of a run (CompVis' ``monitor``).

    Args:
        name: of the metric as logged, such as ``val/loss_simple_ema``.
        mode: ``min``, ``max``, or ``auto``: larger is better for accuracies, scores, likelihoods, precision, recall,
            density and coverage, else smaller.
        save_top_k: how many of the best validations to keep, 0 or more.
        patience: validations without an improvement after which to stop; None never stops.
        min_delta: least difference to the last improvement that counts as one, 0 or more. It does not affect which
            validations are the best.

    Attributes:
        top: the best validations, best first.
        best: the best validation so far, the earlier one of equal values; None before the first finite value.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        name: str,
        mode: MonitorMode = "auto",
        save_top_k: int = 1,
        patience: int | None = None,
        min_delta: float = 0.0,
    ) -> None:
        if mode not in get_args(MonitorMode):
            raise ValueError(f"monitor_mode={mode!r} is unknown: choose one of {', '.join(get_args(MonitorMode))}.")
        if save_top_k < 0:
            raise ValueError(f"save_top_k={save_top_k} must be 0 or more.")
        if patience is not None and patience < 1:
            raise ValueError(f"early_stopping_patience={patience} must be at least 1, or None to never stop early.")
        if not 0 <= min_delta < math.inf:
            raise ValueError(f"early_stopping_min_delta={min_delta} must be a finite number of 0 or more.")
        larger = mode == "max" or (mode == "auto" and any(word in name.lower() for word in LARGER_IS_BETTER))
        self.name = name
        self.mode = "max" if larger else "min"
        self.save_top_k = save_top_k
        self.patience = patience
        self.min_delta = min_delta
        self.top: list[RankedValue] = []
        self.best: RankedValue | None = None
        self._reference: float | None = None  # value of the last improvement
        self._stale = 0  # validations since then

    def _gain(self, value: float, reference: float) -> float:
        return reference - value if self.mode == "min" else value - reference

    def update(self, step: int, value: float) -> MonitorDecision:
        """Add a validation after ``step`` steps. A non-finite value is never among the best nor an improvement."""
        finite = math.isfinite(value)
        improved = finite and (self._reference is None or self._gain(value, self._reference) > self.min_delta)
        if improved:
            self._reference, self._stale = value, 0
        else:
            self._stale += 1
        best = finite and (self.best is None or self._gain(value, self.best.value) > 0)
        if best:
            self.best = RankedValue(step, value)
        in_top_k, evicted_step = self._rank(RankedValue(step, value)) if finite else (False, None)
        stop = self.patience is not None and self._stale >= self.patience
        return MonitorDecision(in_top_k, best, evicted_step, stop)

    def _rank(self, entry: RankedValue) -> tuple[bool, int | None]:
        """Insert a value among the best k; return whether it stays and which step it evicts."""
        sign = 1 if self.mode == "min" else -1
        ranked = sorted([*self.top, entry], key=lambda other: (sign * other.value, other.step))
        evicted = ranked[self.save_top_k :]
        self.top = ranked[: self.save_top_k]
        in_top_k = entry in self.top
        return in_top_k, evicted[0].step if in_top_k and evicted else None

    def state_dict(self) -> dict[str, Any]:
        """Everything that decisions depend on, as JSON types."""
        return {
            "name": self.name,
            "mode": self.mode,
            "top": [asdict(entry) for entry in self.top],
            "best": None if self.best is None else asdict(self.best),
            "reference": self._reference,
            "stale": self._stale,
        }

    def load_state_dict(self, state: Mapping[str, Any], last_step: int | None = None) -> None:
        """Load the result of `state_dict`.

        The state of another metric or mode is ignored. ``save_top_k`` may be smaller than when it was saved.

        Args:
            state: JSON object.
            last_step: of the run when the state was saved; later validations cannot be in it.

        Raises:
            ValueError: a key is missing, or has a value that no monitor saves.
        """
        content = JsonObject("progress.monitor", dict(state))
        try:
            if (content.string("name"), content.string("mode")) != (self.name, self.mode):
                return
            top = [_ranked_value(entry, last_step) for entry in content.list("top")]
            best = None if state.get("best") is None else _ranked_value(state["best"], last_step)
            reference = None if state.get("reference") is None else content.number("reference")
            stale = content.integer("stale", low=0)
        except ConfigError as error:
            raise ValueError(f"not the state of a monitor: {error}") from error
        self.top, self.best, self._reference, self._stale = top[: self.save_top_k], best, reference, stale


def _ranked_value(entry: Any, last_step: int | None) -> RankedValue:
    value = json_object(entry, "progress.monitor")
    return RankedValue(value.integer("step", low=0, high=last_step), value.number("value"))

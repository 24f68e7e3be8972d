"""Which validations were the best, and whether it is time to stop: decisions from numbers alone.

Every process is given the same numbers and so comes to the same decisions; all of it goes into a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

MODES = ("min", "max", "auto")
LARGER_IS_BETTER = ("acc", "psnr", "ssim", "score", "likelihood")


@dataclass(frozen=True)
class RankedValue:
    """A validation that counts among the best.

    Attributes:
        step: optimizer steps done when it was made.
        value: of the monitored metric, finite.
    """

    step: int
    value: float


@dataclass(frozen=True)
class MonitorDecision:
    """What follows from one validation.

    Attributes:
        in_top_k: whether it is among the best k.
        best: whether it is the best of all.
        evicted_step: step of the entry that it pushed out; None where there was room.
        stop: whether the patience is used up.
    """

    in_top_k: bool
    best: bool
    evicted_step: int | None
    stop: bool


class Monitor:
    """Follows one metric over the validations of a run (CompVis' ``monitor``).

    Args:
        name: of the metric as logged, such as ``val/loss_simple_ema``.
        mode: ``min``, ``max``, or ``auto``: larger is better for accuracies, scores and likelihoods, else smaller.
        save_top_k: how many of the best are remembered, 0 or more.
        patience: validations without an improvement after which to stop; None never stops.
        min_delta: what a value must gain on the last improvement to count as one, 0 or more. It has no say in which
            validations are the best.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        name: str,
        mode: str = "auto",
        save_top_k: int = 1,
        patience: int | None = None,
        min_delta: float = 0.0,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"monitor_mode={mode!r} is unknown: choose one of {', '.join(MODES)}.")
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
        self._best: RankedValue | None = None
        self._reference: float | None = None  # the last improvement
        self._stale = 0  # validations since then

    @property
    def best(self) -> RankedValue | None:
        """The best validation so far, the earlier one where two are equal; None before the first finite value."""
        return self._best

    @property
    def stale(self) -> int:
        """Validations in a row without an improvement."""
        return self._stale

    def _gain(self, value: float, than: float) -> float:
        return than - value if self.mode == "min" else value - than

    def update(self, step: int, value: float) -> MonitorDecision:
        """Take a validation into account.

        Args:
            step: optimizer steps done, more than at the last call.
            value: of the metric. One that is not finite is never among the best, and no improvement.

        Returns:
            What follows from it.
        """
        finite = math.isfinite(value)
        improved = finite and (self._reference is None or self._gain(value, self._reference) > self.min_delta)
        if improved:
            self._reference, self._stale = value, 0
        else:
            self._stale += 1
        best = finite and (self._best is None or self._gain(value, self._best.value) > 0)
        if best:
            self._best = RankedValue(step, value)
        entered, dropped = self._rank(RankedValue(step, value)) if finite else (False, None)
        stop = self.patience is not None and self._stale >= self.patience
        return MonitorDecision(entered, best, dropped, stop)

    def _rank(self, entry: RankedValue) -> tuple[bool, int | None]:
        sign = 1 if self.mode == "min" else -1
        ranked = sorted([*self.top, entry], key=lambda other: (sign * other.value, other.step))
        out = ranked[self.save_top_k :]
        self.top = ranked[: self.save_top_k]
        entered = entry in self.top
        return entered, out[0].step if entered and out else None

    def state_dict(self) -> dict[str, Any]:
        """All that decisions depend on, as JSON knows it."""
        return {
            "name": self.name,
            "mode": self.mode,
            "top": [asdict(entry) for entry in self.top],
            "best": None if self._best is None else asdict(self._best),
            "reference": self._reference,
            "stale": self._stale,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        A state of another metric or mode says nothing about this one and is not taken over. Fewer best ones than
        before may be kept now.

        Args:
            state: what :meth:`state_dict` returned.

        Raises:
            ValueError: an entry is missing or of the wrong kind.
        """
        try:
            if (state["name"], state["mode"]) != (self.name, self.mode):
                return
            top = [RankedValue(int(entry["step"]), float(entry["value"])) for entry in state["top"]]
            best = (
                None
                if state["best"] is None
                else RankedValue(int(state["best"]["step"]), float(state["best"]["value"]))
            )
            reference = None if state["reference"] is None else float(state["reference"])
            stale = int(state["stale"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"no state of a monitor: {error!r}.") from error
        self.top, self._best, self._reference, self._stale = top[: self.save_top_k], best, reference, stale

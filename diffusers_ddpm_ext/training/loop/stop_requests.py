"""What time and signals ask of a run, agreed on by its processes between two steps."""

from __future__ import annotations

import time
from dataclasses import dataclass

from diffusers_ddpm_ext.training.distributed import largest_over_ranks
from diffusers_ddpm_ext.training.loop.run import Run
from diffusers_ddpm_ext.training.signals import Wish

CHECKPOINT, TIME_IS_UP, SIGNAL = 1, 2, 100


@dataclass(frozen=True)
class Asked:
    """What the processes have agreed on; of several wishes the greatest.

    Attributes:
        code: 0, ``CHECKPOINT``, ``TIME_IS_UP``, or ``SIGNAL`` and the number of the signal that asks to stop.
    """

    code: int

    @property
    def checkpoint(self) -> bool:
        """Whether a checkpoint is to be written."""
        return self.code >= CHECKPOINT

    @property
    def stops(self) -> bool:
        """Whether the run is to end after it."""
        return self.code >= TIME_IS_UP

    @property
    def signal(self) -> int:
        """Number of the signal; 0 where none asks to stop."""
        return max(0, self.code - SIGNAL)


class Clock:
    """Looks at the clock, in the first process alone, and at the signals, in every one.

    Args:
        run: whose limits count.
        began: when the process was started, in seconds of the monotonic clock.
    """

    def __init__(self, run: Run, began: float) -> None:
        self._run = run
        self._began = began
        self._last = time.monotonic()

    def asked(self) -> Asked:
        """What is asked for now; all processes call this at the same step and get the same answer."""
        return Asked(largest_over_ranks(self._run.accelerator, self._own()))

    def _own(self) -> int:
        requests, options = self._run.requests, self._run.config.checkpoint
        if requests.wish == Wish.STOP:
            return SIGNAL + requests.stopped_by
        now = time.monotonic()
        first = self._run.accelerator.is_main_process
        if first and options.max_train_minutes is not None and now - self._began > 60 * options.max_train_minutes:
            return TIME_IS_UP
        minutes = options.checkpointing_minutes
        if requests.wish == Wish.CHECKPOINT:
            return CHECKPOINT
        if first and minutes is not None and now - self._last > 60 * minutes:
            self._last = now
            return CHECKPOINT
        return 0

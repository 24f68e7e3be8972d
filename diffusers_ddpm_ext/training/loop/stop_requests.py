"""Requests for a checkpoint or the end of the run, from signals and time limits, agreed on by all processes."""

from __future__ import annotations

import time
from dataclasses import dataclass

from accelerate import Accelerator

from diffusers_ddpm_ext.training.config.options import CheckpointOptions
from diffusers_ddpm_ext.training.distributed import max_over_ranks
from diffusers_ddpm_ext.training.signals import SignalRequests


@dataclass(frozen=True)
class StopRequest:
    """What the processes have agreed to do after the present step.

    Attributes:
        checkpoint: whether to write a checkpoint.
        stop: whether to end the run after it.
        signal: number of the signal that requested the end; 0 for the time limit.
    """

    checkpoint: bool = False
    stop: bool = False
    signal: int = 0


class RequestPoller:
    """Reads the signals in every process, and the time in the main process only.

    Args:
        accelerator: of the run.
        options: section ``checkpoint``, with the time limits.
        signals: of this process.
        start_time: when the process was started, in seconds of the monotonic clock.
    """

    def __init__(
        self, accelerator: Accelerator, options: CheckpointOptions, signals: SignalRequests, start_time: float
    ) -> None:
        self._accelerator = accelerator
        self._options = options
        self._signals = signals
        self._start_time = start_time
        self._last_checkpoint = time.monotonic()

    def poll(self) -> StopRequest:
        """What is requested now. Collective call: every process must make it after the same step."""
        own = self._own_request()
        checkpoint, stop, number = max_over_ranks(self._accelerator, own.checkpoint, own.stop, own.signal)
        return StopRequest(bool(checkpoint), bool(stop), number)

    def _own_request(self) -> StopRequest:
        if self._signals.stopped_by:
            return StopRequest(checkpoint=True, stop=True, signal=self._signals.stopped_by)
        if self._is_over(self._options.max_train_minutes, self._start_time):
            return StopRequest(checkpoint=True, stop=True)
        if self._signals.checkpoint:
            return StopRequest(checkpoint=True)
        if self._is_over(self._options.checkpointing_minutes, self._last_checkpoint):
            self._last_checkpoint = time.monotonic()
            return StopRequest(checkpoint=True)
        return StopRequest()

    def _is_over(self, minutes: float | None, since: float) -> bool:
        """Whether a time limit is exceeded; never outside the main process."""
        is_main = self._accelerator.is_main_process
        return is_main and minutes is not None and time.monotonic() - since > 60 * minutes

"""Requests for a checkpoint or the end of the run, from signals and time limits, agreed on by all processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from accelerate import Accelerator

from diffusers_ddpm_ext.training.config.options import CheckpointOptions
from diffusers_ddpm_ext.training.distributed import start_max_over_ranks
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

    Several processes agree while the next step computes: a step waits for no process, and a request is obeyed one step
    later than by a single process.

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
        self._agreement: Callable[[], list[int]] | None = None
        self._checkpoint_due = False

    def poll(self) -> StopRequest:
        """What is due after the present step, without waiting for other processes.

        Collective call: every process must make it after the same step.
        """
        request = self._own_request()
        if self._accelerator.num_processes > 1:
            own, request = request, self._read_agreement()
            if not request.stop:
                self._start_agreement(own)
        if self._checkpoint_due:
            request, self._checkpoint_due = replace(request, checkpoint=True), False
        return request

    def poll_now(self) -> StopRequest:
        """Whether any process requests the end now; a checkpoint alone is due after the next step. Collective call."""
        request = self._own_request()
        if self._accelerator.num_processes > 1:
            own, request = request, self._read_agreement()
            if not request.stop:
                self._checkpoint_due |= request.checkpoint
                self._start_agreement(own)
                request = self._read_agreement()
        self._checkpoint_due |= request.checkpoint
        return request

    def _start_agreement(self, own: StopRequest) -> None:
        if own.checkpoint:
            self._signals.clear()  # it is announced once
        self._agreement = start_max_over_ranks(self._accelerator, own.checkpoint, own.stop, own.signal)

    def _read_agreement(self) -> StopRequest:
        if self._agreement is None:
            return StopRequest()
        checkpoint, stop, number = self._agreement()
        self._agreement = None
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

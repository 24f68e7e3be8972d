"""Signal handling: a handler records what a signal requests, and the training loop acts on it between two steps.

SIGTERM and SIGINT request a checkpoint and the end of the run, SIGUSR1 a checkpoint. A second SIGINT ends the process
at once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

PR_SET_PDEATHSIG = 1  # of Linux' prctl.h
LAUNCHER_VARIABLES = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")


class SignalRequests:
    """What the signals of one process have requested since the loop last acted on them.

    Attributes:
        stopped_by: number of the first signal that requested the end of the run; 0 without one.
        checkpoint: whether a checkpoint is requested.
    """

    def __init__(self) -> None:
        self.stopped_by = 0
        self.checkpoint = False
        self._interrupts = 0

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """Handle a signal with plain assignments only, so that it may interrupt any code.

        Raises:
            KeyboardInterrupt: at the second SIGINT.
        """
        if number == signal.SIGUSR1:
            self.checkpoint = True
            return
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        # The first one counts: Ctrl-C also reaches the launcher, which then sends a SIGTERM.
        self.stopped_by = self.stopped_by or number

    def clear(self) -> None:
        """Forget the request for a checkpoint, which has been written; a request to stop remains."""
        self.checkpoint = False


@contextmanager
def handle_signals() -> Iterator[SignalRequests]:
    """Record signals as requests inside a ``with`` block.

    Outside the main thread, where Python allows no handlers, nothing is ever requested.
    """
    requests = SignalRequests()
    previous: dict[int, Any] = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            previous[number] = signal.signal(number, requests.handle)
    except ValueError:  # not the main thread
        pass
    try:
        yield requests
    finally:
        for caught, handler in previous.items():
            signal.signal(caught, handler)


def was_launched() -> bool:
    """Whether ``accelerate launch`` or ``torchrun`` started this process."""
    return any(name in os.environ for name in LAUNCHER_VARIABLES)


def die_with_parent() -> None:
    """Request a SIGTERM from the system when the parent process ends; only Linux supports it.

    ``accelerate launch`` does not forward a SIGTERM to its single child, and nobody can forward a SIGKILL: without
    this the training process would continue alone. Only for a process that a launcher started: a shell may end before
    the run that it started.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the request
        os.kill(os.getpid(), signal.SIGTERM)

"""Signals as requests: a handler notes what was asked, and the loop answers at its next quiet moment.

SIGTERM and SIGINT ask for a checkpoint and the end, SIGUSR1 for a checkpoint; a second SIGINT ends the process there.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType
from typing import Any

PR_SET_PDEATHSIG = 1
LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")


class Wish(IntEnum):
    """What a signal asks for; of several the largest is granted."""

    NOTHING = 0
    CHECKPOINT = 1
    STOP = 2


class Requests:
    """What the signals of one process have asked for since the loop looked last.

    Attributes:
        stopped_by: number of the first signal that asked to stop; 0 where none did.
    """

    def __init__(self) -> None:
        self.stopped_by = 0
        self._interrupts = 0
        self._checkpoint = False

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """Handle a signal; all of it is plain assignments, so that it may interrupt anything.

        Args:
            number: of the signal.
            frame: where it interrupted.

        Raises:
            KeyboardInterrupt: at the second SIGINT.
        """
        if number == signal.SIGUSR1:
            self._checkpoint = True
            return
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        # The first one counts: Ctrl-C reaches the launcher too, whose death sends a SIGTERM after it.
        self.stopped_by = self.stopped_by or number

    @property
    def wish(self) -> Wish:
        """What is asked for now."""
        if self.stopped_by:
            return Wish.STOP
        return Wish.CHECKPOINT if self._checkpoint else Wish.NOTHING

    def granted(self) -> None:
        """Forget the request for a checkpoint, which has been written; one to stop remains."""
        self._checkpoint = False


@contextmanager
def listening() -> Iterator[Requests]:
    """Turn signals into requests for the length of a ``with`` block.

    Outside the main thread, where Python allows no handlers, nothing is ever asked for.

    Yields:
        The requests.
    """
    requests = Requests()
    before: dict[int, Any] = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            before[number] = signal.signal(number, requests.note)
    except ValueError:  # not the main thread
        pass
    try:
        yield requests
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)


def was_launched() -> bool:
    """Whether ``accelerate launch`` or ``torchrun`` started this process."""
    return any(name in os.environ for name in LAUNCHERS)


def die_with_parent() -> None:
    """Ask the system for a SIGTERM when the parent process is gone.

    ``accelerate launch`` does not hand a SIGTERM on to its single child, and nobody can hand on a SIGKILL: without
    this the training process would go on alone. Only for a process that a launcher started: a shell may end before
    the run that it started. Only Linux has it; elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it was gone before we asked
        os.kill(os.getpid(), signal.SIGTERM)

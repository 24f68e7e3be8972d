"""Processes that take turns on one machine, and whole processes with their time and memory."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

POLL = 0.01  # seconds


@dataclass(frozen=True)
class Turn:
    """Some steps of a script.

    Attributes:
        wall: seconds.
        cpu: seconds of the processor, of all threads.
        threads: of torch.
        syncs: operations that waited for the GPU.
    """

    wall: float
    cpu: float
    threads: int
    syncs: int


@dataclass(frozen=True)
class Whole:
    """A process from its start to its end, with its children.

    Attributes:
        wall: seconds.
        cpu: seconds of the processor.
        memory: peak of the resident memory of the largest process, MiB.
    """

    wall: float
    cpu: float
    memory: float


class Script:
    """A training script that stops itself after each turn, by the clock in ``hooks/sitecustomize.py``.

    A context manager, at whose end the processes are killed.

    Args:
        command: of the script.
        env: environment, without the clock's variables.
        folder: for its log and clock.
        steps: per turn.
        syncs: step from which operations that wait for the GPU are counted; 0 counts none.
    """

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], folder: Path, steps: int, syncs: int = 0
    ) -> None:
        self.steps, self.lines, self.stopped = steps, 0, 0
        folder.mkdir(parents=True)
        self.clock, self.log = folder / "clock.jsonl", folder / "log.txt"
        variables = {"STEP_CLOCK": str(self.clock), "STEP_CLOCK_TURN": str(steps)}
        variables |= {"STEP_CLOCK_SYNCS": str(syncs)} if syncs else {}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=dict(env) | variables, cwd=folder, stdout=log, stderr=log, start_new_session=True
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.end()

    def end(self) -> None:
        """Kill the script and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def turn(self, limit: float = float("inf")) -> Turn:
        """Let the script take the steps of a turn, from its start for the first one.

        Raises:
            SystemExit: it ended before, with the end of its log.
            TimeoutError: the turn took more than ``limit`` seconds.
        """
        end = time.monotonic() + limit
        if self.stopped:
            os.kill(self.stopped, signal.SIGCONT)
        while True:
            rows = self.clock.read_text().splitlines() if self.clock.exists() else []
            if len(rows) > self.lines and (stopped := self._stopped_process()):
                self.lines, self.stopped = len(rows), stopped
                row = json.loads(rows[-1])
                return Turn(row["wall"], row["cpu"], row["threads"], row["syncs"])
            if self.process.poll() is not None:
                tail = self.log.read_text(errors="replace")[-3000:]
                sys.exit(f"error: the script ended with status {self.process.returncode}:\n{tail}")
            if time.monotonic() > end:
                raise TimeoutError(f"no turn of {self.process.args} within {limit:.0f} s")
            time.sleep(POLL)

    def _stopped_process(self) -> int:
        """Number of the process that stopped itself: the script's, or its launcher's child; 0 if none did."""
        root = psutil.Process(self.process.pid)
        for process in [root, *root.children(recursive=True)]:
            if process.status() == psutil.STATUS_STOPPED:
                return process.pid
        return 0


def run_whole(command: Sequence[str], env: Mapping[str, str], folder: Path) -> Whole:
    """Run a script to its end.

    Raises:
        SystemExit: it failed, with the end of its log.
    """
    folder.mkdir(parents=True)
    start = time.perf_counter()
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, env=dict(env), cwd=folder, stdout=log, stderr=log)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - start
    if process.returncode:
        tail = (folder / "log.txt").read_text(errors="replace")[-3000:]
        sys.exit(f"error: {' '.join(command)} ended with status {process.returncode}:\n{tail}")
    return Whole(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)

"""Run a function in a forked child with limits, and judge what a user would have seen.

The parent imports torch and the package once; a case then costs a fork instead of seconds of imports. Peak memory is
the resident size of the child above that of its first moment: what the case itself took, and pages of libraries that
it used for the first time (some 70 MiB for torch, which a fork does not inherit).
"""

from __future__ import annotations

import os
import re
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MAX_SECONDS, MAX_BYTES = 20.0, 2**30
KILL_SECONDS, ADDRESS_SPACE = 60.0, 12 * 2**30
"""Safety nets, beyond the limits that are judged, so that a case is measured and the machine survives it."""
CONTROL = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]|\r(?!\n)[^\r\n]*\x1b"
)
ERROR_STATUS = (1, 2)


@dataclass(frozen=True)
class Outcome:
    """What a case did: exit status (negative: the signal), seconds, bytes above the base, its output.

    Seconds are those of the processor, so that other load on the machine does not count; a case that waits is killed.
    """

    status: int
    seconds: float
    peak_bytes: int
    stdout: str
    stderr: str

    @property
    def error_lines(self) -> list[str]:
        """The lines that begin with ``error:``."""
        return [line for line in self.stderr.splitlines() if line.startswith("error:")]


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _become_child(work: Callable[[], int], folder: Path, files: tuple[Path, Path]) -> None:
    """In the child: limits, output to files, run, exit with the status that Python would exit with."""
    status = 1
    try:
        files[0].with_name("base").write_text(str(_resident_bytes()))
        os.setsid()
        os.chdir(folder)
        for number, path in zip((1, 2), files, strict=True):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, number)
            os.close(descriptor)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        status = work()
    except SystemExit as request:
        status = request.code if isinstance(request.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status & 255)


class Forked:
    """A function that runs in a child process.

    Args:
        work: returns the exit status.
        folder: working directory of the child.
        logs: folder for its output, outside of what the case may change.
    """

    def __init__(self, work: Callable[[], int], folder: Path, logs: Path) -> None:
        self._logs, self._files = logs, (logs / "stdout", logs / "stderr")
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become_child(work, folder, self._files)

    def kill(self) -> None:
        """Kill it, if it still runs."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> Outcome:
        """Wait for its end; it is killed after `KILL_SECONDS`."""
        descriptor = os.pidfd_open(self.pid)
        try:
            if not select.select([descriptor], [], [], KILL_SECONDS)[0]:
                self.kill()
            _, code, usage = os.wait4(self.pid, 0)
        finally:
            os.close(descriptor)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # workers that it left behind
        base = int((self._logs / "base").read_text())
        texts = [path.read_bytes().decode("utf-8", "replace") if path.exists() else "" for path in self._files]
        seconds = usage.ru_utime + usage.ru_stime
        return Outcome(os.waitstatus_to_exitcode(code), seconds, max(0, usage.ru_maxrss * 1024 - base), *texts)


def run_forked(work: Callable[[], int], folder: Path, logs: Path) -> Outcome:
    """Run a function in a child process to its end; arguments as `Forked`."""
    return Forked(work, folder, logs).wait()


def findings(outcome: Outcome) -> list[str]:
    """What is wrong with an outcome, a few words each; none if it is a result or one ``error:`` line.

    A result has status 0. An error has status 2 (1 for a run that had started) and exactly one ``error:`` line. Either
    way no traceback, no control characters, at most `MAX_SECONDS` and `MAX_BYTES`.
    """
    wrong: list[str] = []
    output = outcome.stdout + outcome.stderr
    if "Traceback (most recent call last)" in output:
        last = next((line for line in reversed(outcome.stderr.splitlines()) if line.strip()), "")
        wrong.append(f"traceback: {last[:200]}")
    elif outcome.status < 0:
        wrong.append(f"killed by signal {-outcome.status}" + (" (hangs)" if outcome.status == -signal.SIGKILL else ""))
    elif outcome.status == 2 and len(outcome.error_lines) != 1:
        wrong.append(f"status 2 with {len(outcome.error_lines)} error lines")
    elif outcome.status == 1 and (len(outcome.error_lines) > 1 or not output.strip()):
        wrong.append(f"status 1 with {len(outcome.error_lines)} error lines")  # `verify` and `doctor` list findings
    elif outcome.status == 0 and outcome.error_lines:
        wrong.append("status 0 with an error line")
    elif outcome.status not in (0, *ERROR_STATUS):
        wrong.append(f"status {outcome.status}")
    if outcome.seconds > MAX_SECONDS:
        wrong.append(f"{outcome.seconds:.0f} s")
    if outcome.peak_bytes > MAX_BYTES:
        wrong.append(f"{outcome.peak_bytes / 2**20:.0f} MiB")
    found = CONTROL.search(output)
    if found:
        wrong.append(f"control character {found[0]!r}")
    if any(len(line) > 2000 for line in outcome.error_lines):
        wrong.append(f"an error line of {max(map(len, outcome.error_lines))} characters")
    return wrong

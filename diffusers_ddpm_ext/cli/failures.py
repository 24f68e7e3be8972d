"""What ends a command without being a bug: its one line, and its exit status."""

from __future__ import annotations

import errno
import traceback
from pathlib import Path

from diffusers_ddpm_ext.errors import ConfigError, RunError

PACKAGE = Path(__file__).parents[1]
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)
MEMORY_MESSAGES = ("can't allocate memory", "not enough memory", "out of memory")
OWN_FRAMES, LAST_FRAMES = 5, 60
"""A recursion is our bug if so many of the last frames are of this package."""


def describe_failure(error: BaseException) -> tuple[str, int] | None:
    """The line and the exit status of an exception; None for a bug, whose traceback is shown.

    A mistake in the input is status 2, a run that could not continue 1, an interrupt 130, and an output that nobody
    reads any more 141, as for a process that SIGPIPE ends.
    """
    if isinstance(error, ConfigError):
        return str(error), 2
    if isinstance(error, RunError):
        return str(error), 1
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, BrokenPipeError):
        return "the output was closed before all of it was written", 141
    if _is_out_of_memory(error):
        first = " ".join(str(error).split()).split(". ")[0]
        return f"the memory does not suffice{f' ({first})' if first else ''}: use smaller batches or images", 1
    if isinstance(error, RecursionError) and not _is_ours(error):
        return "an input is nested too deeply to be read", 2
    if isinstance(error, OSError):
        return _describe_os_error(error)
    if isinstance(error, ImportError) and (error.name or "").split(".")[0] not in ("", PACKAGE.name):
        reason = " ".join(str(error).split())
        return f"a package cannot be imported ({reason}): ddpm-ext doctor says what is missing", 2
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, NumPy or torch could not allocate; torch' own class is known by its name, without an import."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in MEMORY_MESSAGES)


def _describe_os_error(error: OSError) -> tuple[str, int] | None:
    """An error of the system about a file of the user, or about the disk; a missing file of this package is a bug."""
    reason = error.strerror or str(error)
    if error.errno in DISK_ERRORS:
        return f"cannot write {error.filename}: {reason}" if error.filename else f"cannot write: {reason}", 1
    if error.filename is None or isinstance(error.filename, int):
        return None
    name = error.filename.decode(errors="replace") if isinstance(error.filename, bytes) else str(error.filename)
    if PACKAGE in Path(name).parents:
        return None
    return f"{name}: {reason}", 2


def _is_ours(error: BaseException) -> bool:
    """Whether this package recurses without end."""
    frames = traceback.extract_tb(error.__traceback__)[-LAST_FRAMES:]
    return sum(PACKAGE in Path(frame.filename).parents for frame in frames) > OWN_FRAMES

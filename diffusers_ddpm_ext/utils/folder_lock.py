"""Lock of an output folder, or of an output file: one command at a time writes to it."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from contextlib import suppress
from pathlib import Path
from types import TracebackType

logger = logging.getLogger(__name__)

LOCK = ".run.lock"
LOCKED_BY_OTHER = (errno.EACCES, errno.EAGAIN)
LOCKS_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
# Locks that this process holds, by device and inode, with its process id: the system would grant it the same lock
# again, and drop it as soon as any descriptor of the file is closed. A forked child inherits the entry, not the lock.
_HELD: dict[tuple[int, int], int] = {}


class FolderBusy(RuntimeError):
    """Another run uses the folder or file."""


class FolderLock:
    """Lock of an output folder for this process, from `acquire` to `release` or to the end of the process.

    Training, sampling, evaluations and fits lock the folder that they write to. Commands that write a single file into
    a folder of others lock that file alone, by its name.

    A record lock (``fcntl.lockf``): a forked data worker does not inherit it, so it ends with its owner. A ``flock``
    would be held until the last worker has ended.
    """

    def __init__(self, folder: Path, file_name: str | None = None) -> None:
        self.path = folder / (LOCK if file_name is None else f".{file_name}.lock")
        self._subject = folder if file_name is None else folder / file_name
        self._kind = "folder" if file_name is None else "file"
        self._descriptor: int | None = None
        self._owner = 0
        self._locked = False

    def acquire(self) -> FolderLock:
        """Lock the folder or file; return this lock.

        On a file system without locks a warning is logged and the run continues without one.

        Raises:
            FolderBusy: another run, in this process or elsewhere, holds it; the message names its process.
            OSError: the folder is not writable.
        """
        while True:
            self._check_own_process()
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                self._locked = self._lock(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            if self._is_current(descriptor):
                break
            os.close(descriptor)  # its previous owner removed the file after we opened and before we locked it
        self._descriptor, self._owner = descriptor, os.getpid()
        if self._locked:
            _HELD[_file_id(descriptor)] = os.getpid()
            with suppress(OSError):  # a full disk: a second run's error then cannot name this process
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
        return self

    def check_free(self) -> None:
        """Raise FolderBusy if another run holds the lock; write nothing. For a command that begins with slow work."""
        self._check_own_process()
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return  # no file, or none that this user may lock
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in LOCKED_BY_OTHER:
                raise self._busy(_describe_owner(descriptor)) from None
        finally:
            os.close(descriptor)

    def renew(self) -> None:
        """Lock again: the system drops the lock when any code in this process opens and closes the file.

        Raises:
            FolderBusy: another run locked the folder meanwhile.
            RuntimeError: the lock was never acquired.
        """
        if self._descriptor is None:
            raise RuntimeError(f"{self.path} is not held: acquire it first")
        if not self._is_current(self._descriptor):
            raise FolderBusy(f"{self.path} was removed: another run may be using {self._subject}")
        if self._locked:
            self._lock(self._descriptor)

    def release(self) -> None:
        """Unlock the folder. In a forked child this does nothing: the lock is its parent's."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None or self._owner != os.getpid():
            return
        if _HELD.pop(_file_id(descriptor), None) and self._is_current(descriptor):
            self.path.unlink(missing_ok=True)  # while locked: a process that opened it meanwhile opens it again
        os.close(descriptor)

    def __enter__(self) -> FolderLock:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _check_own_process(self) -> None:
        """Find a lock of this process without opening the file: closing it would drop that lock."""
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            return
        if _HELD.get((status.st_dev, status.st_ino)) == os.getpid():
            raise self._busy(f"process {os.getpid()}, this one")

    def _lock(self, descriptor: int) -> bool:
        """Lock the file; False, with a warning, if the file system has no locks."""
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in LOCKED_BY_OTHER:
                raise self._busy(_describe_owner(descriptor)) from None
            if error.errno not in LOCKS_UNSUPPORTED:
                raise
            logger.warning(
                "%s cannot be locked on this file system (%s): make sure that no second run uses this %s.",
                self._subject,
                error.strerror,
                self._kind,
            )
            return False
        return True

    def _busy(self, owner: str) -> FolderBusy:
        return FolderBusy(
            f"another run uses {self._subject} ({owner}): wait for it, end it, or name another {self._kind}"
        )

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(descriptor))
        except FileNotFoundError:
            return False


def _file_id(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _describe_owner(descriptor: int) -> str:
    fields = os.pread(descriptor, 300, 0).decode("utf-8", "replace").split()
    if not fields:
        return "its process is not known yet"
    remote = len(fields) > 1 and fields[1] != socket.gethostname()
    return f"process {fields[0]} on {fields[1]}" if remote else f"process {fields[0]}"

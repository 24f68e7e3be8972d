"""One run at a time in a folder."""

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
TAKEN = (errno.EACCES, errno.EAGAIN)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
# Locks that this very process holds, by file: the system would grant it the same lock again, and take it away when any
# descriptor of the file is closed. A forked child inherits the entry without the lock, hence the process id.
_HELD: dict[tuple[int, int], int] = {}


class FolderBusy(RuntimeError):
    """Another run is at work in the folder."""


class FolderLock:
    """Holds a run's folder for this process, from `acquire` to `release` or to its death, however that comes.

    A record lock (``fcntl.lockf``): a forked data worker does not inherit it, so that it ends with its owner, where a
    ``flock`` would stay until the last worker is gone.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._descriptor: int | None = None
        self._owner = 0
        self._granted = False

    def acquire(self) -> FolderLock:
        """Take the folder.

        On a file system without locks a warning is logged and the run goes on without.

        Returns:
            This lock.

        Raises:
            FolderBusy: another run, in this process or elsewhere, has it; the message names its process.
            OSError: the folder cannot be written.
        """
        while True:
            self._refuse_own()
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                self._granted = self._lock(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            if self._is_current(descriptor):
                break
            os.close(descriptor)  # its former owner removed the file between our opening and our locking it
        self._descriptor, self._owner = descriptor, os.getpid()
        if self._granted:
            _HELD[_identity(descriptor)] = os.getpid()
            with suppress(OSError):  # a full disk: then a second run is refused without a name
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
        return self

    def renew(self) -> None:
        """Take the lock again: the system drops it when any part of this process opens and closes the file.

        Raises:
            FolderBusy: another run took the folder meanwhile.
            RuntimeError: the lock was never taken.
        """
        if self._descriptor is None:
            raise RuntimeError(f"{self.path} is not held: acquire it first")
        if not self._is_current(self._descriptor):
            raise FolderBusy(f"{self.path} is gone: another run may be at work in {self.path.parent}")
        if self._granted:
            self._lock(self._descriptor)

    def release(self) -> None:
        """Give the folder back. In a forked child this does nothing: the lock is its parent's."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None or self._owner != os.getpid():
            return
        if _HELD.pop(_identity(descriptor), None) and self._is_current(descriptor):
            self.path.unlink(missing_ok=True)  # while it is locked: whoever waits for it looks again
        os.close(descriptor)

    def __enter__(self) -> FolderLock:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _refuse_own(self) -> None:
        """Look at the file without opening it: closing it again would end a lock that this process holds."""
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            return
        if _HELD.get((status.st_dev, status.st_ino)) == os.getpid():
            raise self._busy(f"process {os.getpid()}, this one")

    def _lock(self, descriptor: int) -> bool:
        """Lock the file; False, with a warning, where the file system cannot."""
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in TAKEN:
                raise self._busy(_owner(descriptor)) from None
            if error.errno not in NO_LOCKS:
                raise
            logger.warning(
                "%s cannot be locked on this file system (%s): see to it that no second run uses this folder.",
                self.path.parent,
                error.strerror,
            )
            return False
        return True

    def _busy(self, owner: str) -> FolderBusy:
        folder = self.path.parent
        return FolderBusy(f"another run is at work in {folder} ({owner}): wait for it, end it, or name another folder")

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(descriptor))
        except FileNotFoundError:
            return False


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _owner(descriptor: int) -> str:
    words = os.pread(descriptor, 300, 0).decode("utf-8", "replace").split()
    if not words:
        return "its process is not known yet"
    elsewhere = len(words) > 1 and words[1] != socket.gethostname()
    return f"process {words[0]} on {words[1]}" if elsewhere else f"process {words[0]}"

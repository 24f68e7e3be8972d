"""Files and folders of a run: their names, atomic writing, and reading while they are being written."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

CONFIG, ENVIRONMENT, METRICS = "config.yaml", "environment.json", "metrics.jsonl"
EVALUATION = "evaluation/evaluation.json"
SAMPLE_METRICS_FILE = "evaluation/sample_metrics.json"
NO_FOLDER_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
"""Errors of network file systems that cannot fsync a folder, and need not."""


def write_atomically(
    path: str | os.PathLike[str], write: Callable[[BinaryIO], Any], make_parents: bool = True, fsync: bool = False
) -> Path:
    """Write a temporary file next to the target and rename it when complete: no reader ever sees a partial file.

    Args:
        path: file to write.
        write: writes the content into an open binary file.
        make_parents: create missing parent folders; otherwise they are an error.
        fsync: flush the content to the disk before the file gets its name.

    Returns:
        The path.

    Raises:
        OSError: the file cannot be written; an older one is unchanged.
    """
    target = Path(path)
    if make_parents:
        target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            write(file)
            if fsync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def write_text_atomically(path: str | os.PathLike[str], text: str, make_parents: bool = True) -> Path:
    """`write_atomically` for a text, encoded as UTF-8."""
    return write_atomically(path, lambda file: file.write(text.encode()), make_parents)


def apply_umask(folder: Path) -> None:
    """Give every file in a folder, and below, the permissions of a new file there.

    Libraries write weights through a temporary file that only its owner may read.
    """
    probe = folder / f".mode.{os.getpid()}.part"
    try:
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        mode = os.fstat(descriptor).st_mode & 0o777
        os.close(descriptor)
    finally:
        probe.unlink(missing_ok=True)
    for above, _, names in os.walk(folder):
        for name in names:
            path = Path(above) / name
            if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o777 != mode:
                with suppress(OSError):  # a file system without permissions
                    path.chmod(mode)


def copy_atomically(source: Path, target: Path) -> Path:
    """`write_atomically` for the content of another file."""
    content = source.read_bytes()
    return write_atomically(target, lambda file: file.write(content))


def replace_folder(draft: Path, final: Path) -> None:
    """Give a finished folder its final name. A folder that had this name keeps the draft's name or is deleted.

    Args:
        draft: a folder named ``.writing-...``.
        final: its name, in the same parent folder.

    Raises:
        OSError: it cannot be renamed; the older folder still has the name.
    """
    if not os.path.lexists(final):
        os.rename(draft, final)
    elif not _exchange(draft, final):
        replaced = draft.with_name(draft.name.replace("writing", "replaced", 1))
        os.rename(final, replaced)
        try:
            os.rename(draft, final)
        except OSError:
            os.rename(replaced, final)
            raise
        fsync_folder(final.parent)
        remove_path(replaced)
    fsync_folder(final.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically, so that each exists at every moment; False where the system cannot."""
    import ctypes  # not at the top: `--help` does not wait for it

    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    status: int = renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange)
    return status == 0


def remove_path(path: Path) -> None:
    """Delete a folder, file or link; what cannot be deleted stays."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def fsync_path(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """Flush a folder to the disk where its file system can."""
    try:
        fsync_path(path)
    except OSError as error:
        if error.errno not in NO_FOLDER_FSYNC:
            raise


@contextmanager
def os_errors() -> Iterator[None]:
    """Turn a SafetensorError that reports an error of the operating system (a full disk) into that OSError."""
    from safetensors import SafetensorError  # not at the top: `--help` does not wait for it

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error

"""What a folder holds, below any depth and without following a link: for whatever publishes or checks a folder."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from diffusers_ddpm_ext.errors import ConfigError, printable

MAX_ENTRIES = 100_000
LINK, SPECIAL, NOT_UTF8, CONTROLS = (
    "a link", "not a regular file", "its name is not UTF-8", "its name has control characters",
)  # fmt: skip
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class FolderScan:
    """Entries of a folder; names are relative to it, with slashes.

    Attributes:
        files: regular files by name, in the order of the names.
        left_out: name -> why it is no file to read: a link of any kind, a named pipe, a name that is not UTF-8
            or has control characters.
        empty_folders: names of folders without an entry.
    """

    files: dict[str, Path] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    empty_folders: list[str] = field(default_factory=list)


def scan_folder(
    folder: Path, skip: Callable[[tuple[str, ...]], bool] = lambda parts: False, max_entries: int = MAX_ENTRIES
) -> FolderScan:
    """Scan a folder. No link below it is followed; the folder itself may be one.

    Args:
        folder: the folder.
        skip: whether to leave out an entry, and all that is below it, by the parts of its name.
        max_entries: the largest number of entries.

    Raises:
        ConfigError: it has more entries.
        OSError: a folder cannot be read.
    """
    scan = FolderScan()
    pending: list[tuple[str, ...]] = [()]
    count = 0
    while pending:
        parts = pending.pop()
        with os.scandir(folder.joinpath(*parts)) as iterator:
            entries = list(itertools.islice(iterator, max_entries + 1))
        if parts and not entries:
            scan.empty_folders.append("/".join(parts))
        entries = [entry for entry in entries if not skip((*parts, entry.name))]
        count += len(entries)
        if count > max_entries:
            raise ConfigError(f"{printable(str(folder))} has more than {max_entries:,} files: move some away.")
        for entry in entries:
            name = "/".join((*parts, entry.name))
            if entry.is_symlink() or getattr(entry, "is_junction", bool)():  # of Windows, from Python 3.12 on
                scan.left_out[name] = LINK
            elif not _is_utf8(entry.name):
                scan.left_out[name] = NOT_UTF8
            elif _CONTROLS.search(entry.name):  # which act on the terminal of whoever shows them
                scan.left_out[name] = CONTROLS
            elif entry.is_dir(follow_symlinks=False):
                pending.append((*parts, entry.name))
            elif entry.is_file(follow_symlinks=False):
                scan.files[name] = Path(entry.path)
            else:
                scan.left_out[name] = SPECIAL
    return FolderScan(
        dict(sorted(scan.files.items())), dict(sorted(scan.left_out.items())), sorted(scan.empty_folders)
    )


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_below_link(folder: Path, name: str) -> bool:
    """Whether a name in a folder is a link, or is reached through one below the folder."""
    path = folder
    for part in name.split("/"):
        path = path / part
        if path.is_symlink():
            return True
    return False


def list_names(names: list[str], limit: int = 8) -> str:
    """Names for a message, on one printable line: the first ones, and how many more there are."""
    shown = ", ".join(printable(name, 200) for name in names[:limit])
    more = len(names) - limit
    return f"{shown} and {more:,} more" if more > 0 else shown

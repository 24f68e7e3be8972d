"""Checkpoint folders that exist or do not: written whole, found, set aside, cleaned up, pruned.

    checkpoint-<step>/             whole, always: one rename brings it into being, as the very last act
    .writing-<step>-<token>/       a checkpoint in the making; after a kill, rubbish
    .deleting-<step>-<token>/      a checkpoint on its way out, under a name that nothing loads
    .replaced-<step>-<token>/      the older of two checkpoints of one step, where two folders cannot swap names
    aside-checkpoint-<step>/       set aside: never loaded, never deleted; aside-checkpoint-<step>.txt says why

One writer at a time: whoever writes, cleans, sets aside or prunes holds the folder's lock.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.training.checkpoints.manifest import (
    MANIFEST,
    FileDigest,
    digest_file,
    encode_manifest,
)
from diffusers_ddpm_ext.utils.files import fsync_folder, fsync_path, os_errors, remove_path, replace_folder

ASIDE = "aside-"
LEFTOVER = re.compile(r"\.(writing|deleting|replaced)-([0-9]+)-[0-9a-f]{8}", re.ASCII)


class CheckpointNotWritten(OSError):
    """The disk is full, or the folder cannot be written. Every checkpoint that stood before still stands."""


def write_checkpoint(
    parent: Path, step: int, fill: Callable[[Path], None], facts: Mapping[str, Any] | None = None
) -> Path:
    """Write ``checkpoint-<step>``, which appears whole or not at all, whenever the process or the machine dies.

    A checkpoint of the same step that stands already changes places with the new one in one act (on file systems that
    cannot, by two renames, and `remove_leftovers` undoes the first should the second never come).

    Args:
        parent: folder of the run.
        step: optimizer steps done, not negative.
        fill: writes files into the folder that it is given, and into folders below.
        facts: JSON to stand in the manifest, where it can be read before any file is.

    Returns:
        The folder.

    Raises:
        CheckpointNotWritten: the system refused. What was begun is removed as far as that is possible.
        ValueError: a negative step, or ``fill`` left something that is not a plain file, or a manifest of its own.
    """
    if step < 0:
        raise ValueError(f"step {step}: the step of a checkpoint is not negative")
    final, draft = parent / f"checkpoint-{step}", parent / f".writing-{step}-{secrets.token_hex(4)}"
    try:
        draft.mkdir()
        with os_errors():
            fill(draft)
        _seal_files(draft, step, facts or {})
        replace_folder(draft, final)
    except OSError as error:
        raise _not_written(final, error.errno, error.strerror or str(error)) from error
    finally:
        remove_path(draft)
    return final


def _not_written(final: Path, number: int | None, reason: str) -> CheckpointNotWritten:
    return CheckpointNotWritten(number, f"{final} could not be written ({reason}); older checkpoints still stand")


def _seal_files(draft: Path, step: int, facts: Mapping[str, Any]) -> None:
    """Send every file to the disk and read it once for its checksum meanwhile; then the manifest, then the folders."""
    names, folders = _inventory(draft)
    if MANIFEST in names:
        raise ValueError(f"{MANIFEST} is written last and here, not by what fills a checkpoint")
    names.sort(key=lambda name: (draft / name).stat().st_size, reverse=True)  # the largest decides how long it takes
    with ThreadPoolExecutor(8) as pool:
        pairs = [(pool.submit(fsync_path, draft / name), pool.submit(_facts, draft / name)) for name in names]
        for synced, _ in pairs:
            synced.result()
        files = {name: found.result() for name, (_, found) in zip(names, pairs, strict=True)}
    with open(draft / MANIFEST, "xb") as file:
        file.write(encode_manifest(step, files, facts))
        file.flush()
        os.fsync(file.fileno())
    for folder in reversed(folders):
        fsync_folder(draft / folder)


def _inventory(folder: Path) -> tuple[list[str], list[str]]:
    """Names of all files, and of all folders from the top down: relative, with ``/`` between parts."""
    names, folders = [], ["."]
    for place in folders:
        with os.scandir(folder / place) as entries:
            for entry in entries:
                name = entry.name if place == "." else f"{place}/{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    folders.append(name)
                elif entry.is_file(follow_symlinks=False):
                    names.append(name)
                else:
                    raise ValueError(f"{name} is neither a plain file nor a folder: it cannot be in a checkpoint")
    return names, folders


def _facts(path: Path) -> FileDigest:
    with open(path, "rb", buffering=0) as file:
        return digest_file(file)

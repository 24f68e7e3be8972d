"""Checkpoint folders that exist or do not: written whole, found, set aside, cleaned up, pruned.

    checkpoint-<step>/             whole, always: one rename brings it into being, as the very last act
    .writing-<step>-<token>/       a checkpoint in the making; after a kill, rubbish
    .deleting-<step>-<token>/      a checkpoint on its way out, under a name that nothing loads
    .replaced-<step>-<token>/      the older of two checkpoints of one step, where two folders cannot swap names
    aside-checkpoint-<step>/       set aside: never loaded, never deleted; aside-checkpoint-<step>.txt says why

One writer at a time: whoever writes, cleans, sets aside or prunes holds the folder's lock.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from diffusers_ddpm_ext.training.checkpoints.manifest import (
    CHECKPOINT,
    MANIFEST,
    Checkpoint,
    DamagedCheckpoint,
    verify,
)
from diffusers_ddpm_ext.utils.files import fsync_folder, remove_path

ASIDE = "aside-"
LEFTOVER = re.compile(r"\.(writing|deleting|replaced)-([0-9]+)-[0-9a-f]{8}", re.ASCII)
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # some network file systems cannot, and need not


@dataclass(frozen=True)
class SearchResult:
    """What `newest` found.

    Attributes:
        checkpoint: the newest whole one, None if there is none.
        damaged: folders newer than that, newest first, each with what is wrong with it.
    """

    checkpoint: Checkpoint | None
    damaged: list[tuple[Path, str]]


def checkpoint_step(path: Path) -> int | None:
    """The step in the name of a checkpoint; None if this is no such name."""
    named = CHECKPOINT.fullmatch(path.name)
    return None if named is None else int(named[1])


def list_checkpoints(parent: Path) -> list[Path]:
    """Everything in a folder that is called ``checkpoint-<step>``, whole or not, oldest step first.

    Args:
        parent: folder of the run; it need not exist.

    Returns:
        Paths below it.
    """
    if not parent.is_dir():
        return []
    found = ((checkpoint_step(path), path) for path in parent.iterdir())
    return [path for _, path in sorted((step, path) for step, path in found if step is not None)]


def newest(parent: Path) -> SearchResult:
    """Find the newest checkpoint that is whole, reading every byte of it.

    Args:
        parent: folder of the run.

    Returns:
        The checkpoint, and what is wrong with each newer folder. Nothing is changed: `move_aside` those.

    Raises:
        NewerCheckpointFormat: a later version of this package wrote one that is newer than any intact one in our
            format; ignoring it would lose work.
        OSError: as `verify`.
    """
    damaged: list[tuple[Path, str]] = []
    for path in reversed(list_checkpoints(parent)):
        try:
            return SearchResult(verify(path), damaged)
        except DamagedCheckpoint as error:
            damaged.append((path, str(error)))
    return SearchResult(None, damaged)


def move_aside(path: Path, reason: str) -> Path:
    """Give a checkpoint a name under which nothing loads or deletes it, and write the reason beside it.

    Args:
        path: the folder (or whatever else bears a checkpoint's name).
        reason: one sentence.

    Returns:
        Where it is now.

    Raises:
        OSError: it cannot be renamed; the message names it and the way out.
    """
    number, target = 1, path.with_name(f"{ASIDE}{path.name}")
    while os.path.lexists(target) or os.path.lexists(f"{target}.txt"):
        number += 1
        target = path.with_name(f"{ASIDE}{path.name}-{number}")
    try:
        os.rename(path, target)
    except OSError as error:
        raise OSError(
            error.errno, f"{path} cannot be set aside ({error.strerror}): make {path.parent} writable, or move it away"
        ) from error
    with suppress(OSError):  # a full disk: the name alone says enough
        Path(f"{target}.txt").write_text(reason + "\n", encoding="utf-8")
    fsync_folder(path.parent)
    return target


def move_newer_aside(parent: Path, step: int) -> list[Path]:
    """Set aside every checkpoint of a later step, before a run goes on from an earlier one.

    Args:
        parent: folder of the run.
        step: that the run goes on from.

    Returns:
        Where they are now, newest first.

    Raises:
        OSError: as `move_aside`.
    """
    newer = [path for path in list_checkpoints(parent) if (checkpoint_step(path) or 0) > step]
    return [move_aside(path, f"The run went on from step {step}.") for path in reversed(newer)]


def remove_leftovers(parent: Path) -> list[Path]:
    """Remove what a run that died left half written or half deleted. Hold the folder's lock: nobody else is at work.

    Args:
        parent: folder of the run.

    Returns:
        What is gone. A checkpoint whose successor never came has its name back instead.
    """
    gone = []
    for path in sorted(parent.iterdir()) if parent.is_dir() else []:
        left = LEFTOVER.fullmatch(path.name)
        if left is None:
            continue
        named = parent / f"checkpoint-{left[2]}"
        if left[1] == "replaced" and not os.path.lexists(named):
            os.rename(path, named)
            fsync_folder(parent)
            continue
        remove_path(path)
        if not os.path.lexists(path):
            gone.append(path)
    return gone


def prune_checkpoints(parent: Path, total_limit: int, keep: Collection[int] = ()) -> list[Path]:
    """Delete the oldest checkpoints beyond a number. Call it when the newest stands.

    Each loses its name before its first file, so that a kill in between leaves no torn checkpoint.

    Args:
        parent: folder of the run.
        total_limit: how many may stay, at least 1.
        keep: steps that stay in any case and do not count.

    Returns:
        The folders that are gone, oldest first. Folders without a manifest are not ours: they neither count nor go.

    Raises:
        ValueError: ``total_limit`` is less than 1.
        OSError: one cannot be renamed.
    """
    if total_limit < 1:
        raise ValueError(f"total_limit {total_limit}: at least one checkpoint stays; use 1 or more")
    ours = [
        path for path in list_checkpoints(parent) if checkpoint_step(path) not in keep and (path / MANIFEST).is_file()
    ]
    gone = []
    for path in ours[:-total_limit]:
        delete_checkpoint(path)
        gone.append(path)
    return gone


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint, which loses its name before its first file.

    Args:
        path: the folder.

    Raises:
        OSError: it cannot be renamed.
    """
    doomed = path.with_name(f".deleting-{checkpoint_step(path)}-{secrets.token_hex(4)}")
    os.rename(path, doomed)
    fsync_folder(path.parent)
    remove_path(doomed)

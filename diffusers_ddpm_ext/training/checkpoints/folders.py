"""Checkpoint folders of a run: list, search, move aside, delete.

    checkpoint-<step>/             always complete: a rename, the last action of writing, creates it
    .writing-<step>-<token>/       a checkpoint being written; garbage after a kill
    .deleting-<step>-<token>/      a checkpoint being deleted, under a name that nothing loads
    .replaced-<step>-<token>/      the older of two checkpoints of one step, if the system cannot exchange two names
    aside-checkpoint-<step>/       moved aside: never loaded or deleted; the reason is in aside-checkpoint-<step>.txt

One writer at a time: a process that writes, moves, cleans or deletes holds the folder's lock.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from diffusers_ddpm_ext.training.checkpoints.manifest import (
    CHECKPOINT_NAME,
    MANIFEST,
    Checkpoint,
    DamagedCheckpoint,
    NewerCheckpointFormat,
    read_manifest,
    verify,
)
from diffusers_ddpm_ext.utils.files import fsync_folder, remove_path, write_text_atomically

ASIDE_PREFIX = "aside-"
LEFTOVER_NAME = re.compile(r"\.(writing|deleting|replaced)-([0-9]+)-[0-9a-f]{8}", re.ASCII)


@dataclass(frozen=True)
class SearchResult:
    """The newest intact checkpoint, and the newer folders, newest first, each with a description of its damage."""

    checkpoint: Checkpoint | None
    damaged: list[tuple[Path, str]]


def checkpoint_step(path: Path) -> int | None:
    """The step in the name of a checkpoint; None if it is not a checkpoint's name."""
    match = CHECKPOINT_NAME.fullmatch(path.name)
    return None if match is None else int(match[1])


def list_checkpoints(parent: Path) -> list[Path]:
    """List everything called ``checkpoint-<step>`` in a folder, intact or not, oldest step first."""
    if not parent.is_dir():
        return []
    entries = ((checkpoint_step(path), path) for path in parent.iterdir())
    return [path for _, path in sorted((step, path) for step, path in entries if step is not None)]


def newest(parent: Path) -> SearchResult:
    """Find the newest intact checkpoint in a folder, reading every byte of it.

    Nothing is changed; the caller may `move_aside` the newer damaged ones.

    Raises:
        NewerCheckpointFormat: a later version of this package wrote a newer one; ignoring it would lose work.
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
    """Rename a checkpoint so that nothing loads or deletes it; the reason goes into a file next to its new path."""
    target = _aside_name(path)
    try:
        os.rename(path, target)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path} cannot be moved aside ({error.strerror}): make {path.parent} writable, or move it away",
        ) from error
    with suppress(OSError):  # a full disk: the new name alone is enough
        write_text_atomically(f"{target}.txt", reason + "\n")
    fsync_folder(path.parent)
    return target


def _aside_name(path: Path) -> Path:
    number, target = 1, path.with_name(f"{ASIDE_PREFIX}{path.name}")
    while os.path.lexists(target) or os.path.lexists(f"{target}.txt"):
        number += 1
        target = path.with_name(f"{ASIDE_PREFIX}{path.name}-{number}")
    return target


def move_newer_aside(parent: Path, step: int) -> list[Path]:
    """Move every checkpoint after the step that a run resumes from aside; return the new paths, newest first."""
    newer = [path for path in list_checkpoints(parent) if (checkpoint_step(path) or 0) > step and path.is_dir()]
    return [move_aside(path, f"The run resumed from step {step}.") for path in reversed(newer)]


def remove_leftovers(parent: Path) -> list[Path]:
    """Remove what a killed run left partly written or partly deleted. The caller holds the folder's lock.

    A replaced checkpoint whose successor was never renamed gets its name back. Returns the removed paths.
    """
    removed = []
    for path in sorted(parent.iterdir()) if parent.is_dir() else []:
        match = LEFTOVER_NAME.fullmatch(path.name)
        if match is None:
            continue
        final = parent / f"checkpoint-{match[2]}"
        if match[1] == "replaced" and not os.path.lexists(final):
            os.rename(path, final)
            fsync_folder(parent)
            continue
        if match[1] == "deleting":
            _remove_or_set_aside(path, final)
        else:
            remove_path(path)
        if not os.path.lexists(path):
            removed.append(path)
    return removed


def prune_checkpoints(parent: Path, total_limit: int, keep: Collection[int] = ()) -> list[Path]:
    """Delete the oldest checkpoints beyond a number, once the newest is complete; returns their folders.

    Links and folders without a manifest are not ours: neither counted nor deleted. Steps in ``keep`` stay in any case
    and do not count.
    """
    if total_limit < 1:
        raise ValueError(f"total_limit {total_limit}: at least one checkpoint stays; use 1 or more")
    paths = [path for path in list_checkpoints(parent) if checkpoint_step(path) not in keep and not path.is_symlink()]
    ours = [path for path in paths if (path / MANIFEST).is_file()]
    for path in ours[:-total_limit]:
        delete_checkpoint(path)
    return ours[:-total_limit]


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a kill leaves no damaged checkpoint.

    Files in it that its manifest does not list are not ours: they stay, in a folder that is set aside.
    """
    leftover = path.with_name(f".deleting-{checkpoint_step(path)}-{secrets.token_hex(4)}")
    os.rename(path, leftover)
    fsync_folder(path.parent)
    _remove_or_set_aside(leftover, path)


def _remove_or_set_aside(path: Path, final: Path) -> None:
    """Delete a checkpoint's files; if anything else is in its folder, that is set aside under its final name."""
    remove_checkpoint_files(path)
    if os.path.lexists(path):
        with suppress(OSError):
            os.rename(path, _aside_name(final))


def remove_checkpoint_files(path: Path) -> None:
    """Delete the files that a checkpoint's manifest lists, the manifest last, and the folders that are empty then.

    What cannot be deleted stays.
    """
    own = own_files(path)
    for name in sorted(own, key=lambda name: name == MANIFEST):
        with suppress(OSError):
            (path / name).unlink()
    for below, _, _ in os.walk(path, topdown=False):
        with suppress(OSError):  # it is not empty
            os.rmdir(below)


def own_files(path: Path) -> set[str]:
    """Names of the files of a checkpoint, its manifest included; none in a folder whose manifest is not valid."""
    try:
        return {*read_manifest(path).files, MANIFEST}
    except (DamagedCheckpoint, NewerCheckpointFormat, OSError):
        return set()


def has_other_files(path: Path) -> bool:
    """Whether a path is anything but a folder with the files of a checkpoint alone."""
    if path.is_symlink() or not path.is_dir():
        return True
    own = own_files(path)
    return any(
        (Path(above) / name).relative_to(path).as_posix() not in own
        for above, _, names in os.walk(path)
        for name in names
    )

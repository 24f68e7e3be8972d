"""Atomic, durable writing of a checkpoint folder: it appears complete or not at all.

The files are written into a draft, ``.writing-<step>-<token>``, and synced to the disk together with a manifest of
their checksums. One rename, the last action, then gives the folder its final name.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from diffusers_ddpm_ext.training.checkpoints.folders import has_other_files, move_aside
from diffusers_ddpm_ext.training.checkpoints.manifest import MANIFEST, FileDigest, digest_file, encode_manifest
from diffusers_ddpm_ext.utils.files import fsync_folder, fsync_path, os_errors, remove_path, replace_folder


class CheckpointNotWritten(OSError):
    """The disk is full, or the folder is not writable. Older checkpoints are unchanged."""


def write_checkpoint(parent: Path, step: int, fill: Callable[[Path], None]) -> Path:
    """Write ``checkpoint-<step>`` atomically, even if the process is killed or the machine fails meanwhile.

    An existing checkpoint of the same step is exchanged with the new one in one system call. File systems that cannot
    do this take two renames, and `remove_leftovers` undoes the first if the second never happened.

    Args:
        parent: folder of the run.
        step: optimizer steps done, not negative.
        fill: called with the draft folder; writes the files into it, in subfolders too.

    Raises:
        CheckpointNotWritten: the system refused. The draft is removed as far as possible.
        ValueError: a negative step, or ``fill`` wrote a manifest or something that is not a regular file.
    """
    if step < 0:
        raise ValueError(f"step {step}: the step of a checkpoint must not be negative")
    final, draft = parent / f"checkpoint-{step}", parent / f".writing-{step}-{secrets.token_hex(4)}"
    try:
        draft.mkdir()
        with os_errors():
            fill(draft)
        _write_manifest(draft, step)
        if os.path.lexists(final) and has_other_files(final):
            move_aside(final, "It has the name of a checkpoint and files that no run wrote.")
        replace_folder(draft, final)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointNotWritten(
            error.errno, f"{final} could not be written ({reason}); older checkpoints are unchanged"
        ) from error
    finally:
        remove_path(draft)
    return final


def _write_manifest(draft: Path, step: int) -> None:
    """Sync every file and compute its checksum, in parallel; then write the manifest and sync the folders."""
    names, folders = _list_contents(draft)
    if MANIFEST in names:
        raise ValueError(f"{MANIFEST} is reserved: it is written after all other files of a checkpoint")
    names.sort(key=lambda name: (draft / name).stat().st_size, reverse=True)  # start with those that take longest
    with ThreadPoolExecutor(8) as pool:
        jobs = {name: (pool.submit(fsync_path, draft / name), pool.submit(_digest, draft / name)) for name in names}
        for synced, _ in jobs.values():
            synced.result()
        files: Mapping[str, FileDigest] = {name: digest.result() for name, (_, digest) in jobs.items()}
    with open(draft / MANIFEST, "xb") as file:
        file.write(encode_manifest(step, files))
        file.flush()
        os.fsync(file.fileno())
    for folder in reversed(folders):
        fsync_folder(draft / folder)


def _list_contents(folder: Path) -> tuple[list[str], list[str]]:
    """Names of all files, and of all folders, parents first: relative, with ``/`` between parts."""
    names, folders = [], ["."]
    for parent in folders:
        with os.scandir(folder / parent) as entries:
            for entry in entries:
                name = entry.name if parent == "." else f"{parent}/{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    folders.append(name)
                elif entry.is_file(follow_symlinks=False):
                    names.append(name)
                else:
                    raise ValueError(f"{name} is neither a regular file nor a folder: it cannot be in a checkpoint")
    return names, folders


def _digest(path: Path) -> FileDigest:
    with open(path, "rb", buffering=0) as file:
        return digest_file(file)

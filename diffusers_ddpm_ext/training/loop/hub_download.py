"""Download of a pushed run into its folder, so that it resumes there.

The files are downloaded into a folder beside them and verified. Then they are moved, the checkpoint last and by one
rename: a run that is killed at any moment does the rest when it is started again.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.training.checkpoints.folders import checkpoint_step, list_checkpoints, move_aside, newest
from diffusers_ddpm_ext.training.checkpoints.identity import changed_options
from diffusers_ddpm_ext.training.checkpoints.manifest import Checkpoint, DamagedCheckpoint, verify
from diffusers_ddpm_ext.training.checkpoints.run_folder import DOWNLOAD_NAME, is_run_file, refuse_unusable_entries
from diffusers_ddpm_ext.training.checkpoints.state_file import read_state
from diffusers_ddpm_ext.utils.files import fsync_folder, remove_path
from diffusers_ddpm_ext.utils.generations import COMMITTED

NOT_DOWNLOADED = ("README.md", "proof.json", "card/samples.npz", "card/samples.png", ".hub.json")
"""Written again by the next push."""
LAST_FILES = ("model_index.json", "finished.json")
"""Moved in this order after the other files: the first makes the folder a pipeline, the second a finished run."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def download_run(repo_id: str, folder: Path) -> str:
    """Download a pushed run into its folder, unless that is at the same or a later step; returns what was done.

    The caller holds the folder's lock.

    Raises:
        ConfigError: there is no intact checkpoint on the Hub, it cannot be downloaded or written, or the folder holds
            another run.
    """
    from huggingface_hub import HfApi

    from diffusers_ddpm_ext.hub.upload import HUB_TIMEOUT, describe_error, hub_timeout

    own = newest(folder).checkpoint if list_checkpoints(folder) else None
    option = f"--resume_from_hub {printable(repo_id, 200)}"
    try:
        with hub_timeout(HUB_TIMEOUT):
            api = HfApi()
            commit = str(api.model_info(repo_id).sha)
            names = api.list_repo_files(repo_id, revision=commit)
            step = _newest_step(names)
            if step is None:
                raise ConfigError(
                    f"{option} holds no checkpoint: the run was not pushed with --hub_strategy checkpoint"
                )
            if own is not None and own.step >= step:
                _remove_drafts(folder)
                return f"{folder} is at step {own.step:,} already, {repo_id} at {step:,}: resuming from the folder"
            draft = folder / f".downloading-{commit[:12]}"
            _remove_drafts(folder, draft)
            wanted = [name for name in names if _is_wanted(name, step)]
            _download(api, repo_id, commit, draft, wanted)
    except ConfigError:
        raise
    except Exception as error:  # of the client, the transport or the system
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            reason = f"{folder} cannot be written: {error.strerror}"
        else:
            reason = describe_error(error, repo_id)
        raise ConfigError(f"{option} cannot be loaded: {reason}") from None
    checkpoint = _verified(draft, step, option)
    if own is not None:
        _refuse_other_run(own, checkpoint, folder, option)
    try:
        _move_files(draft, folder, step)
    except OSError as error:
        raise ConfigError(f"{option}: {folder} cannot be written: {error.strerror or error}") from None
    return f"checkpoint-{step} of {repo_id} is in {folder}"


def _newest_step(names: list[str]) -> int | None:
    """The last step of the checkpoints among the files of a repository."""
    steps = [checkpoint_step(Path(name).parent) for name in names if name.endswith("/manifest.json")]
    return max((step for step in steps if step is not None), default=None)


def _is_wanted(name: str, step: int) -> bool:
    """Whether a file is the run's; a repository may also have files of its users."""
    in_checkpoint = name.startswith(f"checkpoint-{step}/") and ".." not in name.split("/")
    return in_checkpoint or (is_run_file(name) and name not in NOT_DOWNLOADED)


def _download(api: Any, repo_id: str, commit: str, draft: Path, names: list[str]) -> None:
    """Download files, or the rest of them after a kill, and compare them with the Hub's checksums."""
    draft.mkdir(exist_ok=True)
    patterns = [name.replace("[", "[[]") for name in names]
    for attempt in (1, 2):
        api.snapshot_download(
            repo_id, revision=commit, local_dir=draft, allow_patterns=patterns, force_download=attempt > 1
        )
        found = api.verify_repo_checksums(repo_id, revision=commit, local_dir=draft)
        differing = {mismatch["path"] for mismatch in found.mismatches} | {*found.missing_paths} & {*names}
        if not differing:
            return
    raise OSError(errno.EIO, f"{len(differing)} files differ from the Hub's checksums")


def _verified(draft: Path, step: int, option: str) -> Checkpoint:
    try:
        return verify(draft / f"checkpoint-{step}")
    except (DamagedCheckpoint, ValueError, OSError) as error:
        remove_path(draft)
        reason = str(error).removeprefix(f"{draft}{os.sep}")
        raise ConfigError(f"{option}: checkpoint-{step} there is not intact: {reason}") from None


def _refuse_other_run(own: Checkpoint, pushed: Checkpoint, folder: Path, option: str) -> None:
    """Refuse to replace the files of a run by those of another one; a ConfigError that names a difference."""
    try:
        mine, theirs = read_state(own.path).progress, read_state(pushed.path).progress
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None
    changed = changed_options(theirs.config, mine.config, ("max_train_steps",))
    if mine.data_fingerprint != theirs.data_fingerprint:
        changed.append("the images differ")
    if changed:
        remove_path(pushed.path.parent)
        raise ConfigError(f"{option}: {folder} holds another run ({changed[0]}): name another --output_dir")


def _move_files(draft: Path, folder: Path, step: int) -> None:
    """Move the downloaded files into the run's folder, each by a rename, the checkpoint last."""
    refuse_unusable_entries(folder, str(folder))
    remove_path(draft / ".cache")
    remove_path(folder / COMMITTED)  # an export that was interrupted; the downloaded one replaces it
    checkpoint = draft / f"checkpoint-{step}"
    files = [path.relative_to(draft) for path in sorted(draft.rglob("*")) if path.is_file()]
    files = [file for file in files if file.parts[0] != checkpoint.name]
    order = {name: place for place, name in enumerate(LAST_FILES, 1)}
    for file in sorted(files, key=lambda file: order.get(file.as_posix(), 0)):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(draft / file, folder / file)
    final = folder / checkpoint.name
    if os.path.lexists(final):
        move_aside(final, "It was damaged, and the checkpoint of this step was downloaded again.")
    os.rename(checkpoint, final)
    fsync_folder(folder)
    shutil.rmtree(draft, ignore_errors=True)


def _remove_drafts(folder: Path, kept: Path | None = None) -> None:
    """Delete downloads that a killed run left, apart from one."""
    for path in folder.iterdir():
        if DOWNLOAD_NAME.fullmatch(path.name) and path != kept:
            remove_path(path)

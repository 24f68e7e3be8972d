"""Output folder of a run: checked, created and locked."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.training.checkpoints.folders import list_checkpoints
from diffusers_ddpm_ext.training.checkpoints.run_folder import (
    is_run_folder,
    refuse_foreign_folder,
    refuse_unusable_entries,
    remove_drafts,
    remove_run_files,
)
from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.training.config.options import OutputOptions
from diffusers_ddpm_ext.utils.folder_lock import LOCK, FolderBusy, FolderLock

DEFAULT_PARENT = Path("runs")
MAX_NAME = 200  # characters of a new folder's name; one of a single source is at most 255 bytes


def run_name(data: DataOptions) -> str:
    """Name of a run on these images: `digits`, or the last part of each folder's or dataset's name."""
    sources = data.data_dirs or data.dataset_names
    if not sources:
        return "digits"
    name = "-".join(Path(source).resolve().name for source in sources)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:MAX_NAME].strip("-.") or "images"


def check_output_dir(output: OutputOptions, resuming: bool = False) -> None:
    """Refuse an output folder that is a file, not empty, or not writable. Writes nothing.

    Args:
        output: section ``output`` of the configuration.
        resuming: whether the run may resume in the folder, if it is a run's folder.
    """
    if output.output_dir is None:
        parent = DEFAULT_PARENT if DEFAULT_PARENT.exists() else Path(".")
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise ConfigError(f"{parent.resolve()} is not writable: name a folder with --output_dir")
        return
    folder = Path(output.output_dir)
    if folder.is_dir():
        if _has_entries(folder, output.output_dir):
            _check_entries(folder, output, resuming)
    elif folder.exists() or folder.is_symlink():
        raise ConfigError(f"--output_dir {output.output_dir} is a file: name a folder")
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ConfigError(f"--output_dir {output.output_dir} is below {nearest}, which is a file: name another folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"--output_dir {output.output_dir} is not writable: name another folder")
    try:  # file systems such as /proc let nobody create a file, whatever the permissions say
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"--output_dir {output.output_dir} cannot be written: {reason}; name another folder"
        ) from None


def _has_entries(folder: Path, name: str) -> bool:
    """Whether anything but the lock of an earlier run is in a folder."""
    try:
        return any(entry != LOCK for entry in os.listdir(folder))
    except OSError as error:
        raise ConfigError(f"--output_dir {printable(name)} cannot be read: {error.strerror}") from None


def _check_entries(folder: Path, output: OutputOptions, resuming: bool) -> None:
    """Refuse a folder that is not empty, unless a run may resume in it or overwrite it."""
    name = str(output.output_dir)
    if resuming:
        if not (is_run_folder(folder) or list_checkpoints(folder)):
            raise ConfigError(
                f"--output_dir {printable(name)} is neither empty nor the folder of a run: name another folder"
            )
        refuse_unusable_entries(folder, name)
    elif output.overwrite_output_dir:
        refuse_foreign_folder(folder, name)
    else:
        way_out = (
            ", or add --overwrite_output_dir"
            if is_run_folder(folder)
            else "; it is not a run's, which --overwrite_output_dir would replace"
        )
        raise ConfigError(f"--output_dir {printable(name)} is not empty: name another folder{way_out}")


def acquire_output_dir(
    data: DataOptions, output: OutputOptions, resuming: bool = False, suffix: str = ""
) -> tuple[Path, FolderLock]:
    """Create the run's folder and lock it. Only the main process calls this.

    Args:
        data: section ``data``; a new folder is named after the images.
        output: section ``output``; without ``output_dir`` a new folder below `runs` is created.
        resuming: as in `check_output_dir`.
        suffix: of the name of a new folder.

    Raises:
        ConfigError: as `check_output_dir`, or another run uses the folder, or the system cannot create or write it.
    """
    check_output_dir(output, resuming)
    try:
        if output.output_dir is None:
            folder = _create_default(run_name(data) + suffix)
            return folder, FolderLock(folder).acquire()
        folder = Path(output.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(folder).acquire()
        remove_drafts(folder)
        if output.overwrite_output_dir:
            remove_run_files(folder)
        return folder, lock
    except FolderBusy as error:
        raise ConfigError(f"--output_dir {output.output_dir}: {error}") from None
    except OSError as error:
        where = f"--output_dir {output.output_dir}" if output.output_dir else str(DEFAULT_PARENT.absolute())
        raise ConfigError(f"{where} cannot be written: {error.strerror or error}; name another --output_dir") from None


def _create_default(name: str) -> Path:
    DEFAULT_PARENT.mkdir(exist_ok=True)
    number = 1
    while True:
        folder = DEFAULT_PARENT / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1

"""Output folder of a run: checked, created and locked."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.config.options import DataOptions, OutputOptions
from diffusers_ddpm_ext.utils.folder_lock import LOCK, FolderBusy, FolderLock

DEFAULT_PARENT = Path("runs")
RUN_MARKERS = ("config.yaml", LOCK)  # one of these marks a run's folder; an interrupted start may leave only the lock
# What a run writes, apart from its tracker's files; --overwrite_output_dir removes these and nothing else.
RUN_FILES = (
    "config.yaml", "metrics.jsonl", "timing.jsonl", "samples", "samples.png", "loss.png", "logvar.png",
    "model_index.json", "unet", "scheduler", "logvar", "ema.json", "finished.json", "best", "checkpoint-*",
    ".writing-*", ".deleting-*", ".replaced-*", ".saving-*", ".pushing-*", ".publishing-*", ".hub.json",
    "environment.json", "README.md", "proof.json", "card",
)  # fmt: skip


def run_name(data: DataOptions) -> str:
    """Name of a run on these images: `digits`, or the last part of the folder's or dataset's name."""
    source = data.train_data_dir or data.dataset_name
    if source is None:
        return "digits"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source).resolve().name).strip("-.") or "images"


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
        entries = [name for name in _entries(folder, output.output_dir) if name != LOCK]
        is_run = resuming and any(name in RUN_MARKERS or name.startswith("checkpoint-") for name in entries)
        if entries and not is_run and not output.overwrite_output_dir:
            raise ConfigError(
                f"--output_dir {output.output_dir} is not empty: name another folder, or add --overwrite_output_dir"
            )
    elif folder.exists() or folder.is_symlink():
        raise ConfigError(f"--output_dir {output.output_dir} is a file: name a folder")
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ConfigError(f"--output_dir {output.output_dir} is below {nearest}, which is a file: name another folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"--output_dir {output.output_dir} is not writable: name another folder")


def _entries(folder: Path, name: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        raise ConfigError(f"--output_dir {name} cannot be read: {error.strerror}") from None


def acquire_output_dir(data: DataOptions, output: OutputOptions, resuming: bool = False) -> tuple[Path, FolderLock]:
    """Create the run's folder and lock it. Only the main process calls this.

    Args:
        data: section ``data``; a new folder is named after the images.
        output: section ``output``; without ``output_dir`` a new folder below `runs` is created.
        resuming: as in `check_output_dir`.

    Raises:
        ConfigError: as `check_output_dir`, or another run uses the folder, or the system cannot create or write it.
    """
    check_output_dir(output, resuming)
    try:
        if output.output_dir is None:
            folder = _create_default(run_name(data))
            return folder, FolderLock(folder).acquire()
        folder = Path(output.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        lock = FolderLock(folder).acquire()
        if output.overwrite_output_dir:
            _remove_run_files(folder)
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


def _remove_run_files(folder: Path) -> None:
    for path in [path for name in RUN_FILES for path in folder.glob(name)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

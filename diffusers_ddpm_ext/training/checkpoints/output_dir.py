"""Where a run goes: refuse a wrong output folder, then take one."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.checkpoints.lock import LOCK, FolderBusy, FolderLock
from diffusers_ddpm_ext.training.config.options import DataOptions, OutputOptions

RUNS = Path("runs")
# what a run writes beside its tracker's files; --overwrite_output_dir removes these and nothing else
OURS = ("config.yaml", LOCK)  # a folder with one of these is a run's; an interrupted start may leave the lock alone
RUN_FILES = (
    "config.yaml", "metrics.jsonl", "timing.jsonl", "samples", "samples.png", "loss.png", "logvar.png",
    "model_index.json", "unet", "scheduler", "logvar", "ema.json", "finished.json", "best", "checkpoint-*",
    ".writing-*", ".deleting-*", ".replaced-*", ".saving-*", ".pushing-*", ".publishing-*", ".hub.json",
    "environment.json", "README.md", "proof.json", "card",
)  # fmt: skip


def run_name(data: DataOptions) -> str:
    """What a run on these images is called: `digits`, or the last part of the folder's or dataset's name."""
    source = data.train_data_dir or data.dataset_name
    if source is None:
        return "digits"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source).resolve().name).strip("-.") or "images"


def check_output_dir(output: OutputOptions, resuming: bool = False) -> None:
    """Refuse a named output folder that cannot be taken. Writes nothing.

    Args:
        output: the options of this section.
        resuming: whether a run may go on in the folder, if it is one of ours.

    Raises:
        ConfigError: it is a file, not empty, or its place cannot be written.
    """
    if output.output_dir is None:
        parent = RUNS if RUNS.exists() else Path(".")
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise ConfigError(f"cannot write into {parent.resolve()}: name a folder with --output_dir")
        return
    folder = Path(output.output_dir)
    if folder.is_dir():
        entries = [name for name in _entries(folder, output.output_dir) if name != LOCK]
        own = resuming and any(name in OURS or name.startswith("checkpoint-") for name in entries)
        if entries and not own and not output.overwrite_output_dir:
            raise ConfigError(
                f"--output_dir {output.output_dir} is not empty: name another folder, or add --overwrite_output_dir"
            )
    elif folder.exists() or folder.is_symlink():
        raise ConfigError(f"--output_dir {output.output_dir} is a file: name a folder")
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise ConfigError(
            f"--output_dir {output.output_dir} lies below {nearest}, which is a file: name another folder"
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"--output_dir {output.output_dir} is not writable: name another folder")


def _entries(folder: Path, name: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        raise ConfigError(f"--output_dir {name} cannot be read: {error.strerror}") from None


def acquire_output_dir(data: DataOptions, output: OutputOptions, resuming: bool = False) -> tuple[Path, FolderLock]:
    """Create the run's folder and lock it. In a run of several processes the first alone calls this.

    Args:
        data: names a fresh folder after the images.
        output: the folder's name, or None for a fresh one below `runs`.
        resuming: whether a run may go on in the folder, if it is one of ours.

    Returns:
        A folder that exists, can be written and is this run's alone, and the lock that keeps it so.

    Raises:
        ConfigError: as `check_output_dir`, or the system refuses to make or write it.
    """
    check_output_dir(output, resuming)
    try:
        if output.output_dir is None:
            fresh = _fresh(run_name(data))
            return fresh, FolderLock(fresh).acquire()
        folder = Path(output.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        lock = FolderLock(folder).acquire()
        if output.overwrite_output_dir:
            _remove_products(folder)
        return folder, lock
    except FolderBusy as error:
        raise ConfigError(f"--output_dir {output.output_dir}: {error}") from None
    except OSError as error:
        where = f"--output_dir {output.output_dir}" if output.output_dir else str(RUNS.absolute())
        raise ConfigError(f"{where} cannot be written: {error.strerror or error}; name another --output_dir") from None


def _fresh(name: str) -> Path:
    RUNS.mkdir(exist_ok=True)
    number = 1
    while True:
        folder = RUNS / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1


def _remove_products(folder: Path) -> None:
    for path in [path for name in RUN_FILES for path in folder.glob(name)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

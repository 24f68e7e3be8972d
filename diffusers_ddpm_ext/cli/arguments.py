"""Arguments that commands share: the folder of a pipeline, the device, the precision, and the output path."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from diffusers_ddpm_ext.errors import ConfigError, as_run_error, printable
from diffusers_ddpm_ext.utils.folder_lock import FolderBusy, FolderLock
from diffusers_ddpm_ext.utils.generations import COMMITTED, finish_replacement
from diffusers_ddpm_ext.utils.input_files import read_json_object
from diffusers_ddpm_ext.utils.next_command import next_command
from diffusers_ddpm_ext.utils.pipeline_files import MODEL_INDEX

Dtype = Literal["float32", "bfloat16", "float16"]
FOLDER_HELP = "Output folder of a run, folder of a saved pipeline, or Hub id."
LOCAL_FOLDER_HELP = "Output folder of a run, or folder of a saved pipeline."
SCHEDULER_CONFIG = Path("scheduler") / "scheduler_config.json"
DEVICE_HELP = "Device: cpu, cuda, cuda:1, mps, ..."


MAX_HUB_ID = 96
MAX_NAME_BYTES = 255 - 40
"""Of a file that is written: its temporary names are longer."""


def check_pipeline_source(name: str) -> None:
    """Refuse what is neither a pipeline's folder nor a Hub id.

    Raises:
        ConfigError: with the way out; for a checkpoint or a YAML file, the command that takes it.
    """
    folder, shown = Path(name), printable(name, 300)
    mode = _mode(folder, "", shown)
    if mode is not None and stat.S_ISDIR(mode):
        if not any(_mode(place / MODEL_INDEX, "", shown) for place in (folder, folder / COMMITTED)):
            if _mode(folder / "config.json", "", shown) is not None:
                raise ConfigError(
                    f"{shown} holds one network (config.json), not a pipeline: give the output folder of a run;"
                    " a first stage is for ddpm-ext train --vae"
                )
            raise ConfigError(f"{shown} holds no pipeline (no model_index.json): give the output folder of a run")
        return
    state, command = "does not exist" if mode is None else "is a file", next_command(folder)
    if mode is not None or command:
        raise ConfigError(f"{shown} {state}: give the folder of a pipeline{command}")
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name, re.ASCII) and len(name) <= MAX_HUB_ID
    if not is_hub_id or "--" in name or ".." in name:
        raise ConfigError(f"{shown} does not exist: give the folder of a pipeline, or a Hub id")


def check_pipeline_folder(name: str) -> Path:
    """The folder of a pipeline on this machine.

    Raises:
        ConfigError: there is no such folder, or it holds no pipeline.
    """
    check_pipeline_source(name)
    if not Path(name).is_dir():
        raise ConfigError(f"{name} is not a folder on this machine: give the folder of a saved pipeline")
    return Path(name)


def check_scheduler_folder(name: str) -> None:
    """Check that ``name`` is the folder of a saved pipeline whose scheduler can be rewritten.

    Raises:
        ConfigError: it is not, it has no scheduler, or another process writes to it.
    """
    check_pipeline_source(name)
    check_not_locked("FOLDER", FolderLock(Path(name)))
    if not (Path(name) / SCHEDULER_CONFIG).is_file():
        raise ConfigError(f"{name} has no {SCHEDULER_CONFIG} to write to: give the folder of a saved pipeline")


@contextmanager
def open_scheduler_folder(name: str) -> Iterator[Path]:
    """Lock a folder that `check_scheduler_folder` has accepted, and finish what a killed process was replacing in it.

    Raises:
        ConfigError: another process writes to it.
        RunError: it cannot be written.
    """
    folder = Path(name)
    with lock_output("FOLDER", FolderLock(folder)):
        with as_run_error(folder):
            finish_replacement(folder)
        yield folder


def check_output_path(flag: str, path: Path, kind: Literal["file", "folder"]) -> None:
    """Check that a file or folder can be written at a path.

    Args:
        flag: the option, for messages.
        path: its value.
        kind: what is written there.

    Raises:
        ConfigError: the path is of the other kind, its name is too long, or its parent folder does not exist or is not
            writable.
    """
    label = f"{flag} {printable(str(path), 300)}"
    mode = _mode(path, flag, label)
    if len(os.fsencode(path.name)) > MAX_NAME_BYTES:
        raise ConfigError(f"{label} has a name of over {MAX_NAME_BYTES} bytes: shorten it")
    if mode is not None and kind == "folder" and not stat.S_ISDIR(mode):
        raise ConfigError(f"{label} is a file: name a folder")
    if mode is not None and kind == "file" and not stat.S_ISREG(mode):
        found = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise ConfigError(f"{label} is {found}: name a file")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{label} is in a folder that does not exist: create it first")
    place = path if mode is not None and kind == "folder" else path.absolute().parent
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{label} is not writable: name another place")


def check_output_file(flag: str, path: Path, suffixes: Sequence[str]) -> None:
    """Check that a file of a fixed type can be written at a path.

    A name that ends in anything else is refused: it would promise another type, or be a file of a run or a model.

    Args:
        flag: the option, for messages.
        path: its value.
        suffixes: of which the name must have one, in lower case, each with its dot.

    Raises:
        ConfigError: it has another suffix, or `check_output_path` refuses it.
    """
    check_output_path(flag, path, "file")
    if path.suffix.lower() not in suffixes:
        *others, last = suffixes
        allowed = f"{', '.join(others)} or {last}" if others else last
        raise ConfigError(f"{flag} {printable(str(path), 300)} must end in {allowed}")


def check_result_file(flag: str, path: Path, keys: Sequence[str]) -> None:
    """Check that numbers can be written to a JSON file, which is new, empty or an earlier result.

    Args:
        flag: the option, for messages.
        path: its value.
        keys: of which every result of the command has one.

    Raises:
        ConfigError: the file is another one, or `check_output_file` refuses its name.
    """
    check_output_file(flag, path, (".json",))
    if not path.exists() or not path.stat().st_size:
        return
    try:
        content = read_json_object(path)
        is_result = any(key in content for key in keys)
    except ConfigError:
        is_result = False
    if not is_result:
        label = f"{flag} {printable(str(path), 300)}"
        raise ConfigError(f"{label} exists and is not a result of this command: name another file")


def check_no_input(flag: str, path: Path, inputs: Mapping[str, str | Path | None]) -> None:
    """Refuse an output that is one of the command's inputs.

    Args:
        flag: the option of the output.
        path: its value.
        inputs: values of the input options by name; None for those that are not set.

    Raises:
        ConfigError: both are one file or folder.
    """
    for name, other in inputs.items():
        try:
            same = other is not None and os.path.samefile(path, other)
        except (OSError, ValueError):  # one of them does not exist
            continue
        if same:
            raise ConfigError(f"{flag} {printable(str(path), 300)} is what {name} reads: name another place")


@contextmanager
def lock_output(flag: str, lock: FolderLock) -> Iterator[None]:
    """Hold a lock while a command writes.

    Raises:
        ConfigError: another run holds it, or the place is not writable.
    """
    try:
        lock.acquire()
    except FolderBusy as error:
        raise ConfigError(f"{flag}: {error}") from None
    except OSError as error:
        raise ConfigError(f"{flag}: {lock.path.parent} cannot be written: {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def lock_output_folder(flag: str, folder: Path) -> Iterator[None]:
    """Create and lock a folder while a command writes to it; remove it again if it was created and nothing is in it.

    Raises:
        ConfigError: another run uses it, or it cannot be created.
    """
    created = not folder.exists()
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{flag} {folder} cannot be created: {error.strerror or error}") from None
    try:
        with lock_output(flag, FolderLock(folder)):
            yield
    finally:
        if created:
            with suppress(OSError):  # something is in it
                folder.rmdir()


def check_not_locked(flag: str, lock: FolderLock) -> None:
    """Raise ConfigError if another run holds a lock; for the start of a command that loads a network first."""
    try:
        lock.check_free()
    except FolderBusy as error:
        raise ConfigError(f"{flag}: {error}") from None


def _mode(path: Path, flag: str, label: str) -> int | None:
    """The mode of what a path leads to; None where nothing is.

    Raises:
        ConfigError: no file can have this path.
    """
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        return None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{label} cannot be {'written' if flag else 'read'}: {reason}") from None

"""Arguments that commands share: the folder of a pipeline, the device, the precision, and the output path."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from diffusers_ddpm_ext.errors import ConfigError

Dtype = Literal["float32", "bfloat16", "float16"]
FOLDER_HELP = "Output folder of a run, folder of a saved pipeline, or Hub id."
LOCAL_FOLDER_HELP = "Output folder of a run, or folder of a saved pipeline."
DEVICE_HELP = "Device: cpu, cuda, cuda:1, mps, ..."


def check_pipeline_source(name: str) -> None:
    """Refuse what is neither a pipeline's folder nor a Hub id.

    Raises:
        ConfigError: with the way out.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ConfigError(f"{name} holds no pipeline (no model_index.json): give the output folder of a run")
    elif folder.exists():
        raise ConfigError(f"{name} is a file: give the folder of a pipeline")
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise ConfigError(f"{name} does not exist: give the folder of a pipeline, or a Hub id")


def check_pipeline_folder(name: str) -> Path:
    """The folder of a pipeline on this machine.

    Raises:
        ConfigError: there is no such folder, or it holds no pipeline.
    """
    check_pipeline_source(name)
    if not Path(name).is_dir():
        raise ConfigError(f"{name} is not a folder on this machine: give the folder of a saved pipeline")
    return Path(name)


def check_output_path(flag: str, path: Path, kind: Literal["file", "folder"]) -> None:
    """Check that a file or folder can be written at a path.

    Args:
        flag: the option, for messages.
        path: its value.
        kind: what is written there.

    Raises:
        ConfigError: the path is of the other kind, or its parent folder does not exist or is not writable.
    """
    if kind == "folder" and path.is_file():
        raise ConfigError(f"{flag} {path} is a file: name a folder")
    if kind == "file" and path.is_dir():
        raise ConfigError(f"{flag} {path} is a folder: name a file")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{flag} {path} is in a folder that does not exist: create it first")
    if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{flag} {path} is not writable: name another place")

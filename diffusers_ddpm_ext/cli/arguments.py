"""Checks of arguments that several commands share: a pipeline's folder or Hub id, and the precision."""

from __future__ import annotations

import re
from pathlib import Path

from diffusers_ddpm_ext.errors import ConfigError

PIPELINE_DTYPES = ("float32", "bfloat16", "float16")


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


def check_dtype(dtype: str, allowed: tuple[str, ...] = PIPELINE_DTYPES) -> None:
    """Refuse a precision that is not allowed.

    Raises:
        ConfigError: it is not one of them.
    """
    if dtype not in allowed:
        raise ConfigError(f"--dtype {dtype!r} is not one of {', '.join(allowed)}")

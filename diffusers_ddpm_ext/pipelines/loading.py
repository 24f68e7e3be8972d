"""What commands that look at a saved pipeline have in common: the folder, the device, the pipeline."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.pipelines.quiet import quiet_diffusers

PIPELINE_DTYPES = ("float32", "bfloat16", "float16")


def check_pipeline_source(name: str) -> None:
    """Refuse what can be neither a pipeline's folder nor a Hub id.

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
        ConfigError: there is none of that name, or it holds no pipeline.
    """
    check_pipeline_source(name)
    if not Path(name).is_dir():
        raise ConfigError(f"{name} is no folder here: give that of a saved pipeline")
    return Path(name)


def check_dtype(dtype: str, allowed: tuple[str, ...] = PIPELINE_DTYPES) -> None:
    """Refuse a precision that is not among those allowed."""
    if dtype not in allowed:
        raise ConfigError(f"--dtype {dtype!r} is not one of {', '.join(allowed)}")


def select_device(name: str | None) -> Any:
    """The device of a name, or the fastest there is.

    Raises:
        ConfigError: it is not there.
    """
    import torch

    if name is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        return found if found is not None else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ConfigError(f"--device {name} is not there: say cpu, or leave it out for the fastest there is") from None
    if device.type == "meta":
        raise ConfigError("--device meta computes nothing: say cpu, or leave it out for the fastest there is")
    return device


def load_pipeline(folder: str, variant: str | None, device: Any, dtype: str, asked: str = "") -> Any:
    """Load a pipeline and put it where it is to compute.

    Args:
        folder: a folder or Hub id.
        variant: of the weights.
        device: from `select_device`.
        dtype: name of the weights' precision.
        asked: the option that asked for the variant, for an error.

    Raises:
        ConfigError: it cannot be opened, or its weights are not finite.
    """
    import torch

    from diffusers_ddpm_ext.pipelines.pipeline_ddpm_ext import DDPMExtPipeline

    try:
        with quiet_diffusers():
            pipeline = DDPMExtPipeline.from_pretrained(folder, variant=variant)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        with_variant = f" with {asked}" if variant else ""
        if not Path(folder).is_dir():
            raise ConfigError(
                f"{folder}{with_variant} is no folder here, and could not be had from the Hub: check the name, the "
                f"network and, for a private repository, `hf auth whoami` ({_first_sentence(error)})"
            ) from None
        raise ConfigError(f"cannot open the folder {folder}{with_variant}: {error}") from None
    if not all(bool(torch.isfinite(weight).all()) for weight in pipeline.unet.parameters()):
        raise ConfigError(f"{folder}: its weights are not finite (NaN or infinity), so that it cannot sample")
    pipeline.set_progress_bar_config(disable=True)
    with quiet_diffusers():
        return pipeline.to(device, getattr(torch, dtype))


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text.split(". ")[0].split(" (")[0].rstrip(".")

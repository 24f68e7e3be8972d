"""Loading a saved pipeline for a command: its device, its weights, and Diffusers without progress bars."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Switch off Diffusers' progress bars and warnings; the commands report what is wrong themselves."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def select_device(name: str | None) -> Any:
    """The device with a name, or by default the accelerator, or the CPU without one.

    Raises:
        ConfigError: the device is not available.
    """
    import torch

    if name is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else accelerator
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ConfigError(
            f"--device {name} is not available: use cpu, or leave it out for the fastest available"
        ) from None
    if device.type == "meta":
        raise ConfigError("--device meta computes nothing: use cpu, or leave it out for the fastest available")
    return device


def load_pipeline(
    folder: str,
    variant: str | None,
    device: Any,
    dtype: str,
    variant_option: str = "",
    components: Mapping[str, Any] | None = None,
) -> Any:
    """Load a pipeline onto a device.

    Args:
        folder: a folder or Hub id.
        variant: of the weights.
        device: from `select_device`.
        dtype: name of the weights' precision.
        variant_option: the option that requested the variant, for an error.
        components: in place of the folder's, by name.

    Raises:
        ConfigError: it cannot be loaded, or its weights are not finite.
    """
    import torch

    from diffusers_ddpm_ext.pipelines.pipeline_ddpm_ext import DDPMExtPipeline

    try:
        with quiet_diffusers():
            pipeline = DDPMExtPipeline.from_pretrained(folder, variant=variant, **components or {})
    except (OSError, ValueError) as error:
        with_variant = f" with {variant_option}" if variant else ""
        if not Path(folder).is_dir():
            raise ConfigError(
                f"{folder}{with_variant} is not a folder on this machine and cannot be loaded from the Hub: check the "
                f"name, the network and, for a private repository, `hf auth whoami` ({_first_sentence(error)})"
            ) from None
        raise ConfigError(f"cannot load the folder {folder}{with_variant}: {' '.join(str(error).split())}") from None
    networks = [pipeline.unet] if pipeline.first_stage is None else [pipeline.unet, pipeline.first_stage.autoencoder]
    if not all(bool(torch.isfinite(weight).all()) for network in networks for weight in network.parameters()):
        raise ConfigError(f"{folder}: its weights are not finite (NaN or infinity), so it cannot sample")
    pipeline.set_progress_bar_config(disable=True)
    with quiet_diffusers():
        return pipeline.to(device, getattr(torch, dtype))


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text.split(". ")[0].split(" (")[0].rstrip(".")

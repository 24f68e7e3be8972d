"""CompVis' ``DDPM`` for Diffusers: exact schedules, its objective, its sampler, its training run.

This file is the public surface. Names are imported on first use (PEP 562), so that importing the package loads
neither torch nor diffusers. The imports below are what a reader and a type checker see; ``_MODULES`` says the same
to the running program, and a test holds the two together.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffusers_ddpm_ext._version import __version__
from diffusers_ddpm_ext.utils.diffusers_names import offer_names

if TYPE_CHECKING:
    from diffusers_ddpm_ext.diffusion.schedule import NoiseSchedule
    from diffusers_ddpm_ext.losses.objective import DDPMObjective, ObjectiveOutput
    from diffusers_ddpm_ext.models.ema import LitEMA
    from diffusers_ddpm_ext.models.spatial_rescaler import SpatialRescaler
    from diffusers_ddpm_ext.models.unet_2d_ext import UNet2DExtModel
    from diffusers_ddpm_ext.pipelines.pipeline_ddpm_ext import DDPMExtPipeline, DDPMExtPipelineOutput
    from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler
    from diffusers_ddpm_ext.utils.lr_lambdas import (
        LambdaLinearScheduler,
        LambdaWarmUpCosineScheduler,
        LambdaWarmUpCosineScheduler2,
    )

__all__ = [
    "DDPMExtPipeline",
    "DDPMExtPipelineOutput",
    "DDPMExtScheduler",
    "DDPMObjective",
    "LambdaLinearScheduler",
    "LambdaWarmUpCosineScheduler",
    "LambdaWarmUpCosineScheduler2",
    "LitEMA",
    "NoiseSchedule",
    "ObjectiveOutput",
    "SpatialRescaler",
    "UNet2DExtModel",
    "__version__",
]

_MODULES = {
    "DDPMExtPipeline": "pipelines.pipeline_ddpm_ext",
    "DDPMExtPipelineOutput": "pipelines.pipeline_ddpm_ext",
    "DDPMExtScheduler": "schedulers.scheduling_ddpm_ext",
    "DDPMObjective": "losses.objective",
    "LambdaLinearScheduler": "utils.lr_lambdas",
    "LambdaWarmUpCosineScheduler": "utils.lr_lambdas",
    "LambdaWarmUpCosineScheduler2": "utils.lr_lambdas",
    "LitEMA": "models.ema",
    "NoiseSchedule": "diffusion.schedule",
    "ObjectiveOutput": "losses.objective",
    "SpatialRescaler": "models.spatial_rescaler",
    "UNet2DExtModel": "models.unet_2d_ext",
}
# Diffusers finds a class of ours by its name in its own namespace: when a saved folder names it, when a scheduler
# lists what it is compatible with. A folder names our pipeline with the package in front, so that the error of a
# program that did not import the package says what to import.
_KNOWN_TO_DIFFUSERS = (
    *("DDPMExtPipeline", "DDPMExtScheduler", "SpatialRescaler", "UNet2DExtModel"),
    f"{__name__}.DDPMExtPipeline",
)


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Everything public, imported already or not."""
    return sorted({*globals(), *__all__})


offer_names(_KNOWN_TO_DIFFUSERS, lambda name: __getattr__(name.removeprefix(f"{__name__}.")))

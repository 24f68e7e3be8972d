"""CompVis' ``DDPM`` for Diffusers: exact schedules, its objective, its sampler, its training run.

This file is the public surface. Names are imported on first use (PEP 562), so that importing the package loads
neither torch nor diffusers. The imports below are what a reader and a type checker see; ``_ROOMS`` says the same
to the running program, and a test holds the two together.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffusers_ddpm_ext._version import __version__

if TYPE_CHECKING:
    from diffusers_ddpm_ext.ema import LitEMA
    from diffusers_ddpm_ext.lr_lambdas import (
        LambdaLinearScheduler,
        LambdaWarmUpCosineScheduler,
        LambdaWarmUpCosineScheduler2,
    )
    from diffusers_ddpm_ext.objective import DDPMObjective, ObjectiveOutput
    from diffusers_ddpm_ext.pipeline import DDPMExtPipeline, DDPMExtPipelineOutput
    from diffusers_ddpm_ext.schedule import NoiseSchedule
    from diffusers_ddpm_ext.scheduler import DDPMExtScheduler
    from diffusers_ddpm_ext.unet import UNet2DExtModel

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
    "UNet2DExtModel",
    "__version__",
]

_ROOMS = {
    "DDPMExtPipeline": "pipeline",
    "DDPMExtPipelineOutput": "pipeline",
    "DDPMExtScheduler": "scheduler",
    "DDPMObjective": "objective",
    "LambdaLinearScheduler": "lr_lambdas",
    "LambdaWarmUpCosineScheduler": "lr_lambdas",
    "LambdaWarmUpCosineScheduler2": "lr_lambdas",
    "LitEMA": "ema",
    "NoiseSchedule": "schedule",
    "ObjectiveOutput": "objective",
    "UNet2DExtModel": "unet",
}
# Diffusers finds a class of ours by its name in its own namespace: when a saved folder names it, when a scheduler
# lists what it is compatible with.
_KNOWN_TO_DIFFUSERS = ("DDPMExtPipeline", "DDPMExtScheduler", "UNet2DExtModel")


def __getattr__(name: str) -> Any:
    """Import a public name from its room on first use."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
    if name in _KNOWN_TO_DIFFUSERS:
        setattr(import_module("diffusers"), name, value)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Everything public, imported already or not."""
    return sorted({*globals(), *__all__})

"""State of a pipeline call: it belongs to the call, so that several threads can use one pipeline."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffusers_ddpm_ext.schedulers.adapter import SchedulerAdapter
from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler

SHARED_SCHEDULER = threading.Lock()
"""Held while a scheduler that several calls share is copied or changed."""


@dataclass
class PipelineCall:
    """What a call tells, and what a callback may change.

    Attributes:
        guidance_scale: of the next step.
        num_timesteps: number of steps.
        num_network_calls: so far.
        interrupt: whether the call ends after this step.
    """

    guidance_scale: float = 1.0
    num_timesteps: int = 0
    num_network_calls: int = 0
    interrupt: bool = False


RUNNING_CALLS: ContextVar[Mapping[int, PipelineCall]] = ContextVar("RUNNING_CALLS", default={})  # noqa: B039
"""The calls of this thread, by the id of their pipelines; a callback may call another one. Never mutated."""


@contextmanager
def running_call(pipeline: Any, call: PipelineCall) -> Iterator[None]:
    """Make ``call`` the pipeline's state in this thread; afterwards it is the state of its last call."""
    token = RUNNING_CALLS.set({**RUNNING_CALLS.get(), id(pipeline): call})
    try:
        yield
    finally:
        RUNNING_CALLS.reset(token)
        pipeline._last_call = call


def scheduler_of_call(scheduler: Any) -> Any:
    """A copy of a pipeline's scheduler, with its own steps and its own state between steps."""
    with SHARED_SCHEDULER:
        # Ours replaces its tables, and never changes them; others may change lists and tensors in place.
        return copy.copy(scheduler) if isinstance(scheduler, DDPMExtScheduler) else copy.deepcopy(scheduler)


class StepNoise:
    """The arguments of a scheduler's ``step``, with the noise of each step.

    Args:
        generators: of the call.
        temperature: factor on the noise.
        step_kwargs: further arguments.
    """

    def __init__(
        self,
        generators: torch.Generator | list[torch.Generator] | None,
        temperature: float,
        step_kwargs: Mapping[str, Any],
    ) -> None:
        self._generators = generators
        self._temperature = temperature
        self._step_kwargs = dict(step_kwargs)

    def arguments(self, sampler: SchedulerAdapter, t: float, sample: Tensor) -> dict[str, Any]:
        """The keyword arguments of ``step`` at timestep ``t``, which is on the host."""
        if self._temperature == 1.0:
            accepts = "generator" in inspect.signature(sampler.scheduler.step).parameters
            return self._step_kwargs | ({"generator": self._generators} if accepts else {})
        if t == 0:  # the scheduler draws no noise either
            return self._step_kwargs | {"variance_noise": None}
        noise = randn_tensor(sample.shape, generator=self._generators, device=sample.device, dtype=sample.dtype)
        return self._step_kwargs | {"variance_noise": noise.mul_(self._temperature)}

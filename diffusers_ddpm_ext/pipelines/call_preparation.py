"""What a pipeline call prepares before its first step: its own scheduler, its timesteps, and x_T."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffusers_ddpm_ext.pipelines.call_arguments import checked_latents, checked_timesteps
from diffusers_ddpm_ext.pipelines.call_state import SHARED_SCHEDULER, scheduler_of_call
from diffusers_ddpm_ext.schedulers.adapter import SchedulerAdapter, adapt_scheduler, supports_temperature
from diffusers_ddpm_ext.schedulers.custom_timesteps import with_timesteps
from diffusers_ddpm_ext.schedulers.named_timesteps import named_timesteps
from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler
from diffusers_ddpm_ext.utils.checks import checked_integer


class CallPreparation:
    """The parts of a `DDPMExtPipeline` that prepare the scheduler and the starting noise of a call."""

    if TYPE_CHECKING:
        scheduler: Any
        trained_scheduler: DDPMExtScheduler
        text_encoder_stage: Any
        _network: Any

    def _sampler(self, step_kwargs: Mapping[str, Any], temperature: float) -> SchedulerAdapter:
        """A copy of the scheduler, adapted to the network: its steps and its state belong to one call."""
        sampler = adapt_scheduler(scheduler_of_call(self.scheduler), self.trained_scheduler, step_kwargs)
        if temperature != 1.0 and not sampler.is_ours and not supports_temperature(sampler.scheduler, step_kwargs):
            raise ValueError(
                f"temperature is {temperature}, but {type(self.scheduler).__name__} takes no noise as an argument, "
                "or adds none. Leave it at 1, or use pipeline.scheduler = "
                "DDPMExtScheduler.from_config(pipeline.scheduler.config)."
            )
        return sampler

    def chosen_timesteps(
        self, count: int | None, timesteps: Sequence[int] | np.ndarray | Tensor | str | None, optimal: bool = False
    ) -> list[int] | None:
        """The timesteps that arguments of a call choose; None for ``count`` evenly spaced ones.

        Raises:
            ValueError: two arguments contradict each other, or there are no such timesteps.
        """
        name = type(self.scheduler).__name__
        if optimal and (count is None or timesteps is not None or not isinstance(self.scheduler, DDPMExtScheduler)):
            raise ValueError(
                "optimal_timesteps needs num_inference_steps (without timesteps) and a DDPMExtScheduler, whose config "
                f"holds them; this is a {name}."
            )
        timesteps = "bound" if optimal else timesteps
        if isinstance(timesteps, str):
            trained = self.trained_scheduler
            return named_timesteps(timesteps, count, name, trained.config, len(trained))
        if timesteps is not None and count is not None:
            raise ValueError("num_inference_steps and timesteps both determine the timesteps; give one of them.")
        return None if timesteps is None else checked_timesteps(timesteps)

    def _set_timesteps(
        self, sampler: SchedulerAdapter, count: int | None, timesteps: list[int] | None, device: torch.device
    ) -> SchedulerAdapter:
        """Set the timesteps of a call's scheduler, and of the pipeline's for the eyes of callbacks and callers."""
        scheduler = sampler.scheduler
        if timesteps is not None:
            sampler = with_timesteps(sampler, timesteps, device)
            with SHARED_SCHEDULER:
                if sampler.kept is None:
                    self.scheduler.set_timesteps(timesteps=timesteps, device=device)
                else:
                    self.scheduler.timesteps = sampler.timesteps
            return sampler
        count = scheduler.config.num_train_timesteps if count is None else count
        count = checked_integer("num_inference_steps", count)
        if count < 1:
            raise ValueError(f"num_inference_steps is {count}; it must be 1 or more, or None for all steps.")
        arguments: dict[str, Any] = {"num_inference_steps": count}
        if count == scheduler.config.num_train_timesteps and self.is_moved(sampler):
            if sampler.is_ours:
                arguments = {"timesteps": list(range(count))[::-1]}  # all of them: an offset has no room
            else:
                scheduler.register_to_config(steps_offset=0)  # of the call's copy, with which it steps
                scheduler.set_timesteps(count, device=device)
                return sampler
        scheduler.set_timesteps(**arguments, device=device)
        with SHARED_SCHEDULER:
            # Only for the eyes of callbacks and callers: the call steps with its copy.
            self.scheduler.set_timesteps(**arguments, device=device)
        return sampler

    def is_moved(self, sampler: SchedulerAdapter) -> bool:
        """Whether a model with a text encoder has an offset of steps, which only fewer steps than T leave room for."""
        config = sampler.scheduler.config
        is_leading = config.get("timestep_spacing", "leading") == "leading" and config.get("steps_offset") == 1
        return is_leading and self.text_encoder_stage is not None

    def _initial_sample(
        self,
        shape: tuple[int, int, int, int],
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        sampler: SchedulerAdapter,
        device: torch.device,
    ) -> Tensor:
        """x_T, in float32 or more: only the network runs in half precision."""
        dtype = torch.promote_types(torch.float32, self._network.dtype)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        else:
            latents = checked_latents(latents, shape)
        return latents.to(device=device, dtype=dtype) * sampler.scheduler.init_noise_sigma

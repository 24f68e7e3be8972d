"""The loop over the steps of a pipeline call. Between two steps nothing is read from the device.

Source: [DDPM] Ho et al. 2020, algorithm 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffusers_ddpm_ext.diffusion.reverse_step import LEARNED_VARIANCES
from diffusers_ddpm_ext.pipelines.call_arguments import StepCallback, check_finite_samples
from diffusers_ddpm_ext.pipelines.call_state import PipelineCall, StepNoise
from diffusers_ddpm_ext.pipelines.guidance import Guidance
from diffusers_ddpm_ext.schedulers.adapter import SchedulerAdapter


class Intermediates:
    """CompVis' intermediate results of one call.

    Args:
        log_every_t: as in a pipeline call.
        steps: number K of steps.
        start: x_T.
    """

    def __init__(self, log_every_t: int | None, steps: int, start: Tensor) -> None:
        self.log_every_t = log_every_t
        self.last = steps - 1
        self.samples: list[Tensor] | None = None if log_every_t is None else [start]
        self.pred_x0: list[Tensor] | None = None if log_every_t is None else []

    def add(self, i: int, sample: Tensor, result: Any) -> None:
        """Record the result of the i-th step, which CompVis counts as K - 1 - i."""
        if self.samples is None or self.log_every_t is None:
            return
        remaining = self.last - i
        if remaining % self.log_every_t and remaining != self.last:
            return
        self.samples.append(sample)
        x0 = result.get("pred_original_sample")
        self.pred_x0 = None if x0 is None or self.pred_x0 is None else [*self.pred_x0, x0]


@dataclass(frozen=True)
class SamplingLoop:
    """The loop over the steps of one call.

    The samples stay in their own precision; only the network's input is in the network's.

    Attributes:
        sampler: the call's scheduler, its timesteps set.
        denoise: the network with its conditions.
        noise: further arguments of each step.
        callback: the caller's function after each step.
        intermediates: of the call.
    """

    sampler: SchedulerAdapter
    denoise: Guidance
    noise: StepNoise
    callback: StepCallback
    intermediates: Intermediates

    def __call__(self, pipeline: Any, call: PipelineCall, sample: Tensor) -> Tensor:
        """Run the steps.

        Args:
            pipeline: of the call, for its progress bar and the callback.
            call: its state, which the callback may change.
            sample: x_T, (B, C, H, W).

        Returns:
            The last sample, (B, C, H, W), in the precision of ``sample``.

        Raises:
            ValueError: the network's output does not fit, or, on a CPU, is not finite at the first step.
        """
        sampler, steps = self.sampler, self.sampler.scheduler.timesteps
        host_steps = steps.tolist()  # read once: a comparison or a lookup per step would wait for the device
        for i, t in enumerate(pipeline.progress_bar(steps)):
            scale = sampler.input_scale(t)
            model_input = sampler.scheduler.scale_model_input(sample, t)
            time = sampler.model_timestep(scale, t)
            model_output = self.denoise(model_input.to(self.denoise.model.dtype), time, call.guidance_scale)
            model_output = model_output.to(sample.dtype)
            call.num_network_calls += 1
            if i == 0:
                self._check_output(model_output, sample)
            model_output = sampler.convert_output(model_output, model_input, scale, t)
            step = host_steps[i] if sampler.is_ours else t
            arguments = self.noise.arguments(sampler, host_steps[i], sample)
            result = sampler.scheduler.step(model_output, step, sample, **arguments)
            tensors = {"latents": result.prev_sample, "model_output": model_output, "model_input": model_input}
            sample = self.callback(pipeline, i, sampler.trained_step(t), tensors)
            self.intermediates.add(i, sample, result)
            if call.interrupt:
                break
        return sample

    def _check_output(self, output: Tensor, sample: Tensor) -> None:
        if output.device.type == "cpu":  # elsewhere it would wait for the device; the samples are checked at the end
            check_finite_samples(output, "the model's first output")
        channels, outputs = sample.shape[1], output.shape[1]
        variance_type = self.sampler.trained.config.variance_type
        if outputs != channels and not (variance_type in LEARNED_VARIANCES and outputs == 2 * channels):
            raise ValueError(
                f"The model returns {outputs} channels for samples of {channels}. It must return as many, or twice as "
                f"many when the scheduler's variance_type is one of {', '.join(LEARNED_VARIANCES)} (here: "
                f"{self.sampler.scheduler.config.get('variance_type')})."
            )

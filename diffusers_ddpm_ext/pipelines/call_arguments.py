"""Checks of what a pipeline is made of and called with: each fault one sentence, before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor, nn

from diffusers_ddpm_ext.diffusion.arguments import Generators, check_finite, check_generators, check_samples
from diffusers_ddpm_ext.utils.checks import checked_integer, describe
from diffusers_ddpm_ext.utils.wrappers import unwrap

OUTPUT_TYPES = ("pil", "np", "pt", "latent", "array")
CALLBACK_TENSORS = ("latents", "model_output", "model_input")
MAX_SAMPLE_VALUES = 2**32
"""Values of a batch: 16 GiB in float32. More is a wrong size."""


def check_network(unet: Any) -> None:
    """Raise ValueError unless it is a Diffusers network, with or without wrappers."""
    if isinstance(unet, nn.Module) and isinstance(getattr(unwrap(unet), "config", None), Mapping):
        return
    name = type(unet).__name__
    if isinstance(unet, SchedulerMixin):
        way = "the network comes first: DDPMExtPipeline(unet, scheduler)"
    elif hasattr(unet, "copy_to"):
        way = "that is an average of weights: pass the network, after `ema.copy_to(unet)`"
    else:
        way = "pass a Diffusers network, e.g. a UNet2DModel"
    raise ValueError(f"unet is {'a ' + name if unet is not None else 'None'}; {way}.")


def check_scheduler(scheduler: Any) -> None:
    """Raise ValueError unless it is a Diffusers scheduler."""
    if isinstance(scheduler, SchedulerMixin):
        return
    if isinstance(scheduler, nn.Module):
        way = "the network comes first: DDPMExtPipeline(unet, scheduler)"
    elif isinstance(scheduler, type):
        way = f"make one, e.g. {scheduler.__name__}()"
    else:
        way = "pass a Diffusers scheduler, e.g. DDPMExtScheduler()"
    shown = f"the class {scheduler.__name__}" if isinstance(scheduler, type) else describe(scheduler)
    raise ValueError(f"scheduler is {shown}; {way}.")


@dataclass(frozen=True)
class CallSettings:
    """The settings of a pipeline call that concern neither the network nor the scheduler; see its ``__call__``."""

    output_type: str | None
    log_every_t: int | None
    temperature: float
    guidance_scale: float
    guidance_interval: tuple[float, float] | None

    @classmethod
    def checked(
        cls, output_type: Any, log_every_t: Any, temperature: Any, guidance_scale: Any, guidance_interval: Any
    ) -> CallSettings:
        """The settings in their types.

        Raises:
            ValueError: one is of another type or out of range.
        """
        if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; it must be one of {', '.join(OUTPUT_TYPES)}.")
        if log_every_t is not None:
            log_every_t = checked_integer("log_every_t", log_every_t)
            if log_every_t < 1:
                raise ValueError(f"log_every_t is {log_every_t}; it must be 1 or more, or None for no intermediates.")
        temperature = checked_number("temperature", temperature)
        if temperature < 0:
            raise ValueError(f"temperature is {temperature}; it must be a finite number, 0 or more.")
        scale = checked_number("guidance_scale", guidance_scale)
        return cls(output_type, log_every_t, temperature, scale, _interval(guidance_interval))


def checked_number(name: str, value: Any) -> float:
    """A finite number, also NumPy's or of a tensor of one value; ValueError for anything else."""
    if isinstance(value, (int, float, np.number, Tensor)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise ValueError(f"{name} is {describe(value)}; it must be a finite number.")


def _interval(value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    if isinstance(value, (list, tuple, np.ndarray, Tensor)) and len(value) == 2:
        low, high = (checked_number("an end of guidance_interval", end) for end in value)
        if low <= high:
            return low, high
    raise ValueError(f"guidance_interval is {describe(value)}; it must be two timesteps, the lower one first.")


def checked_batch_size(value: Any) -> int:
    """The number of images of a call.

    Raises:
        ValueError: it is not an integer of at least 1.
    """
    if isinstance(value, str) and not value.strip().isdigit():
        raise ValueError(
            f"batch_size is {describe(value)}; it must be an integer. This pipeline takes no prompt: classes are "
            "class_labels=, embeddings encoder_hidden_states=."
        )
    size = checked_integer("batch_size", value)
    if size < 1:
        raise ValueError(f"batch_size is {size}; it must be 1 or more.")
    return size


def checked_generators(generator: Any, batch_size: int) -> Generators:
    """The generators of a call; ValueError unless they are none, one for all, or one per image."""
    if isinstance(generator, list | tuple) and len(generator) != batch_size:
        raise ValueError(
            f"generator is a list of {len(generator)}, but batch_size is {batch_size}; give one generator per "
            "image, or a single generator for all."
        )
    return check_generators(generator, batch_size)


def checked_scaling_factor(value: Any) -> float | None:
    """The factor of a model's latents; ValueError unless it is None or a finite number above 0."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(
            f"latent_scaling_factor is {describe(value)}; it must be a number above 0, or None for images."
        )
    return float(value)


def checked_sample_shape(batch_size: int, channels: int, sample_size: Any) -> tuple[int, int, int, int]:
    """Shape of the samples of a call.

    Raises:
        ValueError: the network's ``sample_size`` is no size, or so large that no such batch can exist.
    """
    if sample_size is None:
        raise ValueError(
            "The model's config has sample_size None, so the size of an image is unknown. Set it once: "
            "pipeline.unet.register_to_config(sample_size=(height, width))."
        )
    sides = list(sample_size) if isinstance(sample_size, (list, tuple)) else [sample_size] * 2
    whole = all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides)
    if len(sides) != 2 or not whole:
        raise ValueError(f"The model's config has sample_size {describe(sample_size)}; it must be pixels, 1 or more.")
    if batch_size * channels * sides[0] * sides[1] > MAX_SAMPLE_VALUES:
        raise ValueError(
            f"batch_size {batch_size} of {channels} x {sides[0]} x {sides[1]} (sample_size of the model's config) are "
            f"over {MAX_SAMPLE_VALUES:,} values: take a smaller batch, or correct the config."
        )
    return batch_size, channels, sides[0], sides[1]


def checked_latents(latents: Any, shape: Sequence[int]) -> Tensor:
    """The starting noise that a caller passed.

    Raises:
        ValueError: it is not a finite floating tensor of this shape.
    """
    check_samples(latents=latents)
    tensor: Tensor = latents
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"latents has shape {tuple(tensor.shape)}; batch_size and the model require {tuple(shape)}.")
    check_finite("latents", tensor)
    return tensor


def check_finite_samples(values: Tensor, what: str) -> None:
    """Raise ValueError with a way out unless all values are finite."""
    if not bool(torch.isfinite(values).all()):
        raise ValueError(
            f"Non-finite values (NaN or infinity) in {what}. The weights contain such values, or the network "
            "overflows in half precision: check the checkpoint, or load it with torch_dtype=torch.float32."
        )


def checked_timesteps(timesteps: Any) -> list[int]:
    """Timesteps for any scheduler.

    Raises:
        ValueError: they are not whole numbers.
    """
    try:
        values = np.asarray(timesteps.detach().cpu() if isinstance(timesteps, Tensor) else timesteps)
    except (TypeError, ValueError):  # rows of different lengths
        values = np.asarray(None)
    is_list = values.ndim == 1 and len(values) > 0 and values.dtype.kind in "iuf"
    if not is_list or not np.isfinite(values).all() or (values != np.floor(values)).any():
        raise ValueError(f"timesteps must be a list of whole numbers, descending, got {describe(timesteps)}.")
    return [int(value) for value in values]


def checked_step_kwargs(step_kwargs: Any, eta: Any) -> dict[str, Any]:
    """Further arguments of a scheduler's ``step``, with ``eta``."""
    if step_kwargs is not None and not isinstance(step_kwargs, Mapping):
        raise ValueError(f"step_kwargs is {describe(step_kwargs)}; it must be a dictionary of arguments of `step`.")
    return dict(step_kwargs or {}) | ({} if eta is None else {"eta": checked_number("eta", eta)})


@dataclass(frozen=True)
class StepCallback:
    """A caller's function after each step, and the tensors that it receives."""

    function: Callable[..., Any] | None
    tensor_inputs: tuple[str, ...]

    @classmethod
    def checked(cls, function: Any, tensor_inputs: Any) -> StepCallback:
        """The callback of a call.

        Raises:
            ValueError: it cannot be called, or a tensor of this name does not exist.
        """
        if function is not None and not callable(function):
            raise ValueError(f"callback_on_step_end is {describe(function)}; it must be a function, or None.")
        if isinstance(function, (PipelineCallback, MultiPipelineCallbacks)):
            tensor_inputs = function.tensor_inputs
        option = "callback_on_step_end_tensor_inputs"
        if isinstance(tensor_inputs, str) or not isinstance(tensor_inputs, Sequence):
            raise ValueError(f"{option} is {describe(tensor_inputs)}; it must be a list of names.")
        unknown = [str(name) for name in tensor_inputs if name not in CALLBACK_TENSORS]
        if unknown:
            raise ValueError(f"{option} has {', '.join(unknown)}; it may have {', '.join(CALLBACK_TENSORS)}.")
        return cls(function, tuple(tensor_inputs))

    def __call__(self, pipeline: Any, i: int, t: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Call it after step ``i``, and return the sample to continue with.

        Raises:
            ValueError: it returned something else than a dictionary, or latents that do not fit.
        """
        sample = tensors["latents"]
        if self.function is None:
            return sample
        result = self.function(pipeline, i, t, {name: tensors[name] for name in self.tensor_inputs})
        if result is None:
            return sample
        if not isinstance(result, Mapping):
            raise ValueError(
                f"callback_on_step_end returned {describe(result)}; it must return a dictionary, or None."
            )
        latents = result.get("latents", sample)
        if latents is not sample:
            name = "the latents that callback_on_step_end returned"
            if not isinstance(latents, Tensor) or latents.shape != sample.shape or not latents.is_floating_point():
                raise ValueError(
                    f"{name} must be a floating tensor of shape {tuple(sample.shape)}, got {describe(latents)}."
                )
            check_finite(name, latents)
            latents = latents.to(sample)
        return latents

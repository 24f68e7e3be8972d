"""Arguments of the theory's functions in one form: steps, samples, a network's output, generators.

What has one plain meaning is converted (an int timestep, a list of them, the output object of a Diffusers model);
everything else is refused in a sentence, before a tensor operation fails or silently broadcasts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.utils.checks import describe
from diffusers_ddpm_ext.utils.host_reads import reads_are_free
from diffusers_ddpm_ext.utils.vocabulary import FROM_COMPVIS_ARGUMENT, FROM_COMPVIS_PREDICTION_TYPE

Generators = torch.Generator | list[torch.Generator] | None
Constructor = TypeVar("Constructor", bound=Callable[..., None])

UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
"""Integers for which torch has few operations."""


def steps_tensor(t: Any, name: str = "t") -> Tensor:
    """Steps as an integer tensor: an int, a list, array or tensor of integers; else ValueError."""
    if isinstance(t, Tensor):
        if t.dtype == torch.bool or t.is_floating_point() or t.is_complex():
            raise ValueError(f"{name} must hold integers, got {t.dtype}.")
        return t.long() if t.dtype in UNSIGNED else t
    try:
        values = np.asarray(t)
    except (TypeError, ValueError):  # rows of different lengths
        values = np.zeros(0)
    booleans = isinstance(t, (list, tuple)) and any(isinstance(step, (bool, np.bool_)) for step in t)
    if values.dtype.kind not in "iu" or booleans:
        raise ValueError(f"{name} must hold integers, got {describe(t)}.")
    return torch.from_numpy(values.astype(np.int64))


def as_steps(t: Any, like: Tensor, num_train_timesteps: int, name: str = "t") -> Tensor:
    """One step per sample, int64, (B,), from one per sample or one for all.

    Other steps would silently broadcast or index from the end. The range is not checked on an accelerator, where
    reading it back would stall the device.

    Args:
        t: an int for all samples, or a list, array or tensor of one per sample.
        like: the samples, (B, ...).
        num_train_timesteps: steps are in [0, T).
        name: of the argument, for the message.

    Raises:
        ValueError: not integers, not one per sample, or out of range.
    """
    steps, t = t, steps_tensor(t, name)
    if not isinstance(steps, Tensor) and t.ndim == 0 and like.ndim:
        t = t.expand(like.shape[0])
    if like.ndim == 0 or t.shape != like.shape[:1]:
        raise ValueError(f"{name} must hold one step per sample, shape {tuple(like.shape[:1])}, got {tuple(t.shape)}.")
    if t.numel() and reads_are_free(t.device):
        low, high = (int(end) for end in t.aminmax())
        if low < 0 or high >= num_train_timesteps:
            raise ValueError(f"{name} must be in [0, {num_train_timesteps}), got {low} to {high}.")
    return t.long()


def check_samples(**tensors: Any) -> None:
    """Raise ValueError unless all are floating tensors of one shape on one device."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, got {describe(tensor)}.")
        if not tensor.is_floating_point():
            scaled = " (images are scaled to [-1, 1] first: x / 127.5 - 1)" if tensor.dtype == torch.uint8 else ""
            raise ValueError(f"{name} must be a floating tensor, got {tensor.dtype}{scaled}.")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError("shapes must be equal, got " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(
            "devices must be equal, got " + ", ".join(f"{name} {where}" for name, where in devices.items())
        )


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ValueError if a tensor has NaN or infinity, which would be blamed on the network."""
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} has values that are NaN or infinite.")


def network_output(output: Any, name: str = "model_output") -> Tensor:
    """The tensor that a network returned: itself, ``.sample`` of a Diffusers output, or the only entry of a tuple."""
    if isinstance(output, Tensor):
        return output
    sample = output[0] if isinstance(output, (tuple, list)) and len(output) == 1 else getattr(output, "sample", None)
    if not isinstance(sample, Tensor):
        raise ValueError(
            f"{name} must be a tensor, or a Diffusers output with .sample, got {describe(output)}: pass the tensor "
            "that the network predicts."
        )
    return sample


def check_generators(generator: Any, batch_size: int) -> Generators:
    """One generator, a list of one per sample (or of one for all), or None; else ValueError."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    if not isinstance(generator, (list, tuple)):
        raise ValueError(
            f"generator={describe(generator)} must be a torch.Generator, a list of them, or None; for a seed use "
            "torch.Generator().manual_seed(seed)."
        )
    for index, each in enumerate(generator):
        if not isinstance(each, torch.Generator):
            raise ValueError(
                f"generator[{index}]={describe(each)} must be a torch.Generator; without a seed use generator=None."
            )
    if len(generator) not in (1, batch_size):
        raise ValueError(f"generator must hold one generator per sample ({batch_size}), got {len(generator)}.")
    return list(generator)


def explain_compvis_names(init: Constructor) -> Constructor:
    """Decorator of a constructor: CompVis' name of an argument raises ValueError with the name to use."""
    own = inspect.signature(init).parameters

    @wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs.keys() - own.keys() & FROM_COMPVIS_ARGUMENT.keys():
            ours, value = FROM_COMPVIS_ARGUMENT[name], kwargs[name]
            if name == "parameterization" and isinstance(value, str):
                value = FROM_COMPVIS_PREDICTION_TYPE.get(value, value)
            owner = "" if ours in own else " of DDPMExtScheduler"
            raise ValueError(f"{name} is CompVis' name of an argument: use {ours}={describe(value)}{owner}.")
        init(self, *args, **kwargs)

    return cast(Constructor, checked)


@contextmanager
def evaluation_mode(network: Any) -> Iterator[Any]:
    """Turn dropout off during a ``with`` block if the network is a module, and restore each submodule's mode."""
    trained = [module for module in network.modules() if module.training] if isinstance(network, nn.Module) else []
    for module in trained:
        module.training = False
    try:
        yield network
    finally:
        for module in trained:
            module.training = True

"""Optimizer, gradient clipping and learning-rate schedules, in optimizer steps."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers.optimization import SchedulerType, get_scheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from diffusers_ddpm_ext.utils.dtensor import full_tensor, is_sharded, local_tensor
from diffusers_ddpm_ext.utils.host_reads import reads_are_free
from diffusers_ddpm_ext.utils.lr_lambdas import COMPVIS_LAMBDAS, check_lr_schedule

LEAST_8BIT = 4096
"""Values of the smallest tensor that bitsandbytes keeps in 8 bits."""
LR_SCHEDULERS = (*(kind.value for kind in SchedulerType), *COMPVIS_LAMBDAS)


def parameter_groups(
    network: Iterable[nn.Parameter], logvar: Iterable[nn.Parameter], weight_decay: float, logvar_learning_rate: float
) -> list[dict[str, Any]]:
    """Parameter groups ``network`` and ``logvar``, the log-variances with their own learning rate.

    Adam moves an entry by about the learning rate per step; at a network's rate a table that starts far from the log
    loss would never reach it. Weight decay would pull entries that are not in the batch towards 0.

    Args:
        network: parameters of the denoiser.
        logvar: parameters of the objective; empty if logvar is not learned.
        weight_decay: of the network.
        logvar_learning_rate: peak learning rate of logvar, which follows the run's schedule.
    """
    groups: list[dict[str, Any]] = [{"name": "network", "params": list(network), "weight_decay": weight_decay}]
    logvar_parameters = list(logvar)
    if logvar_parameters:
        groups.append({"name": "logvar", "params": logvar_parameters, "lr": logvar_learning_rate, "weight_decay": 0.0})
    return groups


def scale_learning_rate(
    learning_rate: float, scaling: Literal["none", "linear", "sqrt"], effective_batch: int
) -> float:
    """The peak learning rate of a run: times 1, the effective batch (CompVis' ``scale_lr``) or its square root.

    The square root keeps the noise scale of Adam's steps.
    """
    return learning_rate * {"none": 1.0, "linear": float(effective_batch), "sqrt": effective_batch**0.5}[scaling]


def adam_state_bytes(sizes: Iterable[int], eight_bit: bool) -> int:
    """Bytes of AdamW's state once every parameter has been updated; float32 parameters of these numbers of values.

    In 8 bits each moment has a scale per 256 values and, once for all, a table of its 256 values. Small tensors stay
    in 32 bits.
    """
    if not eight_bit:
        return sum(8 * size + 4 for size in sizes)  # two moments, and the number of steps
    sizes = list(sizes)
    quantized = [size for size in sizes if size >= LEAST_8BIT]
    tables = 2 * 4 * 256 if quantized else 0
    return tables + sum(2 * (size + 4 * -(-size // 256)) if size >= LEAST_8BIT else 8 * size for size in sizes)


def adamw_8bit(
    groups: list[dict[str, Any]], learning_rate: float, betas: tuple[float, float], epsilon: float
) -> torch.optim.Optimizer:
    """AdamW of bitsandbytes, whose moments take one byte each; the arguments are those of `adamw`.

    Raises:
        ValueError: bitsandbytes is not installed, or does not work on this machine.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except Exception as error:  # its import fails in many ways if a library of the device is missing
        raise ValueError(f"bitsandbytes cannot be imported ({error}): `pip install bitsandbytes`") from error
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=learning_rate, betas=betas, eps=epsilon)
    return optimizer


def adamw(
    groups: list[dict[str, Any]], learning_rate: float, betas: tuple[float, float], epsilon: float
) -> torch.optim.AdamW:
    """AdamW, fused where the device supports it (on a CPU three times as fast as torch's default).

    Args:
        groups: from `parameter_groups`, on their final device.
        learning_rate: peak learning rate of the network.
        betas: decay rates of the two moments.
        epsilon: added to the root of the second moment.
    """
    device = groups[0]["params"][0].device.type
    fused = device in ("cpu", "cuda", "xpu", "mps", "hpu")
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon, fused=fused)


@torch.no_grad()
def gradient_norms(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The 2-norm of each parameter's gradient, 0 without one: (n,), a plain tensor on the device, on every process.

    If the parameters are sharded, a collective call: every process must make it.
    """
    # torch does not accept plain and sharded gradients in one call.
    by_sharding: dict[bool, dict[int, Tensor]] = {False: {}, True: {}}
    for index, parameter in enumerate(parameters):
        if parameter.grad is not None:
            by_sharding[is_sharded(parameter.grad)][index] = parameter.grad
    norms: dict[int, Tensor] = {}
    for gradients in filter(None, by_sharding.values()):
        group_norms = full_tensor(torch.stack(torch._foreach_norm(list(gradients.values()))))
        if len(gradients) == len(parameters):
            return group_norms
        norms |= zip(gradients, group_norms.float().unbind(), strict=True)
    zero = torch.zeros((), device=local_tensor(parameters[0]).device)
    return torch.stack([norms.get(index, zero) for index in range(len(parameters))])


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float, norms: Tensor | None = None) -> Tensor:
    """Scale gradients down, in place, to a joint norm of at most ``max_norm``.

    Args:
        parameters: those to clip together. If sharded, a collective call: every process must make it.
        max_norm: limit of the 2-norm, above 0.
        norms: from `gradient_norms`, if computed already.

    Returns:
        The norm before clipping, a plain 0-dim tensor on the device, the same on every process.
    """
    norm = torch.linalg.vector_norm(gradient_norms(parameters) if norms is None else norms)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    # Scaling by exactly 1 changes nothing, which is only worth knowing where it costs nothing to know.
    if not reads_are_free(norm.device) or scale < 1.0 or not torch.isfinite(scale):
        torch._foreach_mul_([local_tensor(gradient) for gradient in gradients], scale)
    return norm


def lr_schedule(
    name: str,
    optimizer: torch.optim.Optimizer,
    max_train_steps: int,
    warmup_steps: int = 0,
    arguments: Mapping[str, Any] | None = None,
) -> LambdaLR:
    """A learning-rate scheduler: the factor on every group's peak learning rate at each optimizer step.

    Args:
        name: one of Diffusers' ``get_scheduler``, or the class name of a CompVis lambda.
        optimizer: its current learning rates are the peaks.
        max_train_steps: optimizer steps of the run.
        warmup_steps: steps of linear warm-up, for Diffusers' schedules.
        arguments: keyword arguments of a lambda, or ``num_cycles``, ``power``, ``step_rules`` of Diffusers'.

    Returns:
        A scheduler to step once per optimizer step, for any number of processes and micro-batches.

    Raises:
        ValueError: the name is unknown, or the schedule does not accept the arguments.
    """
    arguments = dict(arguments or {})
    try:
        if name not in LR_SCHEDULERS:
            raise ValueError(f"choose from {', '.join(LR_SCHEDULERS)}")
        check_lr_schedule(name, warmup_steps, arguments)
        if name in COMPVIS_LAMBDAS:
            return LambdaLR(optimizer, COMPVIS_LAMBDAS[name](**arguments))
        return get_scheduler(
            name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=max_train_steps, **arguments
        )
    except (TypeError, ValueError, AttributeError) as error:
        with_arguments = f" with lr_scheduler_args {json.dumps(arguments)}" if arguments else ""
        raise ValueError(f"lr_scheduler {name!r}{with_arguments} is invalid: {str(error).rstrip('.')}.") from error

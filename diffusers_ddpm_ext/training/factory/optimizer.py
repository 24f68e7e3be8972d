"""Optimizer, gradient clipping and learning-rate schedules, all counted in optimizer steps."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from diffusers.optimization import SchedulerType, get_scheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from diffusers_ddpm_ext.utils.dtensor import full_tensor, is_sharded, local_tensor
from diffusers_ddpm_ext.utils.lr_lambdas import (
    LambdaLinearScheduler,
    LambdaWarmUpCosineScheduler,
    LambdaWarmUpCosineScheduler2,
)

LAMBDAS = {
    kind.__name__: kind for kind in (LambdaLinearScheduler, LambdaWarmUpCosineScheduler, LambdaWarmUpCosineScheduler2)
}
LR_SCHEDULERS = (*(kind.value for kind in SchedulerType), *LAMBDAS)


def parameter_groups(
    network: Iterable[nn.Parameter], logvar: Iterable[nn.Parameter], weight_decay: float, logvar_learning_rate: float
) -> list[dict[str, Any]]:
    """The two groups of a run: the network, and the table of log-variances with a rate of its own.

    Adam moves an entry by about its rate a step, so a table that starts far from the log loss never arrives at a
    network's rate. Weight decay would pull entries towards 0 that the batch did not even hold.

    Args:
        network: parameters of the denoiser.
        logvar: parameters of the objective, none where logvar is not learned.
        weight_decay: of the network.
        logvar_learning_rate: peak rate of logvar; it follows the run's schedule.

    Returns:
        Groups for a torch optimizer, named ``network`` and ``logvar``.
    """
    groups: list[dict[str, Any]] = [{"name": "network", "params": list(network), "weight_decay": weight_decay}]
    table = list(logvar)
    if table:
        groups.append({"name": "logvar", "params": table, "lr": logvar_learning_rate, "weight_decay": 0.0})
    return groups


def scaled_rate(learning_rate: float, scaling: str, effective_batch: int) -> float:
    """The peak rate of a run.

    Args:
        learning_rate: as given.
        scaling: ``none``; ``linear``, CompVis' ``scale_lr``, whose rate is one of an image; or ``sqrt``, which keeps
            the noise of Adam's steps.
        effective_batch: images of an optimizer step.

    Returns:
        The rate, times the effective batch, or its root.
    """
    return learning_rate * {"none": 1.0, "linear": float(effective_batch), "sqrt": effective_batch**0.5}[scaling]


def adamw_8bit(
    groups: list[dict[str, Any]], learning_rate: float, betas: tuple[float, float], epsilon: float
) -> torch.optim.Optimizer:
    """AdamW of bitsandbytes, whose moments take a byte each.

    Args:
        groups: as for `adamw`, as are the others.
        learning_rate: peak rate of the network.
        betas: decay rates of the two moments.
        epsilon: added to the root of the second moment.

    Returns:
        The optimizer.

    Raises:
        ValueError: bitsandbytes is not installed, or does not work here.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except Exception as error:  # its import fails in many ways where a library of the device is missing
        raise ValueError(f"bitsandbytes cannot be imported ({error}): `pip install bitsandbytes`") from error
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=learning_rate, betas=betas, eps=epsilon)
    return optimizer


def adamw(
    groups: list[dict[str, Any]], learning_rate: float, betas: tuple[float, float], epsilon: float
) -> torch.optim.AdamW:
    """AdamW in one fused pass over all parameters (three times faster on a CPU than torch's default there).

    Args:
        groups: from :func:`parameter_groups`, on their final device.
        learning_rate: peak rate of the network.
        betas: decay rates of the two moments.
        epsilon: added to the root of the second moment.

    Returns:
        The optimizer; torch's default implementation on a device that has no fused one.
    """
    device = groups[0]["params"][0].device.type
    fused = device in ("cpu", "cuda", "xpu", "mps", "hpu")
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon, fused=fused)


@torch.no_grad()
def gradient_norms(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The 2-norm of each parameter's gradient.

    Args:
        parameters: after the backward pass; where they are sharded all processes enter.

    Returns:
        (n,), plain, on the device, the same in every process; 0 for a parameter without a gradient.
    """
    kinds: dict[bool, dict[int, Tensor]] = {False: {}, True: {}}  # torch refuses plain and sharded ones together
    for place, parameter in enumerate(parameters):
        if parameter.grad is not None:
            kinds[is_sharded(parameter.grad)][place] = parameter.grad
    norms = torch.zeros(len(parameters), device=local_tensor(parameters[0]).device)
    for gradients in filter(None, kinds.values()):
        found = full_tensor(torch.stack(torch._foreach_norm(list(gradients.values()))))
        if len(gradients) == len(parameters):
            return found
        norms[list(gradients)] = found.to(norms)
    return norms


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float, norms: Tensor | None = None) -> Tensor:
    """Scale gradients down, in place, to a joint norm of at most ``max_norm``.

    Args:
        parameters: those to clip together; where they are sharded all processes enter, and the norm is that of the
            whole gradients.
        max_norm: limit of the 2-norm, above 0.
        norms: from `gradient_norms`, where they are known already.

    Returns:
        The norm before clipping, a plain 0-dim tensor that is still on the device, the same in every process.
    """
    norm = torch.linalg.vector_norm(gradient_norms(parameters) if norms is None else norms)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    # Scaling by exactly 1 changes nothing. Looking first is free on a CPU and would stall an accelerator.
    if norm.device.type != "cpu" or scale < 1.0 or not torch.isfinite(scale):
        torch._foreach_mul_([local_tensor(gradient) for gradient in gradients], scale)
    return norm


def lr_schedule(
    name: str,
    optimizer: torch.optim.Optimizer,
    max_train_steps: int,
    warmup_steps: int = 0,
    arguments: Mapping[str, Any] | None = None,
) -> LambdaLR:
    """The factor on every group's peak rate as a function of the optimizer step.

    Args:
        name: one of Diffusers' ``get_scheduler``, or a CompVis lambda by its class name.
        optimizer: its current rates are the peaks.
        max_train_steps: optimizer steps of the whole run.
        warmup_steps: steps of linear warm-up, for Diffusers' names.
        arguments: keyword arguments of a lambda, or ``num_cycles``, ``power``, ``step_rules`` of Diffusers' ones.

    Returns:
        A scheduler to step once per optimizer step, however many processes and micro-batches make one.

    Raises:
        ValueError: an unknown name, or arguments that the schedule does not take.
    """
    arguments = dict(arguments or {})
    try:
        if name in LAMBDAS:
            if warmup_steps:
                raise ValueError("it has its own warm-up: leave lr_warmup_steps at 0")
            return LambdaLR(optimizer, LAMBDAS[name](**arguments))
        if name not in LR_SCHEDULERS:
            raise ValueError(f"choose from {', '.join(LR_SCHEDULERS)}")
        return get_scheduler(
            name,
            optimizer,
            num_warmup_steps=warmup_steps,
            num_training_steps=max_train_steps,
            **_named(arguments),
        )
    except (TypeError, ValueError, AttributeError) as error:
        given = f" with lr_scheduler_args {json.dumps(arguments)}" if arguments else ""
        raise ValueError(f"lr_scheduler {name!r}{given} is refused: {str(error).rstrip('.')}.") from error


def _named(arguments: dict[str, Any]) -> dict[str, Any]:
    unknown = set(arguments) - {"num_cycles", "power", "step_rules"}
    if unknown:
        raise ValueError(f"lr_scheduler_args of Diffusers' schedules are num_cycles, power, step_rules, got {unknown}")
    return arguments

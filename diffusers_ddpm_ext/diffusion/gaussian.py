"""Gaussian algebra of the forward process: closed-form marginals, the exact posterior, and what a network may predict.

Symbols:

    x0    clean sample                      xt    sample after step t
    eps   the noise in xt                   v     velocity, [PD] appendix D
    A     alphas_cumprod[t]

    xt = sqrt(A) x0 + sqrt(1 - A) eps       v = sqrt(A) eps - sqrt(1 - A) x0

(x0, eps) and (xt, v) are one pair of numbers in two bases that differ by a rotation, so every conversion below is one
line of it.

Sources: [DDPM] Ho et al. 2020, eqs. 4, 6, 7 and 15; [PD] Salimans & Ho 2022, appendix D.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_ddpm_ext.diffusion.schedule import NoiseSchedule, Table
from diffusers_ddpm_ext.utils.vocabulary import PREDICTION_TYPES


@dataclass(frozen=True)
class Gaussian:
    """A diagonal normal law.

    Attributes:
        mean: (B, ...), data units.
        variance: (B, 1, ..., 1), squared data units.
        log_variance: (B, 1, ..., 1), its natural log; for the posterior the variance is floored at 1e-20 first.
    """

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


def check_steps(t: Tensor, like: Tensor, num_train_timesteps: int) -> None:
    """Refuse steps that would silently broadcast or index from the end.

    Args:
        t: steps to check.
        like: the samples they belong to, (B, ...).
        num_train_timesteps: T.

    Raises:
        ValueError: ``t`` is not one whole number per sample in [0, T). The range is not looked at on an accelerator,
            where reading it back would stall the device.
    """
    if t.dtype == torch.bool or t.is_floating_point() or t.is_complex():
        raise ValueError(f"t must hold whole numbers, got {t.dtype}.")
    if like.ndim == 0 or t.shape != like.shape[:1]:
        raise ValueError(f"t must hold one step per sample, shape {tuple(like.shape[:1])}, got {tuple(t.shape)}.")
    if t.device.type == "cpu" and t.numel() and (int(t.min()) < 0 or int(t.max()) >= num_train_timesteps):
        raise ValueError(f"t must lie in [0, {num_train_timesteps}), got {int(t.min())} to {int(t.max())}.")


def at_step(table: Table, t: Tensor, like: Tensor) -> Tensor:
    """The one door from a table to a tensor: the entries of each sample's own step, ready to multiply it.

    Args:
        table: float64, (T,).
        t: steps, (B,), integer, each in [0, T).
        like: samples, (B, ...), whose device, rank and precision the result takes.

    Returns:
        (B, 1, ..., 1) on ``like``'s device, float32, or float64 where ``like`` is; never a half type, which would
        round the smallest noise levels to zero.

    Raises:
        ValueError: ``t`` is not one step per sample.
    """
    check_steps(t, like, len(table))
    dtype = torch.promote_types(like.dtype, torch.float32)
    # Copies towards an accelerator do not wait for it; one from it must.
    values = torch.tensor(table, dtype=dtype).to(t.device, non_blocking=True)[t.long()]
    values = values.to(like.device, non_blocking=like.device.type != "cpu")
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def _same_shape(**tensors: Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError("shapes must be equal, got " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))


def q_sample(schedule: NoiseSchedule, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Noise a clean sample to step t at once ([DDPM] eq. 4).

    Args:
        schedule: tables of T steps.
        x0: clean samples, (B, ...), data units.
        eps: standard normal noise, same shape.
        t: steps, (B,), integer, each in [0, T).

    Returns:
        xt, (B, ...), at least float32.

    Raises:
        ValueError: shapes differ, or ``t`` is not one step per sample.
    """
    _same_shape(x0=x0, eps=eps)
    return (
        at_step(schedule.sqrt_alphas_cumprod, t, x0) * x0
        + at_step(schedule.sqrt_one_minus_alphas_cumprod, t, x0) * eps
    )


def q_mean_variance(schedule: NoiseSchedule, x0: Tensor, t: Tensor) -> Gaussian:
    """The law of xt given x0 ([DDPM] eq. 4); arguments and errors as in :func:`q_sample`."""
    return Gaussian(
        mean=at_step(schedule.sqrt_alphas_cumprod, t, x0) * x0,
        variance=at_step(1 - schedule.alphas_cumprod, t, x0),
        log_variance=at_step(schedule.log_one_minus_alphas_cumprod, t, x0),
    )


def posterior(schedule: NoiseSchedule, x0: Tensor, xt: Tensor, t: Tensor) -> Gaussian:
    """One exact step back: the law of x_{t-1} once both of its neighbours are known.

    The mean blends x0 and xt ([DDPM] eqs. 6 and 7). The variance is the schedule's ``posterior_variance``, dialled by
    ``v_posterior`` between the two choices of [DDPM] section 3.2; it does not move the mean.

    Args:
        schedule: tables of T steps.
        x0: clean samples, (B, ...), data units.
        xt: samples after step ``t``, same shape and units.
        t: steps, (B,), integer, each in [0, T).

    Returns:
        The normal law; at t = 0 its mean is x0.

    Raises:
        ValueError: shapes differ, or ``t`` is not one step per sample.
    """
    _same_shape(x0=x0, xt=xt)
    return Gaussian(
        mean=at_step(schedule.posterior_mean_coef1, t, xt) * x0 + at_step(schedule.posterior_mean_coef2, t, xt) * xt,
        variance=at_step(schedule.posterior_variance, t, xt),
        log_variance=at_step(schedule.posterior_log_variance_clipped, t, xt),
    )


def _rotated(schedule: NoiseSchedule, first: Tensor, second: Tensor, t: Tensor, sign: float) -> Tensor:
    """``sqrt(A) first + sign * sqrt(1 - A) second``."""
    _same_shape(first=first, second=second)
    along = at_step(schedule.sqrt_alphas_cumprod, t, first) * first
    return along + sign * at_step(schedule.sqrt_one_minus_alphas_cumprod, t, first) * second


def velocity(schedule: NoiseSchedule, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """v of a clean sample and its noise ([PD] appendix D); shapes as in :func:`q_sample`."""
    return _rotated(schedule, eps, x0, t, -1)


def x0_from_v(schedule: NoiseSchedule, xt: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Clean sample from a velocity: ``sqrt(A) xt - sqrt(1 - A) v``."""
    return _rotated(schedule, xt, v, t, -1)


def eps_from_v(schedule: NoiseSchedule, xt: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Noise from a velocity: ``sqrt(A) v + sqrt(1 - A) xt``."""
    return _rotated(schedule, v, xt, t, 1)


def x0_from_eps(schedule: NoiseSchedule, xt: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Clean sample from noise ([DDPM] eq. 15): ``sqrt(1/A) xt - sqrt(1/A - 1) eps``; not finite where A is 0."""
    _same_shape(xt=xt, eps=eps)
    recip = at_step(schedule.sqrt_recip_alphas_cumprod, t, xt)
    return recip * xt - at_step(schedule.sqrt_recipm1_alphas_cumprod, t, xt) * eps


def eps_from_x0(schedule: NoiseSchedule, xt: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """Noise from a clean sample: ``(xt - sqrt(A) x0) / sqrt(1 - A)``."""
    _same_shape(xt=xt, x0=x0)
    signal = at_step(schedule.sqrt_alphas_cumprod, t, xt) * x0
    return (xt - signal) / at_step(schedule.sqrt_one_minus_alphas_cumprod, t, xt)


def v_from_x0(schedule: NoiseSchedule, xt: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """Velocity from a clean sample: ``(sqrt(A) xt - x0) / sqrt(1 - A)``."""
    _same_shape(xt=xt, x0=x0)
    signal = at_step(schedule.sqrt_alphas_cumprod, t, xt) * xt
    return (signal - x0) / at_step(schedule.sqrt_one_minus_alphas_cumprod, t, xt)


def v_from_eps(schedule: NoiseSchedule, xt: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Velocity from noise: ``(eps - sqrt(1 - A) xt) / sqrt(A)``; not finite where A is 0."""
    _same_shape(xt=xt, eps=eps)
    noise = at_step(schedule.sqrt_one_minus_alphas_cumprod, t, xt) * xt
    return (eps - noise) / at_step(schedule.sqrt_alphas_cumprod, t, xt)


def _check_prediction_type(prediction_type: str) -> None:
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type={prediction_type!r}: choose one of {', '.join(PREDICTION_TYPES)}.")


def predict_x0(schedule: NoiseSchedule, prediction_type: str, output: Tensor, xt: Tensor, t: Tensor) -> Tensor:
    """The clean sample that a network's output stands for.

    Args:
        schedule: tables of T steps.
        prediction_type: ``epsilon``, ``sample`` or ``v_prediction``.
        output: what the network returned, (B, ...).
        xt: what it was given, same shape.
        t: steps, (B,), integer, each in [0, T).

    Returns:
        x0, (B, ...), not clipped.

    Raises:
        ValueError: unknown ``prediction_type``, shapes differ, or ``t`` is not one step per sample.
    """
    _check_prediction_type(prediction_type)
    if prediction_type == "epsilon":
        return x0_from_eps(schedule, xt, output, t)
    if prediction_type == "v_prediction":
        return x0_from_v(schedule, xt, output, t)
    _same_shape(output=output, xt=xt)
    return output


def predict_eps(schedule: NoiseSchedule, prediction_type: str, output: Tensor, xt: Tensor, t: Tensor) -> Tensor:
    """The noise that a network's output stands for; arguments and errors as in :func:`predict_x0`."""
    _check_prediction_type(prediction_type)
    if prediction_type == "sample":
        return eps_from_x0(schedule, xt, output, t)
    if prediction_type == "v_prediction":
        return eps_from_v(schedule, xt, output, t)
    _same_shape(output=output, xt=xt)
    return output


def training_target(schedule: NoiseSchedule, prediction_type: str, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What a network of this kind should have returned for ``q_sample(schedule, x0, eps, t)``.

    Args:
        schedule: tables of T steps.
        prediction_type: ``epsilon``, ``sample`` or ``v_prediction``.
        x0: clean samples, (B, ...).
        eps: the noise they got, same shape.
        t: steps, (B,), integer, each in [0, T).

    Returns:
        (B, ...), data units.

    Raises:
        ValueError: unknown ``prediction_type``, shapes differ, or ``t`` is not one step per sample.
    """
    _check_prediction_type(prediction_type)
    if prediction_type == "v_prediction":
        return velocity(schedule, x0, eps, t)
    _same_shape(x0=x0, eps=eps)
    return eps if prediction_type == "epsilon" else x0

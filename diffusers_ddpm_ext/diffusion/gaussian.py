"""Gaussian algebra of the forward process: closed-form marginals, the exact posterior, and what a network may predict.

Symbols:

    x0    clean sample                      xt    sample after step t
    eps   the noise in xt                   v     velocity, [PD] appendix D
    A     alphas_cumprod[t]

    xt = sqrt(A) x0 + sqrt(1 - A) eps       v = sqrt(A) eps - sqrt(1 - A) x0

(x0, eps) and (xt, v) are the same vector in two bases that differ by a rotation, so every conversion below is one row
of that rotation.

Sources: [DDPM] Ho et al. 2020, eqs. 4, 6, 7 and 15; [PD] Salimans & Ho 2022, appendix D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_ddpm_ext.diffusion.arguments import as_steps, check_samples, network_output
from diffusers_ddpm_ext.diffusion.device_tables import table_tensor
from diffusers_ddpm_ext.diffusion.schedule import NoiseSchedule, Table, check_prediction_type
from diffusers_ddpm_ext.utils.checks import describe
from diffusers_ddpm_ext.utils.vocabulary import PredictionType

__all__ = [
    "Gaussian", "at_step", "check_steps", "eps_from_v", "eps_from_x0", "posterior", "predict_eps", "predict_x0",
    "q_mean_variance", "q_sample", "training_target", "v_from_eps", "v_from_x0", "velocity", "x0_from_eps",
    "x0_from_v",
]  # fmt: skip

Steps = Tensor | int | Sequence[int]  # one per sample, or one for all


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution with diagonal covariance.

    Attributes:
        mean: (B, ...), data units.
        variance: (B, 1, ..., 1), squared data units.
        log_variance: (B, 1, ..., 1), natural log of the variance; the posterior floors the variance at 1e-20 first.
    """

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


def check_steps(t: Any, like: Tensor, num_train_timesteps: int) -> None:
    """Raise ValueError unless ``t`` is one integer per sample of ``like`` (or one for all) in [0, T).

    See `as_steps`, which also converts them.
    """
    as_steps(t, like, num_train_timesteps)


def at_step(table: Table, t: Steps, like: Tensor) -> Tensor:
    """The entry of a table at each sample's step, shaped to multiply the samples. The only way from table to tensor.

    Args:
        table: float64, (T,).
        t: steps, integers in [0, T): (B,), a list, or one int for all.
        like: samples, (B, ...); the result takes their device, number of dimensions and precision.

    Returns:
        (B, 1, ..., 1) on the device of ``like``; float32, or float64 for float64 samples. Never half precision, which
        would round the smallest noise levels to zero.

    Raises:
        ValueError: ``t`` is not one step per sample.
    """
    t = as_steps(t, like, len(table))
    dtype = torch.promote_types(like.dtype, torch.float32)
    # Copies to an accelerator may be asynchronous; copies from it may not.
    values = table_tensor(table, t.device, dtype)[t]
    values = values.to(like.device, non_blocking=like.device.type != "cpu")
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def _tables(schedule: Any) -> NoiseSchedule:
    """The schedule, or that of a scheduler."""
    tables = getattr(schedule, "schedule", schedule)
    if not isinstance(tables, NoiseSchedule):
        raise ValueError(f"schedule={describe(schedule)} must be a NoiseSchedule: scheduler.schedule is one.")
    return tables


def q_sample(schedule: NoiseSchedule, x0: Tensor, eps: Tensor, t: Steps) -> Tensor:
    """Noise clean samples to step t in closed form ([DDPM] eq. 4).

    Args:
        schedule: tables of T steps.
        x0: clean samples, (B, ...), data units.
        eps: standard normal noise, same shape.
        t: steps, integers in [0, T): (B,), a list, or one int for all.

    Returns:
        xt, (B, ...), at least float32.

    Raises:
        ValueError: shapes or devices differ, samples are not floating, or ``t`` is not one step per sample.
    """
    check_samples(x0=x0, eps=eps)
    return (
        at_step(_tables(schedule).sqrt_alphas_cumprod, t, x0) * x0
        + at_step(_tables(schedule).sqrt_one_minus_alphas_cumprod, t, x0) * eps
    )


def q_mean_variance(schedule: NoiseSchedule, x0: Tensor, t: Steps) -> Gaussian:
    """Distribution of xt given x0 ([DDPM] eq. 4); arguments and errors as in `q_sample`."""
    check_samples(x0=x0)
    return Gaussian(
        mean=at_step(_tables(schedule).sqrt_alphas_cumprod, t, x0) * x0,
        variance=at_step(1 - _tables(schedule).alphas_cumprod, t, x0),
        log_variance=at_step(_tables(schedule).log_one_minus_alphas_cumprod, t, x0),
    )


def posterior(schedule: NoiseSchedule, x0: Tensor, xt: Tensor, t: Steps) -> Gaussian:
    """Exact reverse step: the distribution of x_{t-1} given x0 and xt; arguments and errors as in `q_sample`.

    The mean blends x0 and xt ([DDPM] eqs. 6 and 7); at t = 0 it is x0. The variance is the schedule's
    ``posterior_variance``, which ``v_posterior`` interpolates between the two choices of [DDPM] section 3.2.
    """
    check_samples(x0=x0, xt=xt)
    return Gaussian(
        mean=at_step(_tables(schedule).posterior_mean_coef1, t, xt) * x0
        + at_step(_tables(schedule).posterior_mean_coef2, t, xt) * xt,
        variance=at_step(_tables(schedule).posterior_variance, t, xt),
        log_variance=at_step(_tables(schedule).posterior_log_variance_clipped, t, xt),
    )


def _rotate(schedule: NoiseSchedule, first: Tensor, second: Tensor, t: Steps, sign: float) -> Tensor:
    """``sqrt(A) first + sign * sqrt(1 - A) second``."""
    signal = at_step(_tables(schedule).sqrt_alphas_cumprod, t, first) * first
    return signal + sign * at_step(_tables(schedule).sqrt_one_minus_alphas_cumprod, t, first) * second


def velocity(schedule: NoiseSchedule, x0: Tensor, eps: Tensor, t: Steps) -> Tensor:
    """v of a clean sample and its noise ([PD] appendix D); shapes as in `q_sample`."""
    check_samples(x0=x0, eps=eps)
    return _rotate(schedule, eps, x0, t, -1)


def x0_from_v(schedule: NoiseSchedule, xt: Tensor, v: Tensor, t: Steps) -> Tensor:
    """Clean sample from a velocity: ``sqrt(A) xt - sqrt(1 - A) v``."""
    check_samples(xt=xt, v=v)
    return _rotate(schedule, xt, v, t, -1)


def eps_from_v(schedule: NoiseSchedule, xt: Tensor, v: Tensor, t: Steps) -> Tensor:
    """Noise from a velocity: ``sqrt(A) v + sqrt(1 - A) xt``."""
    check_samples(xt=xt, v=v)
    return _rotate(schedule, v, xt, t, 1)


def x0_from_eps(schedule: NoiseSchedule, xt: Tensor, eps: Tensor, t: Steps) -> Tensor:
    """Clean sample from noise ([DDPM] eq. 15): ``sqrt(1/A) xt - sqrt(1/A - 1) eps``; not finite where A is 0."""
    check_samples(xt=xt, eps=eps)
    recip = at_step(_tables(schedule).sqrt_recip_alphas_cumprod, t, xt)
    return recip * xt - at_step(_tables(schedule).sqrt_recipm1_alphas_cumprod, t, xt) * eps


def eps_from_x0(schedule: NoiseSchedule, xt: Tensor, x0: Tensor, t: Steps) -> Tensor:
    """Noise from a clean sample: ``(xt - sqrt(A) x0) / sqrt(1 - A)``."""
    check_samples(xt=xt, x0=x0)
    signal = at_step(_tables(schedule).sqrt_alphas_cumprod, t, xt) * x0
    return (xt - signal) / at_step(_tables(schedule).sqrt_one_minus_alphas_cumprod, t, xt)


def v_from_x0(schedule: NoiseSchedule, xt: Tensor, x0: Tensor, t: Steps) -> Tensor:
    """Velocity from a clean sample: ``(sqrt(A) xt - x0) / sqrt(1 - A)``."""
    check_samples(xt=xt, x0=x0)
    signal = at_step(_tables(schedule).sqrt_alphas_cumprod, t, xt) * xt
    return (signal - x0) / at_step(_tables(schedule).sqrt_one_minus_alphas_cumprod, t, xt)


def v_from_eps(schedule: NoiseSchedule, xt: Tensor, eps: Tensor, t: Steps) -> Tensor:
    """Velocity from noise: ``(eps - sqrt(1 - A) xt) / sqrt(A)``; not finite where A is 0."""
    check_samples(xt=xt, eps=eps)
    noise = at_step(_tables(schedule).sqrt_one_minus_alphas_cumprod, t, xt) * xt
    return (eps - noise) / at_step(_tables(schedule).sqrt_alphas_cumprod, t, xt)


def predict_x0(
    schedule: NoiseSchedule, prediction_type: PredictionType, output: Tensor, xt: Tensor, t: Steps
) -> Tensor:
    """Clean sample implied by a network's output.

    Args:
        schedule: tables of T steps.
        prediction_type: ``epsilon``, ``sample`` or ``v_prediction``.
        output: what the network returned, (B, ...), or a Diffusers output with ``.sample``.
        xt: its input, same shape.
        t: steps, integers in [0, T): (B,), a list, or one int for all.

    Returns:
        x0, (B, ...), not clipped.

    Raises:
        ValueError: unknown ``prediction_type``, shapes differ, or ``t`` is not one step per sample.
    """
    check_prediction_type(prediction_type)
    output = network_output(output, "output")
    if prediction_type == "epsilon":
        return x0_from_eps(schedule, xt, output, t)
    if prediction_type == "v_prediction":
        return x0_from_v(schedule, xt, output, t)
    check_samples(output=output, xt=xt)
    check_steps(t, xt, len(_tables(schedule)))
    return output


def predict_eps(
    schedule: NoiseSchedule, prediction_type: PredictionType, output: Tensor, xt: Tensor, t: Steps
) -> Tensor:
    """Noise implied by a network's output; arguments and errors as in `predict_x0`."""
    check_prediction_type(prediction_type)
    output = network_output(output, "output")
    if prediction_type == "sample":
        return eps_from_x0(schedule, xt, output, t)
    if prediction_type == "v_prediction":
        return eps_from_v(schedule, xt, output, t)
    check_samples(output=output, xt=xt)
    check_steps(t, xt, len(_tables(schedule)))
    return output


def training_target(
    schedule: NoiseSchedule, prediction_type: PredictionType, x0: Tensor, eps: Tensor, t: Steps
) -> Tensor:
    """Target of a network with input ``q_sample(schedule, x0, eps, t)``: (B, ...), data units.

    Arguments and errors are those of `q_sample` and `predict_x0`.
    """
    check_prediction_type(prediction_type)
    if prediction_type == "v_prediction":
        return velocity(schedule, x0, eps, t)
    check_samples(x0=x0, eps=eps)
    check_steps(t, x0, len(_tables(schedule)))
    return eps if prediction_type == "epsilon" else x0

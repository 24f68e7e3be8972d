"""Parts of a reverse step: coefficients, timesteps in a common form, noise.

Symbols, on the chain of the steps in use:

    x0, xt           as in `diffusers_ddpm_ext.diffusion.gaussian`
    c0, ct           posterior_mean_coef1, posterior_mean_coef2: the posterior mean is ``c0 x0 + ct xt``
    sigma            square root of posterior_variance
    small, large     variance of the exact posterior, and beta, between which ``v_posterior`` interpolates

Sources: [DDPM] Ho et al. 2020, eqs. 6, 7, 15 and section 3.2; [iDDPM] Nichol & Dhariwal 2021, eq. 15.
"""

from __future__ import annotations

from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffusers_ddpm_ext.diffusion.arguments import Generators, as_steps, check_generators, check_samples, steps_tensor
from diffusers_ddpm_ext.diffusion.schedule import MIN_VARIANCE, NoiseSchedule, Table
from diffusers_ddpm_ext.utils.checks import checked_integer, describe

LEARNED_VARIANCES = ("learned", "learned_range")
Value = TypeVar("Value", float, Tensor)


class StepCoefficients(NamedTuple, Generic[Value]):
    """Coefficients of a reverse step: floats for a step that the batch shares, tensors for steps per sample."""

    xt_to_x0: Value
    output_to_x0: Value
    x0_to_mean: Value
    xt_to_mean: Value
    sigma: Value
    log_small: Value
    log_large: Value


class ReverseCoefficients:
    """Coefficients of every reverse step of a chain.

    A step that the batch shares has Python floats, so that nothing is gathered and no tensor is read back; steps per
    sample are gathered.

    Args:
        kept: the chain of the steps in use.
        num_train_timesteps: T of the full chain.

    Attributes:
        last: the step after which the chain ends in x0, so that no noise is added.
        output_is_x0: whether the network predicts the sample.
        by_step: coefficients of each step.
    """

    def __init__(self, kept: NoiseSchedule, num_train_timesteps: int) -> None:
        zeros, ones = np.zeros(len(kept)), np.ones(len(kept))
        xt_to_x0, output_to_x0 = {
            "epsilon": (kept.sqrt_recip_alphas_cumprod, -kept.sqrt_recipm1_alphas_cumprod),
            "sample": (zeros, ones),
            "v_prediction": (kept.sqrt_alphas_cumprod, -kept.sqrt_one_minus_alphas_cumprod),
        }[kept.prediction_type]
        sigma = np.sqrt(kept.posterior_variance)
        sigma[0] = 0
        log_small, log_large = np.log(np.maximum(small_variance(kept), MIN_VARIANCE)), np.log(kept.betas)
        c0, ct = kept.posterior_mean_coef1, kept.posterior_mean_coef2
        columns = np.stack([xt_to_x0, output_to_x0, c0, ct, sigma, log_small, log_large], axis=1)
        # Without the last step of epsilon at zero terminal SNR, and those whose factors float32 cannot hold.
        usable = (np.abs(columns) <= np.finfo(np.float32).max).all(axis=1)
        self.last = int(kept.timesteps[0])
        self.output_is_x0 = kept.prediction_type == "sample"
        self.by_step: dict[int, StepCoefficients[float]] = {
            t: StepCoefficients(*row)
            for t, row in zip(kept.timesteps[usable].tolist(), columns[usable].tolist(), strict=True)
        }
        self._num_train_timesteps = num_train_timesteps
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def at(self, t: int) -> StepCoefficients[float]:
        """Coefficients of one step; ValueError if it is not a step of the chain."""
        try:
            return self.by_step[t]
        except KeyError:
            raise self._not_in_chain([t]) from None

    def gather(self, t: Tensor, like: Tensor) -> StepCoefficients[Tensor]:
        """Coefficients of one step per sample, tensors (B, 1, ..., 1).

        They take the device, precision and number of dimensions of ``like``, (B, ...). Steps ``t``, (B,), that are not
        in the chain give NaN on an accelerator, where they are not read, and else a ValueError.
        """
        t = as_steps(t, like, self._num_train_timesteps, "timestep")
        key = (t.device, like.dtype)
        if key not in self._tables:
            table = np.full((self._num_train_timesteps, len(StepCoefficients._fields)), np.nan)
            table[list(self.by_step)] = list(self.by_step.values())
            self._tables[key] = torch.tensor(table, dtype=like.dtype, device=t.device)
        rows = self._tables[key][t]
        if t.device.type == "cpu" and rows.isnan().any():
            raise self._not_in_chain([step for step in t.tolist() if step not in self.by_step])
        return StepCoefficients(*rows.T.reshape(rows.shape[1], -1, *(1,) * (like.ndim - 1)).to(like.device))

    def _not_in_chain(self, steps: list[int]) -> ValueError:
        kept = list(self.by_step)[::-1]
        in_use = ", ".join(map(str, kept if len(kept) < 8 else [*kept[:3], "...", *kept[-3:]]))
        return ValueError(
            f"timestep {', '.join(map(describe, steps[:4]))} is not a step of the chain in use ({in_use}): take steps "
            "from scheduler.timesteps, or call set_timesteps with those you want. (With zero terminal SNR and "
            "prediction_type='epsilon' the last step cannot be used.)"
        )


def small_variance(kept: NoiseSchedule) -> Table:
    """Variance of the exact posterior ([DDPM] eq. 7), (K,); 0 at the first step."""
    return kept.betas * (1 - kept.alphas_cumprod_prev) / (1 - kept.alphas_cumprod)


def log_variance(variance_type: str, predicted: Tensor, log_small: Any, log_large: Any) -> Tensor:
    """Log-variance from a network's output: ``learned`` is the output itself, ``learned_range`` interpolates between
    ``log_small`` (-1) and ``log_large`` (1) ([iDDPM] eq. 15)."""
    if variance_type == "learned":
        return predicted
    large = (predicted + 1) / 2
    return large * log_large + (1 - large) * log_small


def draw_noise(like: Tensor, generator: Generators, scale: float = 1.0) -> Tensor:
    """``scale`` times the standard normal noise of Diffusers' ``randn_tensor``, in the form of ``like``.

    ``generator`` is one for all, a list of one per sample, or None, else ValueError. CPU generators work for every
    device.
    """
    generator = check_generators(generator, like.shape[0] if like.ndim else 1)
    if generator is None or (not isinstance(generator, list) and generator.device.type == like.device.type):
        # Cheaper than randn, and scaling needs no extra pass. (empty_like would follow the strides of permuted
        # samples, and so give the same draws to other pixels.)
        return like.new_empty(like.shape).normal_(0, scale, generator=generator)
    drawn_on = generator[0].device if isinstance(generator, list) else generator.device
    if drawn_on.type == "cpu" and like.device.type == "cuda":
        # From pinned memory, so that the host does not wait for the steps before this one.
        noise = randn_tensor(like.shape, generator=generator, device=drawn_on, dtype=like.dtype)
        return noise.pin_memory().to(like.device, non_blocking=True).mul_(scale)
    return randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype).mul_(scale)


def scaled_noise(
    like: Tensor, generator: Generators, noise: Tensor | None, dtype: torch.dtype, scale: float = 1.0
) -> Tensor:
    """A new tensor of type ``dtype``: ``scale`` times the caller's ``noise``, or, if that is None, times new noise.

    New noise is drawn in the precision of ``like``, the network's output, as Diffusers does.
    """
    if noise is not None:
        return noise.to(dtype) * scale
    if like.dtype is dtype:
        return draw_noise(like, generator, scale)
    return draw_noise(like, generator).to(dtype).mul_(scale)


def normalize_timestep(timestep: Any, samples: Tensor) -> int | Tensor:
    """An int if the batch shares its step, else (B,). A step on an accelerator stays there: reading it stalls."""
    if isinstance(timestep, Tensor | np.ndarray | list | tuple):
        steps = steps_tensor(timestep, "timestep")
        is_shared = steps.ndim == 0 and steps.device.type == "cpu"
        return int(steps) if is_shared else per_sample_timesteps(steps, samples)
    return checked_integer("timestep", timestep)


def per_sample_timesteps(timesteps: Any, samples: Tensor) -> Tensor:
    """One step per sample, from one per sample or one for all."""
    steps = steps_tensor(timesteps, "timesteps")
    if not isinstance(samples, Tensor):
        check_samples(samples=samples)
    return steps.reshape(-1).expand(len(samples)) if steps.numel() == 1 and samples.ndim else steps


def split_variance(model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    """Prediction and variance, the two halves of the channels, each of the shape of ``sample``, else ValueError."""
    if sample.ndim < 2 or model_output.ndim != sample.ndim or model_output.shape[1] != 2 * sample.shape[1]:
        raise ValueError(
            f"learned variances need a model_output with twice sample's channels, got {tuple(model_output.shape)} for "
            f"{tuple(sample.shape)}; for a network without them set variance_type='fixed_small'."
        )
    output, variance = model_output.split(sample.shape[1], dim=1)
    return output, variance

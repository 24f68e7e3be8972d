"""What one reverse step needs: its coefficients, its steps in one form, its noise.

Symbols, on the chain of the steps in use:

    x0, xt           as in :mod:`diffusers_ddpm_ext.diffusion.gaussian`
    c0, ct           posterior_mean_coef1, posterior_mean_coef2: the mean one step back is ``c0 x0 + ct xt``
    sigma            square root of posterior_variance
    small, large     variance of the exact posterior, and beta: the two ends that ``v_posterior`` mixes

Sources: [DDPM] Ho et al. 2020, eqs. 6, 7, 15 and section 3.2; [iDDPM] Nichol & Dhariwal 2021, eq. 15.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffusers_ddpm_ext.diffusion.gaussian import check_steps
from diffusers_ddpm_ext.diffusion.schedule import MIN_VARIANCE, NoiseSchedule, Table

LEARNED_VARIANCES = ("learned", "learned_range")
Generators = torch.Generator | list[torch.Generator] | None
Row = tuple[float, float, float, float, float, float, float]


class ReverseSteps:
    """The coefficients of every step of a chain.

    A row is ``(xt_to_x0, output_to_x0, c0, ct, sigma, log small, log large)``. For a step that the whole batch shares
    it is Python floats, so that nothing is gathered and no tensor is read back; for steps per sample it is gathered.

    Args:
        kept: the chain of the steps in use.
        num_train_timesteps: T of the full chain.

    Attributes:
        last: the step after which the chain ends in x0 itself, so that it adds no noise.
        output_is_x0: whether the network predicts the sample.
        rows: step -> row.
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
        usable = np.isfinite(columns).all(axis=1)  # at zero terminal SNR noise does not tell x0: that step is missing
        self.last = int(kept.timesteps[0])
        self.output_is_x0 = kept.prediction_type == "sample"
        self.rows: dict[int, Row] = {
            t: tuple(row) for t, row in zip(kept.timesteps[usable].tolist(), columns[usable].tolist(), strict=True)
        }
        self._num_train_timesteps = num_train_timesteps
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def row(self, t: int) -> Row:
        """The row of one step.

        Raises:
            ValueError: the chain does not keep it.
        """
        try:
            return self.rows[t]
        except KeyError:
            raise self._not_kept([t]) from None

    def gather(self, t: Tensor, like: Tensor) -> Tensor:
        """The rows of one step per sample.

        Args:
            t: steps, (B,), integer.
            like: samples, (B, ...), whose device, precision and rank the result takes.

        Returns:
            (7, B, 1, ..., 1). Steps that the chain does not keep are NaN on an accelerator, where they are not read.

        Raises:
            ValueError: ``t`` is not one step of the chain per sample.
        """
        check_steps(t, like, self._num_train_timesteps)
        key = (t.device, like.dtype)
        if key not in self._tables:
            table = np.full((self._num_train_timesteps, 7), np.nan)
            table[list(self.rows)] = list(self.rows.values())
            self._tables[key] = torch.tensor(table, dtype=like.dtype, device=t.device)
        rows = self._tables[key][t]
        if t.device.type == "cpu" and rows.isnan().any():
            raise self._not_kept([step for step in t.tolist() if step not in self.rows])
        return rows.T.reshape(7, -1, *(1,) * (like.ndim - 1)).to(like.device)

    def _not_kept(self, steps: list[int]) -> ValueError:
        kept = list(self.rows)[::-1]
        some = ", ".join(map(str, kept if len(kept) < 8 else [*kept[:3], "...", *kept[-3:]]))
        return ValueError(
            f"timestep {', '.join(map(str, steps[:4]))} is not a step of the chain in use ({some}): take steps from "
            "scheduler.timesteps, or call set_timesteps with those you want. (With zero terminal SNR and "
            "prediction_type='epsilon' the last step cannot be used.)"
        )


def small_variance(kept: NoiseSchedule) -> Table:
    """Variance of the exact posterior ([DDPM] eq. 7), (K,); 0 at the first step."""
    return kept.betas * (1 - kept.alphas_cumprod_prev) / (1 - kept.alphas_cumprod)


def log_variance(variance_type: str, predicted: Tensor, log_small: Any, log_large: Any) -> Tensor:
    """The log-variance that a network predicted: ``learned`` itself, ``learned_range`` as a place between the logs of
    the two ends, from -1 to 1 ([iDDPM] eq. 15)."""
    if variance_type == "learned":
        return predicted
    large = (predicted + 1) / 2
    return large * log_large + (1 - large) * log_small


def draw_noise(like: Tensor, generator: Generators, scale: float = 1.0) -> Tensor:
    """``scale`` times the standard normal noise that Diffusers' ``randn_tensor`` draws.

    Args:
        like: whose shape, device and precision the noise takes.
        generator: one for all, one per sample, or None. CPU generators serve every device.
        scale: standard deviation.

    Raises:
        ValueError: a list that does not hold one generator per sample.
    """
    if isinstance(generator, list):
        if len(generator) not in (1, like.shape[0]):
            raise ValueError(f"generator must hold one generator per sample ({like.shape[0]}), got {len(generator)}.")
    elif generator is None or like.is_cpu or generator.device.type == like.device.type:
        # Cheaper than randn, and the scale costs no pass of its own. (empty_like would follow the strides of permuted
        # samples, and so give the same draws to other pixels.)
        return like.new_empty(like.shape).normal_(0, scale, generator=generator)
    return randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype).mul_(scale)


def scaled_noise(
    like: Tensor, generator: Generators, given: Tensor | None, dtype: torch.dtype, scale: float = 1.0
) -> Tensor:
    """A new tensor of ``scale`` times the noise that the caller gave, or else draws; of type ``dtype``.

    It is drawn in the precision of ``like``, the network's output, as in stock.
    """
    if given is not None:
        return given.to(dtype) * scale
    if like.dtype is dtype:
        return draw_noise(like, generator, scale)
    return draw_noise(like, generator).to(dtype).mul_(scale)


def shared_or_each(timestep: Any, samples: Tensor) -> int | Tensor:
    """An int where the batch shares its step, else (B,). A step on an accelerator stays there: reading it stalls."""
    if not isinstance(timestep, Tensor):
        return operator.index(timestep)
    if timestep.ndim == 0 and timestep.device.type == "cpu" and not timestep.is_floating_point():
        return int(timestep)
    return for_each(timestep, samples)


def for_each(timesteps: Any, samples: Tensor) -> Tensor:
    """One step per sample, from as many or from one for all."""
    timesteps = torch.as_tensor(timesteps)
    return timesteps.reshape(-1).expand(samples.shape[0]) if timesteps.numel() == 1 else timesteps


def split_variance(model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves of the channels: prediction and variance, each of ``sample``'s shape.

    Raises:
        ValueError: there are not twice as many channels as ``sample`` has.
    """
    if sample.ndim < 2 or model_output.ndim != sample.ndim or model_output.shape[1] != 2 * sample.shape[1]:
        raise ValueError(
            f"learned variances need model_output of twice sample's channels, got {tuple(model_output.shape)} for "
            f"{tuple(sample.shape)}; for a network without them use variance_type='fixed_small'."
        )
    output, variance = model_output.split(sample.shape[1], dim=1)
    return output, variance

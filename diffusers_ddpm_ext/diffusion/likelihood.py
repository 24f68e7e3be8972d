"""The variational bound in bits per dimension, term by term: prior, one KL divergence per step, decoder.

Symbols, on the chain in use (all T steps, or the K steps of ``set_timesteps``):

    x0, xt, eps, A   as in `diffusers_ddpm_ext.diffusion.gaussian`
    small, large     variance of the exact posterior, and beta
    S                variance of the model's reverse step

    bound = KL(q(x_K | x0) || N(0, I))                      prior
          + sum over i > 0 of KL(q(x_{i-1} | x_i, x0) || p(x_{i-1} | x_i))
          - log p(x0 | x_first)                             decoder

The chain may start at any step: the decoder reconstructs the data from the first one, so each choice of steps is a
bound on the log-likelihood of the same data. S of the first step is not 0, unlike in sampling: if ``v_posterior``
makes it 0, it is that of the next step, or beta in a chain of one step; ``fixed_large``, ``fixed_small`` and the lower
end of ``learned_range`` have the next step's posterior variance there.

Everything is computed in float64 if the device supports it: float32 loses small divergences and the probability of
unlikely levels.

Sources: [DDPM] Ho et al. 2020, eqs. 5 and 13; [iDDPM] Nichol & Dhariwal 2021, eqs. 4 to 7 and 15, and its published
code for ``decoder="improved_diffusion"``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.diffusion.arguments import (
    as_steps,
    check_finite,
    check_generators,
    check_samples,
    evaluation_mode,
    network_output,
)
from diffusers_ddpm_ext.diffusion.gaussian import Steps, at_step, predict_x0, q_sample
from diffusers_ddpm_ext.diffusion.levels import (
    EIGHT_BITS,
    check_decoder,
    discretized_gaussian_log_likelihood,
    exact_dtype,
)
from diffusers_ddpm_ext.diffusion.reverse_step import LEARNED_VARIANCES, log_variance, small_variance, split_variance
from diffusers_ddpm_ext.diffusion.schedule import NoiseSchedule, Table
from diffusers_ddpm_ext.utils.checks import checked_flag, checked_integer, describe
from diffusers_ddpm_ext.utils.vocabulary import Decoder, VarianceType

__all__ = [
    "BitsPerDim", "BoundTerms", "ChainScheduler", "Denoiser", "ReverseTransition", "SchedulerLike",
    "bits_per_dim", "bound_terms", "check_decoder", "discretized_gaussian_log_likelihood", "normal_kl", "prior_bits",
]  # fmt: skip

ROWS = 256  # network inputs per call, unless the batch is larger

Denoiser = Callable[[Tensor, Tensor], Any]  # to a tensor, or a Diffusers output with .sample


class SchedulerLike(Protocol):
    """The part of ``DDPMExtScheduler`` that an objective uses."""

    @property
    def schedule(self) -> NoiseSchedule:
        """Tables of the full chain."""

    @property
    def config(self) -> Any:
        """Has ``prediction_type``, ``variance_type`` and ``v_posterior``."""


class ChainScheduler(Protocol):
    """The part of ``DDPMExtScheduler`` that a bound uses."""

    @property
    def kept(self) -> NoiseSchedule:
        """Tables of the chain in use."""

    @property
    def config(self) -> Any:
        """Has ``variance_type`` and ``v_posterior``."""


@dataclass(frozen=True)
class BoundTerms:
    """Terms of the bound at one step per sample.

    Attributes:
        bits: (B,), bits per dimension: decoder term at the first step of the chain, KL divergence at the others.
        pred_x0: (B, ...), the predicted clean sample, clipped if requested.
        mean: (B, ...), of the model's reverse step.
        log_variance: (B, ...) or (B, 1, ..., 1), natural log of its variance.
    """

    bits: Tensor
    pred_x0: Tensor
    mean: Tensor
    log_variance: Tensor


@dataclass(frozen=True)
class BitsPerDim:
    """The bound of a batch, in bits per dimension.

    Attributes:
        total: (B,), the bound: prior, decoder and all steps.
        prior: (B,), the part that does not depend on the network.
        steps: (B, K), ascending in t; column 0 is the decoder.
    """

    total: Tensor
    prior: Tensor
    steps: Tensor


def normal_kl(
    mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float
) -> Tensor:
    """``KL(first || second)`` of two normal distributions in nats, elementwise, 0 or more up to rounding.

    Args:
        mean1: of the first distribution; all four broadcast together.
        logvar1: natural log of its variance.
        mean2: of the second distribution.
        logvar2: natural log of its variance.
    """
    tensors = [value for value in (mean1, logvar1, mean2, logvar2) if isinstance(value, Tensor)]
    like = next(filter(torch.is_floating_point, tensors), torch.zeros((), dtype=torch.float64))
    m1, l1, m2, l2 = (
        torch.as_tensor(v, dtype=like.dtype, device=like.device) if not isinstance(v, Tensor) else v
        for v in (mean1, logvar1, mean2, logvar2)
    )
    # expm1(d) - d instead of exp(d) - 1 - d, which cancels for two almost equal distributions.
    d = l1 - l2
    return 0.5 * (torch.expm1(d) - d + (m1 - m2) ** 2 * torch.exp(-l2))


class ReverseTransition:
    """The model's reverse transition p(x_{i-1} | x_i) on a chain, and its terms of the bound.

    Args:
        kept: the chain in use; its ``prediction_type`` is that of the network.
        variance_type: of the scheduler's config.
        use_v_posterior: whether ``v_posterior`` is set, so that the chain's own variances are used.
    """

    def __init__(self, kept: NoiseSchedule, variance_type: VarianceType, use_v_posterior: bool) -> None:
        self.kept = kept
        self.variance_type = variance_type
        small = small_variance(kept)
        small[0] = small[1] if len(kept) > 1 else kept.betas[0]
        large, fixed = kept.betas.copy(), None
        if variance_type not in LEARNED_VARIANCES:
            if use_v_posterior:
                fixed = np.where(kept.posterior_variance > 0, kept.posterior_variance, small)
            elif variance_type.startswith("fixed_large"):
                fixed = np.append(small[:1], large[1:])
            else:
                fixed = small
        self.log_small: Table = np.log(small)
        self.log_large: Table = np.log(large)
        self.log_fixed: Table | None = None if fixed is None else np.log(fixed)
        for table in (self.log_small, self.log_large, self.log_fixed):
            if table is not None:
                table.flags.writeable = False  # so that it is transferred to a device once

    @classmethod
    def from_scheduler(cls, scheduler: ChainScheduler) -> ReverseTransition:
        """The transition on a scheduler's chain in use."""
        if not isinstance(getattr(scheduler, "kept", None), NoiseSchedule):
            raise ValueError(
                f"scheduler={type(scheduler).__name__} has no chain of steps: pass a DDPMExtScheduler, or convert a "
                "scheduler with DDPMExtScheduler.from_config(scheduler.config)."
            )
        config = scheduler.config
        return cls(scheduler.kept, config.variance_type, getattr(config, "v_posterior", None) is not None)

    def chain_indices(self, t: Steps, like: Tensor) -> Tensor:
        """Indices of the steps in the ascending chain; ValueError unless ``t`` is one step of the chain per sample."""
        steps = self.kept.timesteps
        t = as_steps(t, like, int(steps[-1]) + 1)
        if len(steps) == steps[-1] + 1:
            return t
        indices = np.searchsorted(steps, t.cpu().numpy())
        if (steps[indices] != t.cpu().numpy()).any():
            raise ValueError(
                f"t has steps that are not in the chain in use ({len(steps)} steps, {steps[0]} to {steps[-1]}): "
                "take them from scheduler.timesteps, or call set_timesteps with those you want."
            )
        return torch.from_numpy(indices).to(t.device)

    def predict(self, model_output: Tensor, xt: Tensor, index: Tensor, clip: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Predicted x0, mean and log-variance of a reverse step; a fixed log-variance is (B, 1, ..., 1).

        Args:
            model_output: (B, C, ...), or (B, 2 C, ...) for learned variances.
            xt: input of the network, (B, C, ...).
            index: from `chain_indices`.
            clip: whether the predicted x0 is clipped to [-1, 1].
        """
        kept = self.kept
        if self.log_fixed is None:
            model_output, predicted = split_variance(model_output, xt)
            small, large = at_step(self.log_small, index, xt), at_step(self.log_large, index, xt)
            scale = log_variance(self.variance_type, predicted, small, large)
        else:
            scale = at_step(self.log_fixed, index, xt)
        x0 = predict_x0(kept, kept.prediction_type, model_output, xt, index)
        if clip:
            x0 = x0.clamp(-1, 1)
        return x0, self._mean(x0, xt, index), scale

    def _mean(self, x0: Tensor, xt: Tensor, index: Tensor) -> Tensor:
        kept = self.kept
        return at_step(kept.posterior_mean_coef1, index, xt) * x0 + at_step(kept.posterior_mean_coef2, index, xt) * xt

    def terms(
        self,
        model_output: Tensor,
        x0: Tensor,
        xt: Tensor,
        t: Steps,
        *,
        clip_denoised: bool = False,
        decoder: Decoder = "exact",
        bin_width: float = EIGHT_BITS,
    ) -> BoundTerms:
        """See `bound_terms`."""
        check_decoder(decoder, bin_width)
        model_output = network_output(model_output)
        check_samples(x0=x0, xt=xt)
        index = self.chain_indices(t, xt)
        dtype = torch.promote_types(torch.promote_types(x0.dtype, model_output.dtype), torch.float32)
        exact = exact_dtype(xt.device)
        model_output, x0, xt = model_output.to(exact), x0.to(exact), xt.to(exact)
        predicted, mean, scale = self.predict(model_output, xt, index, clip_denoised)
        nats = normal_kl(self._mean(x0, xt, index), at_step(self.log_small, index, xt), mean, scale)
        first = (index == 0).nonzero().flatten()
        if len(first):
            log_scale = 0.5 * scale.expand_as(mean)[first]
            log_likelihood = discretized_gaussian_log_likelihood(
                x0[first], mean[first], log_scale, bin_width=bin_width, decoder=decoder
            )
            nats = nats.index_copy(0, first, -log_likelihood)
        bits = nats.flatten(1).mean(1) / math.log(2)
        return BoundTerms(bits.to(dtype), predicted.to(dtype), mean.to(dtype), scale.to(dtype))


def bound_terms(
    scheduler: ChainScheduler,
    model_output: Tensor,
    x0: Tensor,
    xt: Tensor,
    t: Steps,
    *,
    clip_denoised: bool = False,
    decoder: Decoder = "exact",
    bin_width: float = EIGHT_BITS,
) -> BoundTerms:
    """One term of the bound per sample, differentiable in the network's output.

    Args:
        scheduler: its chain in use and its variance (``v_posterior``, fixed or learned) define the bound.
        model_output: the network's output for ``xt``, (B, C, ...), or (B, 2 C, ...) with learned variances; a
            Diffusers output with ``.sample`` is taken, too.
        x0: clean samples, (B, C, ...), data units.
        xt: the samples, noised to their steps.
        t: steps of the full chain, integers in the chain in use: (B,), a list, or one int for all.
        clip_denoised: whether the predicted x0 is clipped to [-1, 1].
        decoder: see `discretized_gaussian_log_likelihood`.
        bin_width: see there.

    Returns:
        Bits and intermediate results, in the precision of ``x0`` and ``model_output`` (at least float32). Not finite
        if the prediction implies no finite x0 (epsilon at zero terminal SNR).

    Raises:
        ValueError: shapes, steps or options are invalid.
    """
    transition = ReverseTransition.from_scheduler(scheduler)
    return transition.terms(model_output, x0, xt, t, clip_denoised=clip_denoised, decoder=decoder, bin_width=bin_width)


def prior_bits(scheduler: ChainScheduler, x0: Tensor) -> Tensor:
    """``KL(q(x_K | x0) || N(0, I))`` of the last step of a chain in use, bits per dimension.

    ``x0`` is (B, C, ...), in data units; the result is (B,), in the precision of ``x0``, at least float32.
    """
    ReverseTransition.from_scheduler(scheduler)
    check_samples(x0=x0)
    if x0.ndim < 2:
        raise ValueError(f"x0 must be (B, C, ...), got shape {tuple(x0.shape)}.")
    kept = scheduler.kept
    x = x0.to(exact_dtype(x0.device))
    mean = float(kept.sqrt_alphas_cumprod[-1]) * x
    nats = normal_kl(mean, float(kept.log_one_minus_alphas_cumprod[-1]), 0.0, 0.0)
    return (nats.flatten(1).mean(1) / math.log(2)).to(torch.promote_types(x0.dtype, torch.float32))


@torch.no_grad()
def bits_per_dim(
    denoiser: Denoiser,
    scheduler: ChainScheduler,
    x0: Tensor,
    *,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    clip_denoised: bool = False,
    decoder: Decoder = "exact",
    bin_width: float = EIGHT_BITS,
    rows: int = ROWS,
) -> BitsPerDim:
    """The bound of a batch on the scheduler's chain in use, with one noise sample per step.

    Several steps share a network call, with the image index varying fastest.

    Args:
        denoiser: called as ``denoiser(xt, t)`` with (R, C, ...) and int64 (R,); returns a tensor, or a Diffusers
            output with ``.sample``. A module is run in its own precision and with its dropout off.
        scheduler: the chain is all T steps, or those of the last ``set_timesteps``.
        x0: clean samples, (B, C, ...), data units; float64 stays float64 throughout.
        generator: of the noise, drawn for the complete batch step by step, ascending in t.
        noise: standard normal, (K, B, C, ...), ascending in t, to use instead.
        clip_denoised: whether the predicted x0 is clipped to [-1, 1].
        decoder: see `discretized_gaussian_log_likelihood`.
        bin_width: see there.
        rows: network inputs per call; as many complete steps as fit, at least one.

    Returns:
        The bound, its prior and its steps.

    Raises:
        ValueError: shapes or options are invalid, or ``x0`` has NaN or infinity.
    """
    transition, kept = ReverseTransition.from_scheduler(scheduler), scheduler.kept
    count = len(kept)
    check_decoder(decoder, bin_width)
    _check_bound_inputs(denoiser, x0, noise, count)
    batch = len(x0)
    rows = checked_integer("rows", rows, "an integer of 1 or more", low=1)
    clip_denoised = checked_flag("clip_denoised", clip_denoised)
    steps = torch.from_numpy(kept.timesteps.copy()).to(x0.device)
    bits = torch.empty(count, batch, dtype=exact_dtype(x0.device), device=x0.device)
    steps_per_call = max(1, rows // batch)
    for start in range(0, count, steps_per_call):
        indices = range(start, min(start + steps_per_call, count))
        if noise is None:
            eps = torch.cat([normal_like(x0, generator) for _ in indices])
        else:
            eps = noise[indices.start : indices.stop].to(x0).flatten(0, 1)
        clean = x0.repeat(len(indices), *(1,) * (x0.ndim - 1))
        index = torch.arange(indices.start, indices.stop, device=x0.device).repeat_interleave(batch)
        xt, t = q_sample(kept, clean, eps, index), steps[index]
        terms = transition.terms(
            run_denoiser(denoiser, xt, t),
            clean,
            xt,
            t,
            clip_denoised=clip_denoised,
            decoder=decoder,
            bin_width=bin_width,
        )
        bits[indices.start : indices.stop] = terms.bits.reshape(len(indices), batch)
    prior = prior_bits(scheduler, x0)
    total = bits.sum(0) + prior
    return BitsPerDim(total.to(prior.dtype), prior, bits.T.to(prior.dtype).contiguous())


def _check_bound_inputs(denoiser: Any, x0: Any, noise: Any, count: int) -> None:
    """Refuse what is not a network, clean samples, or noise for ``count`` steps of them."""
    check_denoiser(denoiser, x0)
    if noise is not None:
        check_samples(noise=noise)
    if noise is not None and noise.shape != (count, *x0.shape):
        raise ValueError(f"noise must be {(count, *x0.shape)}, one sample per step, got {tuple(noise.shape)}.")


def check_denoiser(denoiser: Any, x0: Any) -> None:
    """Raise ValueError unless these are a network and its finite clean samples, (B, C, ...)."""
    if not callable(denoiser):
        scope = " (averaged weights: `with ema.scope(network): ...`)" if hasattr(denoiser, "scope") else ""
        raise ValueError(f"denoiser={describe(denoiser)} is not a network: pass one that is called as (xt, t){scope}.")
    check_samples(x0=x0)
    if x0.ndim < 2 or x0.numel() == 0:
        raise ValueError(f"x0 must be floating, (B, C, ...), got {x0.dtype} of shape {tuple(x0.shape)}.")
    check_finite("x0", x0)


def run_denoiser(denoiser: Denoiser, xt: Tensor, t: Tensor) -> Tensor:
    """Output of a network in evaluation mode, a module in its own precision."""
    if isinstance(denoiser, nn.Module):
        parameter = next((p for p in denoiser.parameters() if p.is_floating_point()), xt)
        xt = xt.to(parameter.dtype)
    with evaluation_mode(denoiser):
        return network_output(denoiser(xt, t), "the denoiser's output")


def normal_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise on the device of ``x``; a CPU generator works for every device."""
    if isinstance(check_generators(generator, 1), list):
        raise ValueError("generator must be one torch.Generator or None, got a list.")
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)

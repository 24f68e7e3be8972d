"""The variational bound, term by term: prior, one divergence a step, decoder; in bits per dimension.

Symbols, on the chain of the steps in use (all T of them, or the K kept by ``set_timesteps``):

    x0, xt, eps, A   as in :mod:`diffusers_ddpm_ext.diffusion.gaussian`
    small, large     variance of the exact posterior, and beta
    S                variance of the model's step back

    bound = KL(q(x_K | x0) || N(0, I))                      prior
          + sum over i > 0 of KL(q(x_{i-1} | x_i, x0) || p(x_{i-1} | x_i))
          - log p(x0 | x_first)                             decoder

The chain may begin at any step: what comes first is read off by the decoder, so each choice of steps is a bound on the
log-likelihood of one and the same data. S of the first step is not 0, as it is while sampling: where ``v_posterior``
makes it 0 it is that of the neighbour, or beta in a chain of one step; ``fixed_large``, ``fixed_small`` and the small
end of ``learned_range`` have the neighbour's posterior variance there.

All is computed in float64, where the device has it: small divergences and the mass of unlikely levels are lost in
float32.

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
from torch import Tensor

from diffusers_ddpm_ext.diffusion.gaussian import at_step, check_steps, predict_x0, q_sample
from diffusers_ddpm_ext.diffusion.reverse_step import LEARNED_VARIANCES, log_variance, small_variance, split_variance
from diffusers_ddpm_ext.diffusion.schedule import NoiseSchedule, Table

DECODERS = ("exact", "improved_diffusion", "continuous")
EIGHT_BITS = 2 / 255
ROWS = 256  # of the network in one call, unless there are more images than that
MIN_MASS = 1e-12  # improved-diffusion's floor of a probability
NARROW = 1e-5  # standard deviations: bins narrower than this are a density times their width

Denoiser = Callable[[Tensor, Tensor], Tensor]


class SchedulerLike(Protocol):
    """What an objective needs of a scheduler; ``DDPMExtScheduler`` has it."""

    @property
    def schedule(self) -> NoiseSchedule:
        """Tables of the full chain."""
        ...

    @property
    def config(self) -> Any:
        """Holds ``prediction_type``, ``variance_type`` and ``v_posterior``."""
        ...


class ChainScheduler(Protocol):
    """What a bound needs of a scheduler; ``DDPMExtScheduler`` has it."""

    @property
    def kept(self) -> NoiseSchedule:
        """Tables of the chain in use."""
        ...

    @property
    def config(self) -> Any:
        """Holds ``variance_type`` and ``v_posterior``."""
        ...


@dataclass(frozen=True)
class BoundTerms:
    """The bound's terms at one step for each sample.

    Attributes:
        bits: (B,), bits per dimension: the decoder's at the first step of the chain, a divergence at the others.
        pred_x0: (B, ...), the clean sample that the network predicted, clipped if that was asked for.
        mean: (B, ...), of the model's step back.
        log_variance: (B, ...) or (B, 1, ..., 1), of it, natural log.
    """

    bits: Tensor
    pred_x0: Tensor
    mean: Tensor
    log_variance: Tensor


@dataclass(frozen=True)
class BitsPerDim:
    """The bound of a batch, in bits per dimension.

    Attributes:
        total: (B,), the whole bound.
        prior: (B,), its part that no network can change.
        steps: (B, K), ascending in t; column 0 is the decoder.
    """

    total: Tensor
    prior: Tensor
    steps: Tensor


def normal_kl(
    mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float
) -> Tensor:
    """Divergence of two normal laws, element by element.

    Args:
        mean1: of the first law; all four broadcast together.
        logvar1: natural log of its variance.
        mean2: of the second law.
        logvar2: natural log of its variance.

    Returns:
        ``KL(first || second)`` in nats, 0 or more up to rounding.
    """
    given = [value for value in (mean1, logvar1, mean2, logvar2) if isinstance(value, Tensor)]
    like = given[0] if given else torch.zeros((), dtype=torch.float64)
    m1, l1, m2, l2 = (
        torch.as_tensor(v, dtype=like.dtype, device=like.device) if not isinstance(v, Tensor) else v
        for v in (mean1, logvar1, mean2, logvar2)
    )
    # expm1(d) - d instead of exp(d) - 1 - d: of two almost equal laws the latter leaves no digit.
    d = l1 - l2
    return 0.5 * (torch.expm1(d) - d + (m1 - m2) ** 2 * torch.exp(-l2))


def discretized_gaussian_log_likelihood(
    x: Tensor,
    mean: Tensor,
    log_scale: Tensor | float,
    *,
    bin_width: float = EIGHT_BITS,
    decoder: str = "exact",
) -> Tensor:
    """Log-probability of levels under a normal law, element by element ([DDPM] eq. 13).

    A level stands for the bin around it, and the first and the last for all that lies beyond them.

    Args:
        x: levels, (B, ...), floating, in [-1, 1].
        mean: of the law, same shape.
        log_scale: natural log of its standard deviation; broadcasts.
        bin_width: distance of two levels, data units: 2/255 for 8 bits.
        decoder: ``exact``: the normal distribution function, without a floor; ``improved_diffusion``: its tanh
            approximation and floor of 1e-12, as published; ``continuous``: the log-density at x instead, nats
            per dimension of continuous (or dequantised) data, for which ``bin_width`` has no meaning.

    Returns:
        Nats, of the shape and precision of ``x`` (at least float32); computed in float64.

    Raises:
        ValueError: ``decoder`` is unknown, or ``bin_width`` is not a number in (0, 2].
    """
    check_decoder(decoder, bin_width)
    dtype = torch.promote_types(x.dtype, torch.float32)
    exact = exact_dtype(x.device)
    x, mean = x.to(exact), mean.to(exact)
    log_scale = torch.as_tensor(log_scale, device=x.device).to(exact)
    centred = x - mean
    if decoder == "continuous":
        return (-0.5 * (centred * torch.exp(-log_scale)) ** 2 - log_scale - 0.5 * math.log(2 * math.pi)).to(dtype)
    invert = torch.exp(-log_scale)
    lower, upper = invert * (centred - bin_width / 2), invert * (centred + bin_width / 2)
    if decoder == "improved_diffusion":
        edge = 1 - 0.1275 * bin_width  # 0.999 for 8 bits, as published
        return _tanh_mass(x, lower, upper, edge).to(dtype)
    edge = 1 - bin_width / 4
    mass = torch.where(x > edge, _log_ndtr(-lower), _log_mass(lower, upper))
    return torch.where(x < -edge, _log_ndtr(upper), mass).to(dtype)


def check_decoder(decoder: str, bin_width: float) -> None:
    """Raise ValueError unless there is such a decoder and such a bin."""
    if decoder not in DECODERS:
        raise ValueError(f"decoder={decoder!r} is unknown: choose one of {', '.join(DECODERS)}.")
    number = isinstance(bin_width, (int, float, np.number)) and not isinstance(bin_width, bool)
    if not number or not 0 < bin_width <= 2:
        raise ValueError(
            f"bin_width={bin_width!r} must lie in (0, 2], data units: 2/255 for 8 bits; decoder='continuous' has none."
        )


def exact_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device without it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _log_ndtr(z: Tensor) -> Tensor:
    return torch.special.log_ndtr(z)


def _log_mass(lower: Tensor, upper: Tensor) -> Tensor:
    """``log(Phi(upper) - Phi(lower))`` without cancellation, with finite gradients."""
    flip = lower + upper > 0  # in the left tail both logs have all their digits
    a, b = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    narrow = b - a < NARROW
    wide_a = torch.where(narrow, b - 1, a)  # keeps infinities out of the gradient of the branch not taken
    top = _log_ndtr(b)
    wide = top + torch.log(-torch.expm1(_log_ndtr(wide_a) - top))
    width = torch.where(narrow, b - a, torch.ones_like(a)).clamp(min=torch.finfo(a.dtype).tiny)
    density = -0.125 * (a + b) ** 2 - 0.5 * math.log(2 * math.pi) + torch.log(width)
    return torch.where(narrow, density, wide)


def _tanh_mass(x: Tensor, lower: Tensor, upper: Tensor, edge: float) -> Tensor:
    """improved-diffusion's approximation of the same, with its floor."""

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    below, above = cdf(lower), cdf(upper)
    mass = torch.where(x > edge, 1 - below, above - below)
    return torch.log(torch.where(x < -edge, above, mass).clamp(min=MIN_MASS))


class ReverseTransition:
    """The model's law of a step back, p(x_{i-1} | x_i), on one chain, and its share of the bound.

    Args:
        kept: the chain in use; its ``prediction_type`` names what the network predicts.
        variance_type: as a scheduler's config has it.
        follows_v: whether ``v_posterior`` was given, so that the chain's own variances hold.
    """

    def __init__(self, kept: NoiseSchedule, variance_type: str, follows_v: bool) -> None:
        self.kept = kept
        self.variance_type = variance_type
        small = small_variance(kept)
        small[0] = small[1] if len(kept) > 1 else kept.betas[0]
        large, fixed = kept.betas.copy(), None
        if variance_type not in LEARNED_VARIANCES:
            if follows_v:
                fixed = np.where(kept.posterior_variance > 0, kept.posterior_variance, small)
            elif variance_type.startswith("fixed_large"):
                fixed = np.append(small[:1], large[1:])
            else:
                fixed = small
        self.log_small: Table = np.log(small)
        self.log_large: Table = np.log(large)
        self.log_fixed: Table | None = None if fixed is None else np.log(fixed)

    @classmethod
    def from_scheduler(cls, scheduler: ChainScheduler) -> ReverseTransition:
        """The law of a scheduler's chain in use."""
        config = scheduler.config
        return cls(scheduler.kept, config.variance_type, getattr(config, "v_posterior", None) is not None)

    def places(self, t: Tensor, like: Tensor) -> Tensor:
        """Where in the chain the steps stand, counted upwards.

        Raises:
            ValueError: ``t`` is not one step of the chain per sample.
        """
        steps = self.kept.timesteps
        check_steps(t, like, int(steps[-1]) + 1)
        if len(steps) == steps[-1] + 1:
            return t.long()
        places = np.searchsorted(steps, t.cpu().numpy())
        if (steps[places] != t.cpu().numpy()).any():
            raise ValueError(
                f"t holds steps that the chain in use ({len(steps)} steps, {steps[0]} to {steps[-1]}) does not keep: "
                "take them from scheduler.timesteps, or call set_timesteps with those you want."
            )
        return torch.from_numpy(places).to(t.device)

    def step_back(self, model_output: Tensor, xt: Tensor, place: Tensor, clip: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Predicted x0, mean and log-variance of the law.

        Args:
            model_output: (B, C, ...), or (B, 2 C, ...) for learned variances.
            xt: what the network was given, (B, C, ...).
            place: from `places`.
            clip: whether the predicted x0 is clipped to [-1, 1].

        Returns:
            The three; the log-variance is (B, 1, ..., 1) where it is fixed.
        """
        kept = self.kept
        if self.log_fixed is None:
            model_output, predicted = split_variance(model_output, xt)
            small, large = at_step(self.log_small, place, xt), at_step(self.log_large, place, xt)
            scale = log_variance(self.variance_type, predicted, small, large)
        else:
            scale = at_step(self.log_fixed, place, xt)
        x0 = predict_x0(kept, kept.prediction_type, model_output, xt, place)
        if clip:
            x0 = x0.clamp(-1, 1)
        return x0, self._mean(x0, xt, place), scale

    def _mean(self, x0: Tensor, xt: Tensor, place: Tensor) -> Tensor:
        kept = self.kept
        return at_step(kept.posterior_mean_coef1, place, xt) * x0 + at_step(kept.posterior_mean_coef2, place, xt) * xt

    def terms(
        self,
        model_output: Tensor,
        x0: Tensor,
        xt: Tensor,
        t: Tensor,
        *,
        clip_denoised: bool = False,
        decoder: str = "exact",
        bin_width: float = EIGHT_BITS,
    ) -> BoundTerms:
        """See :func:`bound_terms`."""
        check_decoder(decoder, bin_width)
        if x0.shape != xt.shape:
            raise ValueError(f"x0 and xt must have one shape, got {tuple(x0.shape)} and {tuple(xt.shape)}.")
        place = self.places(t, xt)
        dtype = torch.promote_types(torch.promote_types(x0.dtype, model_output.dtype), torch.float32)
        exact = exact_dtype(xt.device)
        model_output, x0, xt = model_output.to(exact), x0.to(exact), xt.to(exact)
        predicted, mean, scale = self.step_back(model_output, xt, place, clip_denoised)
        nats = normal_kl(self._mean(x0, xt, place), at_step(self.log_small, place, xt), mean, scale)
        first = (place == 0).nonzero().flatten()
        if len(first):
            spread = 0.5 * scale.expand_as(mean)[first]
            likely = discretized_gaussian_log_likelihood(
                x0[first], mean[first], spread, bin_width=bin_width, decoder=decoder
            )
            nats = nats.index_copy(0, first, -likely)
        bits = nats.flatten(1).mean(1) / math.log(2)
        return BoundTerms(bits.to(dtype), predicted.to(dtype), mean.to(dtype), scale.to(dtype))


def bound_terms(
    scheduler: ChainScheduler,
    model_output: Tensor,
    x0: Tensor,
    xt: Tensor,
    t: Tensor,
    *,
    clip_denoised: bool = False,
    decoder: str = "exact",
    bin_width: float = EIGHT_BITS,
) -> BoundTerms:
    """What one step of each sample adds to the bound, differentiable in the network's output.

    Args:
        scheduler: whose chain in use is meant, and its variance: ``v_posterior``, fixed or learned.
        model_output: what the network returned for ``xt``, (B, C, ...), or (B, 2 C, ...) with learned variances.
        x0: clean samples, (B, C, ...), data units.
        xt: the same noised to their steps.
        t: steps of the full chain, (B,), integer, each kept by the chain in use.
        clip_denoised: whether the predicted x0 is clipped to [-1, 1].
        decoder: see :func:`discretized_gaussian_log_likelihood`.
        bin_width: see there.

    Returns:
        Bits and what they came from, in the precision of ``x0`` and ``model_output`` (at least float32). Not finite
        where the network's prediction stands for no finite x0 (epsilon at zero terminal SNR).

    Raises:
        ValueError: shapes, steps or options do not fit.
    """
    law = ReverseTransition.from_scheduler(scheduler)
    return law.terms(model_output, x0, xt, t, clip_denoised=clip_denoised, decoder=decoder, bin_width=bin_width)


def prior_bits(scheduler: ChainScheduler, x0: Tensor) -> Tensor:
    """``KL(q(x_K | x0) || N(0, I))`` of the chain's last step, bits per dimension.

    Args:
        scheduler: whose chain in use is meant.
        x0: clean samples, (B, ...), data units.

    Returns:
        (B,), in the precision of ``x0``, at least float32.
    """
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
    decoder: str = "exact",
    bin_width: float = EIGHT_BITS,
    rows: int = ROWS,
) -> BitsPerDim:
    """The bound of a batch on the scheduler's chain in use, one draw of noise for each step.

    Several steps share a call of the network, the images running fastest.

    Args:
        denoiser: called as ``denoiser(xt, t)`` with (R, C, ...) and int64 (R,); returns a tensor.
        scheduler: its chain is all T steps, or those of the last ``set_timesteps``.
        x0: clean samples, (B, C, ...), data units; float64 stays float64 throughout.
        generator: where the noise comes from, step by step upwards, the whole batch at once.
        noise: standard normal, (K, B, C, ...), ascending in t, instead of drawing it.
        clip_denoised: whether the predicted x0 is clipped to [-1, 1].
        decoder: see :func:`discretized_gaussian_log_likelihood`.
        bin_width: see there.
        rows: of the network in one call; as many whole steps as fit into them, at least one.

    Returns:
        The bound, its prior and its steps.

    Raises:
        ValueError: shapes or options do not fit.
    """
    law, kept = ReverseTransition.from_scheduler(scheduler), scheduler.kept
    count, batch = len(kept), len(x0)
    check_decoder(decoder, bin_width)
    if not x0.is_floating_point() or x0.ndim < 2 or batch == 0:
        raise ValueError(f"x0 must be floating, (B, C, ...), got {x0.dtype} of shape {tuple(x0.shape)}.")
    if noise is not None and noise.shape != (count, *x0.shape):
        raise ValueError(f"noise must be {(count, *x0.shape)}, one draw a step, got {tuple(noise.shape)}.")
    steps = torch.from_numpy(kept.timesteps.copy()).to(x0.device)
    bits = torch.empty(count, batch, dtype=exact_dtype(x0.device), device=x0.device)
    share = max(1, rows // batch)
    for start in range(0, count, share):
        places = range(start, min(start + share, count))
        if noise is None:
            drawn = [_normal_like(x0, generator) for _ in places]
            eps = torch.cat(drawn)
        else:
            eps = noise[places.start : places.stop].to(x0).flatten(0, 1)
        clean = x0.repeat(len(places), *(1,) * (x0.ndim - 1))
        place = torch.arange(places.start, places.stop, device=x0.device).repeat_interleave(batch)
        xt, t = q_sample(kept, clean, eps, place), steps[place]
        output = denoiser(xt, t)
        terms = law.terms(output, clean, xt, t, clip_denoised=clip_denoised, decoder=decoder, bin_width=bin_width)
        bits[places.start : places.stop] = terms.bits.reshape(len(places), batch)
    prior = prior_bits(scheduler, x0)
    total = bits.sum(0) + prior
    return BitsPerDim(total.to(prior.dtype), prior, bits.T.to(prior.dtype).contiguous())


def _normal_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise on the device of ``x``; a CPU generator serves every device."""
    place = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=place, dtype=x.dtype).to(x.device)

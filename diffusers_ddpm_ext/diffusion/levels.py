"""Levels of a pixel: their bins, and their probabilities under a normal distribution, the decoder of a bound.

Everything is computed in float64 if the device supports it: float32 loses the probability of unlikely levels.

Sources: [DDPM] Ho et al. 2020, eq. 13; the published code of [iDDPM] for ``decoder="improved_diffusion"``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffusers_ddpm_ext.diffusion.arguments import check_samples
from diffusers_ddpm_ext.utils.checks import check_one_of, checked_number
from diffusers_ddpm_ext.utils.vocabulary import DECODERS, Decoder

EIGHT_BITS = 2 / 255
MIN_MASS = 1e-12  # improved-diffusion's floor of a probability
NARROW = 1e-5  # standard deviations: the mass of narrower bins is density times width


def discretized_gaussian_log_likelihood(
    x: Tensor, mean: Tensor, log_scale: Tensor | float, *, bin_width: float = EIGHT_BITS, decoder: Decoder = "exact"
) -> Tensor:
    """Log-probability of levels under a normal distribution, elementwise ([DDPM] eq. 13).

    A level is the bin around it; the first and the last level include everything beyond them.

    Args:
        x: levels, (B, ...), floating, in [-1, 1].
        mean: of the distribution, same shape.
        log_scale: natural log of its standard deviation; broadcasts.
        bin_width: distance of two levels, data units: 2/255 for 8 bits.
        decoder: ``exact``: the normal distribution function, without a floor; ``improved_diffusion``: its tanh
            approximation and floor of 1e-12, as published; ``continuous``: the log-density at x instead, nats
            per dimension of continuous (or dequantized) data, which does not use ``bin_width``.

    Returns:
        Nats, of the shape and precision of ``x`` (at least float32); computed in float64.

    Raises:
        ValueError: ``decoder`` is unknown, ``bin_width`` is not a number in (0, 2], x and mean are not floating or of
            other shapes, or ``log_scale`` does not broadcast to them.
    """
    check_decoder(decoder, bin_width)
    check_samples(x=x, mean=mean)
    dtype = torch.promote_types(x.dtype, torch.float32)
    exact = exact_dtype(x.device)
    x, mean = x.to(exact), mean.to(exact)
    log_scale = torch.as_tensor(log_scale, device=x.device).to(exact)
    if log_scale.ndim > x.ndim or any(
        a not in (1, b) for a, b in zip(log_scale.shape[::-1], x.shape[::-1], strict=False)
    ):
        raise ValueError(
            f"log_scale has shape {tuple(log_scale.shape)}; it must broadcast to that of x, {tuple(x.shape)}."
        )
    centred = x - mean
    if decoder == "continuous":
        return (-0.5 * (centred * torch.exp(-log_scale)) ** 2 - log_scale - 0.5 * math.log(2 * math.pi)).to(dtype)
    invert = torch.exp(-log_scale)
    lower, upper = invert * (centred - bin_width / 2), invert * (centred + bin_width / 2)
    if decoder == "improved_diffusion":
        edge = 1 - 0.1275 * bin_width  # 0.999 for 8 bits, as published
        return _tanh_mass(x, lower, upper, edge).to(dtype)
    edge = 1 - bin_width / 4
    mass = torch.where(x > edge, torch.special.log_ndtr(-lower), _log_mass(lower, upper))
    return torch.where(x < -edge, torch.special.log_ndtr(upper), mass).to(dtype)


def check_decoder(decoder: str, bin_width: float) -> None:
    """Raise ValueError if the decoder is unknown or the bin width is out of its range."""
    check_one_of("decoder", decoder, DECODERS)
    allowed = "in (0, 2], data units: 2/255 for 8 bits; decoder='continuous' has none"
    checked_number("bin_width", bin_width, allowed, lambda width: 0 < width <= 2)


def choose_bins(decoder: Decoder | None, bin_width: float | None, levels: int | None) -> tuple[Decoder, float]:
    """The decoder of a data set, and the width of its bins.

    Args:
        decoder: the requested one; None: ``exact``, or ``continuous`` for data without bins.
        bin_width: the requested distance of two levels, data units; None: that of the data.
        levels: number of values of a pixel; None for floats, which have no bins unless ``bin_width`` is given.

    Raises:
        ValueError: bins are requested for data without them.
    """
    if bin_width is None and levels is None:
        if decoder not in (None, "continuous"):
            raise ValueError(
                f"decoder={decoder!r} is the probability of a level's bin, and floats have no levels: use"
                " continuous, or give a bin_width"
            )
        return "continuous", EIGHT_BITS
    return decoder or "exact", 2 / ((levels or 2) - 1) if bin_width is None else bin_width


def exact_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that lacks it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _log_mass(lower: Tensor, upper: Tensor) -> Tensor:
    """``log(Phi(upper) - Phi(lower))`` without cancellation, with finite gradients."""
    flip = lower + upper > 0  # in the left tail both logs have full precision
    a, b = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    narrow = b - a < NARROW
    wide_a = torch.where(narrow, b - 1, a)  # keeps infinities out of the gradient of the unused branch
    top = torch.special.log_ndtr(b)
    wide = top + torch.log(-torch.expm1(torch.special.log_ndtr(wide_a) - top))
    width = torch.where(narrow, b - a, torch.ones_like(a)).clamp(min=torch.finfo(a.dtype).tiny)
    density = -0.125 * (a + b) ** 2 - 0.5 * math.log(2 * math.pi) + torch.log(width)
    return torch.where(narrow, density, wide)


def _tanh_mass(x: Tensor, lower: Tensor, upper: Tensor, edge: float) -> Tensor:
    """improved-diffusion's approximation of `_log_mass`, with its floor."""

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    below, above = cdf(lower), cdf(upper)
    mass = torch.where(x > edge, 1 - below, above - below)
    return torch.log(torch.where(x < -edge, above, mass).clamp(min=MIN_MASS))

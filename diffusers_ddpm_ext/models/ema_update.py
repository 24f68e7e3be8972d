"""Updates of averaged weights that are kept in bfloat16, or on another device than the network.

An update moves an average s towards its parameter p by ``s += w (p - s)``, with ``w = 1 - decay`` about 1e-4. bfloat16
has 8 significant bits: rounded to nearest, an update below 1/512 of s is lost, and with that weight the average stands
still until p is 20 times as large. Stochastic rounding takes the upper one of two neighbors with the probability of
the part that is cut off, so that the expectation of s is the exact average. What remains is noise: for a constant
distance p - s its variance tends to ``u |p - s| / 2``, where u is the distance of two neighbors.

Source: Gupta et al. 2015, "Deep Learning with Limited Numerical Precision", section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusers_ddpm_ext.utils.random_keys import EMA_ROUNDING, key

CHUNK = 2**20
"""Values that are updated at a time: the memory that an update needs. The draws of the rounding depend on it."""

Pair = tuple[Tensor, Tensor]


@torch.no_grad()
def update_in_chunks(shadows: Sequence[Tensor], sources: Sequence[Tensor], weight: float | Tensor, step: int) -> None:
    """Move averages towards parameters by ``s += weight (p - s)``, in place, a few tensors at a time.

    It is computed on the parameters' device, in float32 for averages in bfloat16 (then rounded stochastically) and
    in their own dtype otherwise. Nothing waits for the device: averages in pinned memory are complete once it is done
    with what was queued.

    Args:
        shadows: averages; dense, of any device.
        sources: parameters of the same shapes, of one device and any floating dtype.
        weight: ``1 - decay``, a number or a 0-dim tensor on the parameters' device.
        step: number of the update, which the draws of the rounding follow from.
    """
    device = sources[0].device
    generator = torch.Generator(device).manual_seed(key(EMA_ROUNDING, step))
    for pairs in _chunks(list(zip(shadows, sources, strict=True))):
        kept = [shadow for shadow, _ in pairs]
        rounds = kept[0].dtype == torch.bfloat16
        dtype = torch.float32 if rounds else kept[0].dtype
        values = torch.empty(sum(shadow.numel() for shadow in kept), dtype=dtype, device=device)
        parts = values.split([shadow.numel() for shadow in kept])
        views = [part.as_strided(shadow.size(), shadow.stride()) for part, shadow in zip(parts, kept, strict=True)]
        _copy(views, kept)
        weights: Any = [weight.to(dtype)] * len(views) if isinstance(weight, Tensor) else weight
        torch._foreach_lerp_(views, [source.to(dtype) for _, source in pairs], weights)
        if rounds:
            round_stochastically(values, generator)
        _copy(kept, views)


def _chunks(pairs: list[Pair]) -> Iterator[list[Pair]]:
    """Consecutive pairs of averages of one dtype, with at most `CHUNK` values where a tensor has not more itself."""
    chunk: list[Pair] = []
    size = 0
    for pair in pairs:
        shadow = pair[0]
        if chunk and (size + shadow.numel() > CHUNK or shadow.dtype != chunk[0][0].dtype):
            yield chunk
            chunk, size = [], 0
        chunk.append(pair)
        size += shadow.numel()
    if chunk:
        yield chunk


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets[0].device == sources[0].device:
        torch._foreach_copy_(targets, sources)
        return
    is_cuda = "cuda" in (targets[0].device.type, sources[0].device.type)  # where the order of a stream is kept
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=is_cuda)


def round_stochastically(values: Tensor, generator: torch.Generator) -> None:
    """Round float32 values to numbers that bfloat16 has, in place: up or down, with an exact expectation.

    A float32 number is a bfloat16 number and 16 more bits of its magnitude: uniform bits are added to these, and the
    sum is cut off.

    Args:
        values: (n,), float32, contiguous. NaN and infinite ones stay so.
        generator: of their device; advances by one 64-bit number for four values.
    """
    values.masked_fill_(values.isnan(), float("nan"))  # of all its forms the one that cannot overflow
    draws = torch.empty(-(-values.numel() // 4), dtype=torch.int64, device=values.device)
    draws.random_(-(2**63), None, generator=generator)
    bits = values.view(torch.int32)
    bits.add_(draws.view(torch.int16)[: values.numel()]).add_(2**15).bitwise_and_(-(2**16))

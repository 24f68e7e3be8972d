"""Keyed random numbers that are made on the device which uses them: a counter-based generator in integer operations.

Philox 4x32-10 turns a counter of four words and a key of two into four random words. The key is a hash of the stream's
name and the seed; the counter is a block of the sample's elements, the sample's position in the effective batch, and
the optimizer step (low and high word). So a number depends on its own coordinates alone, as in `random_keys`: not on
the other samples, on how the effective batch is split, or on the device. Nothing is transferred or read.

The numbers are others than those of `random_keys`, which a CPU makes faster. Words are the same on all devices, normal
numbers up to the rounding of their logarithm and cosine.

Sources: [Philox] Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; [BM] Box & Muller 1958.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffusers_ddpm_ext.utils import random_keys as keys

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
WORD = 0xFFFFFFFF
Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Four random words for each counter: int64 tensors in [0, 2**32), of the shape that the four broadcast to.

    Args:
        counter: four tensors, int64, each in [0, 2**32).
        key: two words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # Products of two words fill 64 bits; int64 wraps, so that the bits are right. The second and fourth word keep
        # the upper halves of their products, which the mask of the next round removes.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) ^ c1 ^ k0) & WORD, p1, ((p0 >> 32) ^ c3 ^ k1) & WORD, p0
        k0, k1 = k0 + WEYL[0] & WORD, k1 + WEYL[1] & WORD
    return c0, c1 & WORD, c2, c3 & WORD


def random_words(seed: int, step: int, positions: Tensor, blocks: int, stream: str) -> Words:
    """The words of samples: four tensors (B, blocks), on the device of ``positions``, (B,)."""
    wide = keys.wide_key(stream, seed)
    c0 = torch.arange(blocks, device=positions.device)[None]
    c1 = positions[:, None] & WORD
    c2, c3 = (
        torch.full((1, 1), word, dtype=torch.int64, device=positions.device) for word in (step & WORD, step >> 32)
    )
    return philox((c0, c1, c2, c3), (wide & WORD, wide >> 32))


def normal_draws(seed: int, step: int, positions: Tensor, shape: Sequence[int], stream: str = keys.NOISE) -> Tensor:
    """Standard normal numbers for each sample, by [BM]: (B, *shape), float32, on the device of the positions.

    Args:
        seed: of the run.
        step: optimizer step that the samples belong to.
        positions: in the effective batch, (B,), int64.
        shape: of one sample.
        stream: name of the stream.
    """
    count = math.prod(shape)
    words = random_words(seed, step, positions, -(-count // 4), stream)
    pairs = []
    for first, second in (words[:2], words[2:]):
        radius = ((first.float() + 0.5) * 2.0**-32).log_().mul_(-2).sqrt_()
        angle = second.float() * (2 * math.pi * 2.0**-32)
        pairs += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(pairs, -1).flatten(1)[:, :count].reshape(len(positions), *shape)


def uniform_draws(seed: int, step: int, positions: Tensor, stream: str = keys.TIMESTEP) -> Tensor:
    """A number in [0, 1) for each sample: (B,), float64 (float32 on MPS), on the device of the positions, (B,)."""
    low, high = (word[:, 0] for word in random_words(seed, step, positions, 1, stream)[:2])
    if positions.device.type == "mps":
        return (high >> 8).float() * 2.0**-24
    return ((high << 21) ^ (low >> 11)).double() * 2.0**-53


def permutation(seed: int, step: int, count: int, device: torch.device, stream: str) -> Tensor:
    """A permutation of the numbers below ``count``: (count,), int64."""
    return uniform_draws(seed, step, torch.arange(count, device=device), stream).argsort(stable=True)

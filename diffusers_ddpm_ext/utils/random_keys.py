"""Keyed random numbers: every draw is a function of its key, never of the process's history.

Each draw of a run comes from a generator seeded by what the draw is *for*: the stream's name, the run's seed and the
coordinates inside that stream. So the same draw results from any split of the batch, with any number of data workers,
and after a restart at any step.

Streams and their coordinates (the name goes first, so that two streams never share a key):

======================  ================================================
``NOISE``               seed, optimizer step, position in the effective batch
``ORDER``               seed, epoch; of weighted draws seed, pass over the group, group
``MIXTURE``             seed, block of samples (an epoch, or a part of a stream)
``MIXTURE_SOURCE``      seed, source of a mixture of streams
``FLIP``, ``CROP``      seed, epoch (of weighted draws the pass), index in the data set
``VERTICAL_FLIP``       the same
``ROTATION``            the same
``CROP_BEFORE``         the same
``CAPTION``             the same
``STREAM_PARTS``        seed, epoch of the lane; or with the lane
``STREAM_BLOCK``        seed, epoch of the lane, lane, block
``DROPOUT``             seed, optimizer step, micro-batch, rank
``PREVIEW``             seed, kind of the plot, image
``VALIDATION``          seed, image
``CONDITION``           seed, optimizer step, position in the effective batch, which condition
``BOUND``               seed, image, timestep; or ``"steps"``
``FIT``                 seed, image, timestep
``FIT_STEPS``           seed, trajectory
``TIMESTEP``            seed, optimizer step, position in the effective batch; or ``"order"``
``LATENT``              seed, optimizer step, position in the effective batch
``LATENT_SET``          seed, 0, image
``LATENT_CONCAT``       seed, optimizer step, position in the effective batch
``LATENT_CONCAT_SET``   seed, image
``LATENT_SCALE``        number of images (no seed: all runs on the same images measure the same scale)
``EMA_ROUNDING``        update of the average (no seed: it averages any network)
``METRICS``             purpose (no seed: all runs are measured alike)
``SPLIT``               name of the image (no seed: all runs are validated on the same images)
======================  ================================================
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

NOISE = "noise"
ORDER = "order"
MIXTURE = "mixture"
MIXTURE_SOURCE = "mixture/source"
FLIP = "augment/flip"
CROP = "augment/crop"
VERTICAL_FLIP = "augment/vertical-flip"
ROTATION = "augment/rotation"
CROP_BEFORE = "augment/crop-before"
CAPTION = "caption"
STREAM_PARTS = "stream/parts"
STREAM_BLOCK = "stream/block"
DROPOUT = "dropout"
PREVIEW = "preview"
VALIDATION = "validation"
CONDITION = "condition"
BOUND = "bound"
FIT = "fit"
FIT_STEPS = "fit/steps"
TIMESTEP = "timestep"
LATENT = "latent"
LATENT_SET = "latent/set"
LATENT_SCALE = "latent/scale"
LATENT_CONCAT = "latent/concat"
LATENT_CONCAT_SET = "latent/concat-set"
EMA_ROUNDING = "ema/rounding"
METRICS = "metrics"
SPLIT = "split"


def key(*parts: str | SupportsIndex) -> int:
    """Hash the parts of a key into 32 bits, the same on every machine, process and Python version.

    32 bits, because torch's CPU generator ignores the upper half of a seed: 5 and 5 + 2**32 give the same draws.
    Each part is hashed with its kind and its length, so that ``("ab", "c")``, ``("a", "bc")``, ``("a", 1)`` and
    ``("a", "1")`` are different keys.

    Args:
        *parts: strings and integers of any size (NumPy's and 0-dim integer tensors too); at least one.

    Returns:
        An integer in [0, 2**32).

    Raises:
        ValueError: there are no parts, or one is neither a string nor an integer.
    """
    if not parts:
        raise ValueError("key() needs at least one part: an empty key would be shared by all callers.")
    return _seed_of(_hash(parts))


def wide_key(*parts: str | SupportsIndex) -> int:
    """Hash the parts of a key into 64 bits, for a generator that has a key of its own (`device_random`)."""
    return int.from_bytes(hashlib.blake2b(b"".join(map(_encode, parts)), digest_size=8).digest(), "little")


def generator(*parts: str | SupportsIndex) -> torch.Generator:
    """Return a new CPU generator seeded by ``key(*parts)``."""
    return torch.Generator().manual_seed(key(*parts))


def uniform_numbers(count: int, *parts: str | SupportsIndex) -> list[float]:
    """Draw numbers in [0, 1) from the generator of a key."""
    numbers: list[float] = torch.rand(count, dtype=torch.float64, generator=generator(*parts)).tolist()
    return numbers


def sample_draws(
    seed: int,
    step: int,
    positions: Tensor | Iterable[int],
    shape: Sequence[int],
    num_train_timesteps: int,
    stream: str = NOISE,
) -> tuple[Tensor, Tensor]:
    """Draw the timestep and the noise of each sample from its own key.

    Sample ``i`` depends on ``(stream, seed, step, positions[i])`` alone: neither on the other samples
    nor on how the effective batch is split into ranks and micro-batches.

    Args:
        seed: the run's seed.
        step: optimizer step that the samples belong to.
        positions: positions in the effective batch, (B,) integers.
        shape: shape of one sample, for images (C, H, W).
        num_train_timesteps: number T of timesteps.
        stream: name of the stream.

    Returns:
        Timesteps (B,), int64, uniform in [0, T), and standard normal noise (B, *shape), float32; both on the CPU.

    Raises:
        ValueError: ``num_train_timesteps`` is below 1.
    """
    if num_train_timesteps < 1:
        raise ValueError(f"num_train_timesteps={num_train_timesteps}: it must be at least 1.")
    indices = positions.tolist() if isinstance(positions, Tensor) else list(positions)
    timesteps = torch.empty(len(indices), dtype=torch.int64)
    noise = torch.empty(len(indices), *shape, dtype=torch.float32)
    # The common prefix is hashed once and one generator is seeded for each sample: the same draws as with
    # ``generator(stream, seed, step, index)``, at half the cost.
    prefix = _hash((stream, seed, step))
    source = torch.Generator()
    for index, t, eps in zip(indices, timesteps.unbind(), noise.unbind(), strict=True):
        hashed = prefix.copy()
        hashed.update(_encode(index))
        source.manual_seed(_seed_of(hashed))
        t.random_(0, num_train_timesteps, generator=source)
        eps.normal_(generator=source)
    return timesteps, noise


def noise_of_steps(
    stream: str, seed: int, images: Iterable[int], steps: Iterable[int], shape: Sequence[int]
) -> Tensor:
    """Draw the noise of pairs of an image and a timestep, each from its own key: (B, *shape), float32, on the CPU.

    ``shape`` is that of one image.
    """
    pairs = zip(images, steps, strict=True)
    return torch.stack([torch.randn(*shape, generator=generator(stream, seed, *pair)) for pair in pairs])


def uniform_draws(seed: int, step: int, positions: Tensor | Iterable[int], stream: str = TIMESTEP) -> Tensor:
    """Draw a number in [0, 1) for each sample from its own key: (B,), float64, on the CPU.

    ``positions`` are those of the samples in the effective batch, (B,).
    """
    indices = positions.tolist() if isinstance(positions, Tensor) else list(positions)
    values = torch.empty(len(indices), dtype=torch.float64)
    for index, value in zip(indices, values.unbind(), strict=True):
        value.uniform_(generator=generator(stream, seed, step, index))
    return values


def _hash(parts: Iterable[str | SupportsIndex]) -> hashlib.blake2b:
    """The hash of the first parts of a key."""
    return hashlib.blake2b(b"".join(map(_encode, parts)), digest_size=4)


def _seed_of(hashed: hashlib.blake2b) -> int:
    """The integer of a hash that seeds a generator."""
    return int.from_bytes(hashed.digest(), "little")


def _encode(part: str | SupportsIndex) -> bytes:
    """Encode one part as its kind, its length and its text."""
    if isinstance(part, str):
        text = part.encode("utf-8", "surrogateescape")  # file names need not be valid unicode
        return b"s%d:" % len(text) + text
    try:
        number = operator.index(part)
    except TypeError:
        raise ValueError(f"{part!r} cannot be part of a key: use strings and integers.") from None
    text = b"%d" % number
    return b"i%d:" % len(text) + text

"""Posteriors of images under a first stage: computed image by image, or read from a store of them.

The last bits of a convolution depend on the batch size, and on a CPU on the number of threads (measured: up to 1.6e-6
in the mean of a small autoencoder). A latent must depend on neither: a stored posterior equals the one that training
computes, and a run on two processes equals the run on one. Hence one image per forward pass, on one CPU thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers_ddpm_ext.models.first_stage import FirstStage

T = TypeVar("T")


class Posterior(NamedTuple):
    """Distribution of the latents of images before they are scaled.

    Mean and standard deviation are (b, c, h, w), float32; ``std`` is None where the first stage is deterministic.
    """

    mean: Tensor
    std: Tensor | None = None


class PosteriorStore(Protocol):
    """Posteriors of all loaded images, computed before."""

    def load(self, rows: Tensor, symmetries: Tensor) -> Posterior:
        """Return the posteriors of images, on the CPU.

        Args:
            rows: which of the loaded images, (b,), int64.
            symmetries: how the images are flipped and turned (see `augmentation`), (b,), int64.
        """


def encode_posterior(stage: FirstStage, pixels: Tensor) -> Posterior:
    """Encode images one by one: the same posterior for an image in any batch.

    Args:
        stage: whose autoencoder is on the device of the pixels.
        pixels: (b, C, H, W), float32 in [-1, 1].
    """
    posteriors = one_by_one(stage.posterior, pixels)
    means, stds = zip(*posteriors, strict=True)
    return Posterior(torch.cat(means), None if stds[0] is None else torch.cat(stds))


def one_by_one(function: Callable[..., T], images: Tensor, *more: Sequence[Any]) -> list[T]:
    """Results of a function for each image (1, C, H, W) of a batch, in order; on a CPU on one thread per image.

    Args:
        function: of one image and its element of each of ``more``, safe to call from several threads.
        images: (b, C, H, W), b at least 1.
        *more: each of length b.
    """
    # Copies, because the result of a matrix product may depend on the alignment of its input.
    singles = [image.clone(memory_format=torch.contiguous_format) for image in images.split(1)]
    threads = torch.get_num_threads()
    if images.device.type != "cpu" or threads == 1:
        return list(map(function, singles, *more))
    # A thread's number of OpenMP threads is its own, but torch also keeps it as the default of new threads.
    pool = ThreadPoolExecutor(min(threads, len(singles)), initializer=torch.set_num_threads, initargs=(1,))
    try:
        with pool:
            return list(pool.map(function, singles, *more))
    finally:
        torch.set_num_threads(threads)

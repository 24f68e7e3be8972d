"""Which images are held out for validation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from diffusers_ddpm_ext.training.data.cached_images import CachedImages
from diffusers_ddpm_ext.training.data.image_store import LoadedImages
from diffusers_ddpm_ext.utils import random_keys as keys


def split_rows(images: LoadedImages, fraction: float, *, by_key: bool) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows to validate on, at least one each if there are two images.

    An image's set follows from its name: for any seed, runs are validated on the same images, and few images change
    sets when others are added.

    Args:
        images: of one source.
        fraction: to hold out.
        by_key: whether the key of a name decides; otherwise the last images are held out.

    Returns:
        Numbers of the images in both sets, ascending, int64.
    """
    count = len(images.names)
    num_held_out = min(count - 1, max(1, round(fraction * count))) if fraction > 0 else 0
    if not by_key or not num_held_out:
        rows = torch.arange(count)
        return rows[: count - num_held_out], rows[count - num_held_out :]
    order = torch.from_numpy(np.argsort(_split_keys(images), kind="stable"))
    return order[: count - num_held_out].sort().values, order[count - num_held_out :].sort().values


def _split_keys(images: LoadedImages) -> np.ndarray:
    """Keys of the images' names, (n,), uint32; a cache has them."""
    if isinstance(images.images, CachedImages):
        return images.images.split_keys
    return np.fromiter((keys.key(keys.SPLIT, name) for name in images.names), np.uint32, len(images.names))

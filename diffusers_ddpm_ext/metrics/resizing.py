"""Resizing of images for a feature extractor, with antialiasing.

Shrinking without it gives other features, and scores that say more about the resizing than about the images
(arXiv 2104.11222). This is Pillow's bicubic filter, on the values themselves: nothing is rounded to 8 bits.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import interpolate

RESIZING = "bicubic, antialiased"


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images, (B, C, H, W) in [-1, 1], to a height and width; both axes on their own, without a crop."""
    if tuple(images.shape[-2:]) == size:
        return images
    resized = interpolate(images.float(), size, mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(-1, 1)


def describe_resizing(size: tuple[int, int]) -> str:
    """How reports name it."""
    return f"resized to {size[0]}x{size[1]} ({RESIZING})"

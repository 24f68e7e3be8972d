"""Values of pixels as they are stored, and as the model takes them: float32 in [-1, 1]."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from diffusers_ddpm_ext.utils.pixel_format import PixelFormat

EXACT_IN_FLOAT32 = (torch.uint8, torch.uint16, torch.int16)
SIGNED_VIEWS = {torch.uint16: torch.int16, torch.uint32: torch.int32}
"""torch moves unsigned integers of these widths, but neither flips nor rotates them."""


def full_range(dtype: str, suffix: str = ".png") -> PixelFormat:
    """The format of pixels of a NumPy dtype without a stated range: all its integers, or floats in [0, 1]."""
    if np.dtype(dtype).kind == "f":
        return PixelFormat(dtype, 0, 1, ".npy" if suffix == ".png" else suffix)
    limits = np.iinfo(dtype)
    is_png = dtype in ("uint8", "uint16")
    return PixelFormat(dtype, int(limits.min), int(limits.max), suffix if is_png or suffix != ".png" else ".npy")


def stored_dtype(pixel_format: PixelFormat) -> torch.dtype:
    """The dtype of stored pixels."""
    dtype: torch.dtype = getattr(torch, pixel_format.dtype)
    return dtype


def movable(values: Tensor) -> Tensor:
    """A view of stored pixels that torch can flip and rotate."""
    return values.view(SIGNED_VIEWS.get(values.dtype, values.dtype))


def to_pixels(values: Tensor, pixel_format: PixelFormat, device: torch.device | None = None) -> Tensor:
    """Map stored pixels to float32 in [-1, 1], both ends exact.

    Integers of up to 16 bits are moved to the device first and mapped there in float32, which is exact up to the
    division. Others are mapped before, in float64.

    Args:
        values: of the format's dtype, any shape.
        pixel_format: of the values.
        device: of the result; None leaves it where the values are.
    """
    target = values.device if device is None else device
    if values.dtype in EXACT_IN_FLOAT32:
        low, high = pixel_format.low, pixel_format.high
        moved = values.to(target, non_blocking=True).to(torch.float32)
        # Half integers, which float32 holds exactly: only the division rounds.
        return moved.sub_((low + high) / 2).div_((high - low) / 2)
    return torch.from_numpy(pixel_format.to_model(values.cpu().numpy())).to(target, non_blocking=True)

"""Quantiles of rows of any length: ``torch.quantile`` refuses tensors of more than 2^24 values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_VALUES = 2**24


def row_quantiles(values: Tensor, share: float) -> Tensor:
    """The quantile of each row, interpolated linearly; NaN for a row with NaN.

    Args:
        values: (B, N), floating, N of at least 1 unless B is 0.
        share: of the values that are below, in [0, 1].

    Returns:
        (B, 1).
    """
    if len(values) == 0:
        return values.new_empty((0, 1))
    if values.numel() <= MAX_VALUES:
        return torch.quantile(values, share, dim=1, keepdim=True)
    return torch.cat([_row_quantile(row, share) for row in values]).reshape(-1, 1)


def _row_quantile(row: Tensor, share: float) -> Tensor:
    """The quantile of one row (N,), as (1,)."""
    if row.numel() <= MAX_VALUES:
        return torch.quantile(row, share, dim=0, keepdim=True)
    place, ordered = share * (row.numel() - 1), row.sort().values  # kthvalue takes hours for some rows
    low, high = (ordered[end] for end in (math.floor(place), math.ceil(place)))
    quantile = torch.lerp(low, high, place - math.floor(place))
    return torch.where(row.isnan().any(), math.nan, quantile).reshape(1)

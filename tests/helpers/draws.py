"""Random tensors and generators that are the same in every test."""

from __future__ import annotations

import torch
from torch import Tensor

F64 = torch.float64


def draws(*shape: int, count: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, dtype=F64).to(dtype) for _ in range(count))


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)

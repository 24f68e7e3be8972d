"""What the processes of a data-parallel run send each other in a step, counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_ddpm_ext.training.distributed import keep_own_buffers


class Collectives(TorchDispatchMode):
    """Bytes of the collective calls, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if name.startswith("c10d."):
            size = sum(tensor.nbytes for tensor in args[0])
            self.bytes[name.split(".")[1]] = self.bytes.get(name.split(".")[1], 0) + size
        return function(*args, **(kwargs or {}))


class WithTable(nn.Module):
    """Twelve parameters, and a table of numbers that every process computes."""

    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("table", torch.zeros(1000, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(x)
        return result


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def bytes_of_a_step(task: nn.Module) -> dict[str, int]:
    task(torch.ones(2, 3)).sum().backward()  # the first step also settles the buckets
    with Collectives() as collectives:
        task(torch.ones(2, 3)).sum().backward()
    return collectives.bytes


def test_a_step_sends_the_gradients_and_no_tables(group):
    """Four bytes per parameter are reduced; by default DDP would broadcast the table, too."""
    own = DistributedDataParallel(WithTable(), gradient_as_bucket_view=True)
    keep_own_buffers(own)
    bytes_of_a_step(own)
    assert bytes_of_a_step(own) == {"allreduce_": 4 * 12}
    stock = DistributedDataParallel(WithTable())
    bytes_of_a_step(stock)
    assert bytes_of_a_step(stock) == {"allreduce_": 4 * 12, "broadcast_": 4 * 10_000}

"""Sharing of an evaluation's batches among processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """The processes that share an evaluation.

    Attributes:
        rank: of this process.
        world_size: number of processes.
        device: of the network.
        sum_over_ranks: sums a tensor over the processes. Collective call: every process must make it.
        stop_requested: whether this process should stop; the rest of an evaluation is then skipped, and its result
            is invalid.
        lockstep: whether every process must take part in each forward pass, as with a sharded network;
            ``stop_requested`` must then return the same in all of them.
    """

    rank: int
    world_size: int
    device: torch.device
    sum_over_ranks: Callable[[Tensor], Tensor]
    stop_requested: Callable[[], bool] = lambda: False
    lockstep: bool = False

    def batches(self, count: int) -> Iterator[tuple[int, bool]]:
        """The batches of this process, every ``world_size``-th of ``count``, and whether the result of each counts.

        A process that must take part without a batch left repeats batch 0, whose result does not count.
        """
        for first in range(0, count, self.world_size):
            index = first + self.rank
            if self.stop_requested() or not (index < count or self.lockstep):
                return
            yield (index, True) if index < count else (0, False)

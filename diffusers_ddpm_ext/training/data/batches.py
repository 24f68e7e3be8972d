"""The one endless stream of batches that every split of the work cuts in the same way.

The stream is defined by its numbers: sample ``s`` of the run (``s = step * effective batch + position``) lies in
epoch ``s // n`` at place ``s % n`` of that epoch's shuffle. Epochs follow each other without a gap, so that an
effective batch may hold the end of one and the beginning of the next, every sample comes once an epoch, and a run can
start anywhere.
"""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffusers_ddpm_ext.errors import RunError, warn
from diffusers_ddpm_ext.models.conditioning import Conditions
from diffusers_ddpm_ext.training.data.image_set import ImageSet, unit_range
from diffusers_ddpm_ext.utils import random_keys as keys

NONE = Conditions()
DEATHS_WITHOUT_A_BATCH = 3
"""So many data workers in a row may die before one of them has handed on a batch."""


@dataclass(frozen=True)
class Batch:
    """What one forward pass trains on.

    Attributes:
        pixels: images (b, C, H, W), float32 in [-1, 1], on the device that was asked for.
        positions: their places in the effective batch, (b,), int64, on the CPU.
        indices: which images of the set they are, (b,), int64, on the CPU.
        step: the optimizer step that they belong to.
        conditions: what they are conditioned on, on the same device as the pixels.
    """

    pixels: Tensor
    positions: Tensor
    indices: Tensor
    step: int
    conditions: Conditions = NONE


class Share(NamedTuple):
    """A micro-batch on its way out of a data worker.

    Attributes:
        levels: (b, C, H, W), uint8, or uint16 of 16-bit images.
        positions: as in `Batch`.
        indices: as in `Batch`.
        step: as in `Batch`.
        micro: number of the micro-batch in its step.
        replaced: one sentence for each image that became unreadable and whose place another one took.
        conditions: as in `Batch`, on the CPU.
    """

    levels: Tensor
    positions: Tensor
    indices: Tensor
    step: int
    micro: int
    replaced: list[str]
    conditions: Conditions = NONE


@dataclass(frozen=True)
class MicroBatches(Dataset[Share | RunError]):
    """One rank's share: (step, micro-batch) -> what is trained on then.

    An image that became unreadable is handed on as the error it is: raised in a worker it would arrive as a page of
    traceback.
    """

    images: ImageSet
    seed: int
    batch: int
    accumulation: int
    rank: int
    world: int
    _orders: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def __getitem__(self, request: tuple[int, int]) -> Share | RunError:
        step, micro = request
        first = (micro * self.world + self.rank) * self.batch
        positions = torch.arange(first, first + self.batch)
        samples = step * self.batch * self.accumulation * self.world + positions
        epochs, places = samples // len(self.images), samples % len(self.images)
        indices = torch.empty_like(samples)
        for epoch in epochs.unique().tolist():
            here = epochs == epoch
            indices[here] = self.order(epoch)[places[here]]
        replaced: list[str] = []
        try:
            levels = self.images.level_values(indices, self.seed, epochs.tolist(), replaced)
            conditions = self.images.conditions(indices, self.seed, epochs.tolist())
        except RunError as error:
            return error
        if self.images.dropout is not None:
            conditions = self.images.dropout.apply(conditions, self.seed, step, positions)
        return Share(levels, positions, indices, step, micro, replaced, conditions)

    def order(self, epoch: int) -> Tensor:
        """Return the shuffle of an epoch, (n,): a function of the seed and the epoch alone."""
        if epoch not in self._orders:
            if len(self._orders) > 1:
                self._orders.clear()  # a batch seldom holds more than two epochs
            shuffled = torch.randperm(len(self.images), generator=keys.generator(keys.ORDER, self.seed, epoch))
            self._orders[epoch] = shuffled
        return self._orders[epoch]


def batch_stream(
    images: ImageSet,
    seed: int,
    batch: int,
    accumulation: int = 1,
    rank: int = 0,
    world: int = 1,
    start_step: int = 0,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Return this rank's micro-batches, ``accumulation`` to an optimizer step, without end.

    The effective batch of a step holds the same samples at the same positions however it is split: micro-batch ``m``
    of rank ``r`` holds the positions from ``(m * world + r) * batch`` on.

    Args:
        images: what to train on; fewer than an effective batch are repeated in it, an epoch at a time.
        seed: the run's seed.
        batch: images a micro-batch.
        accumulation: micro-batches an optimizer step.
        rank: this process.
        world: number of processes.
        start_step: first optimizer step.
        num_workers: processes that fetch images; the batches are the same for any number.
        device: where the pixels go.

    Raises:
        ValueError: a count is below 1, the rank is not in [0, world), or there is no image.
        RunError: (while iterating) an image that could be read before the run cannot any more.
    """
    if min(batch, accumulation, world) < 1 or not 0 <= rank < world or start_step < 0 or num_workers < 0:
        raise ValueError(
            f"a stream needs batch ({batch}), accumulation ({accumulation}) and world ({world}) of at least 1, rank"
            f" ({rank}) in [0, world), start_step ({start_step}) and num_workers ({num_workers}) of at least 0."
        )
    if len(images) == 0:
        raise ValueError("a stream needs at least one image.")
    target = torch.device(device)
    shares = MicroBatches(images, seed, batch, accumulation, rank, world)
    return _to_device(
        _fetch(shares, _Requests(start_step, 0, accumulation), num_workers, target), images.levels, target
    )


@dataclass(frozen=True)
class _Requests:
    """(step, micro-batch), counted up without end."""

    start_step: int
    start_micro: int
    accumulation: int

    def __iter__(self) -> Iterator[tuple[int, int]]:
        first = self.start_step * self.accumulation + self.start_micro
        return (divmod(number, self.accumulation) for number in itertools.count(first))


def _fetch(shares: MicroBatches, requests: _Requests, num_workers: int, target: torch.device) -> Iterator[Share]:
    """Let workers read ahead; where one dies, which costs nothing but time, others begin at the next micro-batch."""
    deaths = 0
    while True:
        try:
            with _deaths_are_looked_for():
                loader = iter(_loader(shares, requests, num_workers, target))
            for share in loader:
                if isinstance(share, RunError):
                    raise share
                deaths = 0
                requests = replace(requests, start_step=share.step, start_micro=share.micro + 1)
                yield share
        except (RuntimeError, OSError, EOFError) as error:
            # Batches that a dead worker had handed on already cannot be fetched from it any more.
            if num_workers == 0 or not ("worker (pid" in str(error) or isinstance(error, ConnectionError | EOFError)):
                raise
            deaths += 1
            what = f"a worker died ({' '.join(str(error).split()) or type(error).__name__})"
            if deaths >= DEATHS_WITHOUT_A_BATCH:
                raise RunError(
                    f"--dataloader_num_workers {num_workers}: {what}, {deaths} times without a batch; use fewer, or 0"
                ) from None
            warn(f"--dataloader_num_workers: {what}; new ones go on where they were")


def _loader(
    shares: MicroBatches, requests: _Requests, num_workers: int, target: torch.device
) -> DataLoader[Share | RunError]:
    return DataLoader(
        shares,
        sampler=requests,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=target.type == "cuda",
        generator=torch.Generator(),  # or else the loader takes a number from the global generator
    )


@contextmanager
def _deaths_are_looked_for() -> Iterator[None]:
    """Keep torch from raising a worker's death wherever the main thread happens to be, in mid-step too.

    It sets a handler of SIGCHLD when the first workers start; without it the death is found, seconds later, by whoever
    waits for the next batch.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)


def _to_device(shares: Iterator[Share], levels: int, device: torch.device) -> Iterator[Batch]:
    """Move bytes, not floats, to the device, and make floats of them there."""
    told: set[str] = set()
    for share in shares:
        for sentence in share.replaced:
            if sentence not in told:
                told.add(sentence)
                warn(sentence)
        pixels = unit_range(share.levels.to(device, non_blocking=True), levels)
        yield Batch(pixels, share.positions, share.indices, share.step, share.conditions.to(device))

"""Endless stream of training batches, the same for every split into processes and micro-batches.

Sample ``s`` of the run (``s = step * effective batch + position``) is in epoch ``s // n`` at place ``s % n`` of that
epoch's shuffle. Epochs follow each other without a gap: an effective batch may contain the end of one and the start of
the next, every sample occurs once per epoch, and a run can start at any step. In a set with weighted draws
(`weighted_turns`) an epoch has as many samples, of which some are the same image.
"""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffusers_ddpm_ext.errors import RunError, warn
from diffusers_ddpm_ext.models.conditioning import Conditions
from diffusers_ddpm_ext.training.data.image_set import ImageSet, Levels
from diffusers_ddpm_ext.training.data.pixel_values import to_pixels
from diffusers_ddpm_ext.training.data.posterior import Posterior
from diffusers_ddpm_ext.utils import random_keys as keys

NO_CONDITIONS = Conditions()
NO_LEVELS = Levels(torch.empty(0), [])
MAX_WORKER_FAILURES = 3
"""Data workers that may fail one after the other before one of them has returned a batch."""


@dataclass(frozen=True)
class Batch:
    """Input of one forward pass.

    Attributes:
        pixels: images (b, C, H, W), float32 in [-1, 1], on the requested device; empty where posteriors are stored.
        positions: in the effective batch, (b,), int64, on the CPU.
        indices: of the images in the set, (b,), int64, on the CPU.
        step: the batch's optimizer step.
        conditions: on the same device as the pixels.
        posterior: of the images under the first stage, on the CPU, where it is stored; None otherwise.
        concat_is_encoded: whether the concatenated inputs are stored ones, as the network takes them.
        lanes: of a stream, where this process' lanes are after the step, by number; in the last micro-batch of it.
    """

    pixels: Tensor
    positions: Tensor
    indices: Tensor
    step: int
    conditions: Conditions = NO_CONDITIONS
    posterior: Posterior | None = None
    concat_is_encoded: bool = False
    lanes: Mapping[int, Sequence[int]] | None = None


class WorkerBatch(NamedTuple):
    """A micro-batch as a data worker returns it: a `Batch` on the CPU, with `Levels` instead of pixels.

    Attribute ``micro`` is its number in the step. If images of a stream are unreadable, ``failures`` has their places
    in the micro-batch and the reasons, and there are no pixels.
    """

    levels: Tensor
    positions: Tensor
    indices: Tensor
    step: int
    micro: int
    replacements: list[str]
    conditions: Conditions = NO_CONDITIONS
    posterior: Posterior | None = None
    failures: Sequence[tuple[int, str]] = ()


@dataclass(frozen=True)
class MicroBatches(Dataset[WorkerBatch | RunError]):
    """Micro-batches of one rank, indexed by (step, micro-batch).

    The error of an image that became unreadable is returned: raised in a worker it would arrive with a page of
    traceback.
    """

    images: ImageSet
    seed: int
    batch: int
    accumulation: int
    rank: int
    world: int
    _orders: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def __getitem__(self, request: tuple[int, int]) -> WorkerBatch | RunError:
        step, micro = request
        first = (micro * self.world + self.rank) * self.batch
        positions = torch.arange(first, first + self.batch)
        samples = positions.numpy() + step * self.batch * self.accumulation * self.world
        epochs, places = np.divmod(samples, len(self.images))
        drawn = np.empty((2, self.batch), np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            in_epoch = epochs == epoch
            drawn[:, in_epoch] = [part.numpy()[places[in_epoch]] for part in self.order(epoch)]
        indices, passes = torch.from_numpy(drawn[0]), drawn[1].tolist()
        try:
            levels, posterior = NO_LEVELS, None
            if self.images.posteriors is None:
                levels = self.images.load_levels(indices, self.seed, passes)
            else:
                posterior = self.images.load_posteriors(indices, self.seed, passes)
            conditions = self.images.conditions(indices, self.seed, passes)
        except RunError as error:
            return error
        if self.images.dropout is not None:
            conditions = self.images.dropout.apply(conditions, self.seed, step, positions)
        return WorkerBatch(levels.values, positions, indices, step, micro, levels.replacements, conditions, posterior)

    def order(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the images of an epoch, (n,), and the pass of each, (n,), which determines its crop and flip.

        Both are functions of the seed and the epoch alone. A pass is the epoch, unless an image may occur twice in it.
        """
        if epoch not in self._orders:
            if len(self._orders) > 1:
                self._orders.clear()  # a batch seldom contains more than two epochs
            self._orders[epoch] = self._shuffle(epoch)
        return self._orders[epoch]

    def _shuffle(self, epoch: int) -> tuple[Tensor, Tensor]:
        if self.images.draws is not None:
            return self.images.draws.order(self.seed, epoch)
        count = len(self.images)
        shuffle = torch.randperm(count, generator=keys.generator(keys.ORDER, self.seed, epoch))
        return shuffle, torch.tensor(epoch).expand(count)


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
    """Return this rank's micro-batches, ``accumulation`` per optimizer step, without end.

    The effective batch of a step contains the same samples at the same positions for every split: micro-batch ``m``
    of rank ``r`` has the ``batch`` positions from ``(m * world + r) * batch``.

    Args:
        images: to train on; if there are fewer than an effective batch, it contains several epochs.
        seed: of the run.
        batch: images per micro-batch.
        accumulation: micro-batches per optimizer step.
        rank: of this process.
        world: number of processes.
        start_step: first optimizer step.
        num_workers: processes that load images; the batches do not depend on it.
        device: of the pixels and conditions.

    Raises:
        ValueError: a count is below 1, the rank is not in [0, world), or the set is empty.
        RunError: (while iterating) an image that was readable before the run no longer is.
    """
    if min(batch, accumulation, world) < 1 or not 0 <= rank < world or start_step < 0 or num_workers < 0:
        raise ValueError(
            f"a stream needs batch ({batch}), accumulation ({accumulation}) and world ({world}) of at least 1, rank"
            f" ({rank}) in [0, world), start_step ({start_step}) and num_workers ({num_workers}) of at least 0."
        )
    if len(images) == 0:
        raise ValueError("a stream needs at least one image.")
    target = torch.device(device)
    micro_batches = MicroBatches(images, seed, batch, accumulation, rank, world)

    def requests(number: int) -> Iterator[tuple[int, int]]:
        return (divmod(each, accumulation) for each in itertools.count(number))

    first = start_step * accumulation
    return to_device(fetch(micro_batches, requests, first, accumulation, num_workers, target), images, target)


def fetch(
    micro_batches: Dataset[WorkerBatch | RunError],
    requests: Callable[[int], Iterator[Any]],
    first: int,
    accumulation: int,
    num_workers: int,
    target: torch.device,
) -> Iterator[WorkerBatch]:
    """Yield micro-batches that workers prefetch; if a worker dies, start new workers at the next micro-batch.

    Args:
        micro_batches: indexed by what ``requests`` yields.
        requests: yields an index for each micro-batch from one of this number on, counted through the run.
        first: number of the first micro-batch.
        accumulation: micro-batches per optimizer step.
        num_workers: processes that load images; 0: this one.
        target: device that the micro-batches are for.

    Raises:
        RunError: a micro-batch could not be loaded, or workers die without having loaded one.
    """
    failures, following = 0, first
    while True:
        try:
            with _sigchld_handler_restored():
                loader = iter(_loader(micro_batches, requests(following), num_workers, target))
            for item in loader:
                if isinstance(item, RunError):
                    raise item
                failures = 0
                following = item.step * accumulation + item.micro + 1
                yield item
        except (RuntimeError, OSError, EOFError) as error:
            # Batches that a dead worker had already returned can no longer be received from it.
            if num_workers == 0 or not ("worker (pid" in str(error) or isinstance(error, ConnectionError | EOFError)):
                raise
            failures += 1
            reason = f"a worker died ({' '.join(str(error).split()) or type(error).__name__})"
            if failures >= MAX_WORKER_FAILURES:
                raise RunError(
                    f"--dataloader_num_workers {num_workers}: {reason}, {failures} times without a batch; use fewer,"
                    " or 0"
                ) from None
            warn(f"--dataloader_num_workers: {reason}; new ones continue at the next batch")


def _unchanged(item: Any) -> Any:
    """A batch as it is; the loader would walk through it for arrays to convert."""
    return item


def _loader(
    micro_batches: Dataset[WorkerBatch | RunError], requests: Iterator[Any], num_workers: int, target: torch.device
) -> DataLoader[WorkerBatch | RunError]:
    return DataLoader(
        micro_batches,
        sampler=requests,
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=num_workers,
        pin_memory=target.type == "cuda",
        generator=torch.Generator(),  # otherwise the loader draws from the global generator
    )


@contextmanager
def _sigchld_handler_restored() -> Iterator[None]:
    """Undo torch's SIGCHLD handler, which raises the death of a worker anywhere in the main thread.

    torch installs it when the first workers start. Without it the death is raised, seconds later, when the next batch
    is requested.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)


def to_device(worker_batches: Iterator[WorkerBatch], images: ImageSet, device: torch.device) -> Iterator[Batch]:
    """Transfer integers, not floats, to the device and convert them there; print each replacement once."""
    printed: set[str] = set()
    is_encoded = images.concat_latents is not None
    for item in worker_batches:
        for sentence in item.replacements:
            if sentence not in printed:
                printed.add(sentence)
                warn(sentence)
        pixels = to_pixels(item.levels, images.images.pixel_format, device)
        conditions = item.conditions.to(device)
        yield Batch(pixels, item.positions, item.indices, item.step, conditions, item.posterior, is_encoded)

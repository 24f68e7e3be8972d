"""Endless stream of training batches from rows that are read in order.

The main process reads the rows, undecoded, and knows where its lanes are; data workers only decode. So the batches do
not depend on the number of workers, and neither on how the effective batch is split: a position gets the row that its
lane has drawn for it, in every process that needs the lane.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from diffusers_ddpm_ext.errors import RunError
from diffusers_ddpm_ext.training.data.array_images import UnreadableImage
from diffusers_ddpm_ext.training.data.batches import NO_LEVELS, Batch, WorkerBatch, fetch, to_device
from diffusers_ddpm_ext.training.data.decoding import DecodedImage
from diffusers_ddpm_ext.training.data.streaming.lanes import Draw, Lane, LanePlan, LanePosition
from diffusers_ddpm_ext.training.data.streaming.row_images import RowDecoder, row_name
from diffusers_ddpm_ext.training.data.streaming.rows import Row, RowStream
from diffusers_ddpm_ext.training.data.weighted_turns import WeightedTurns
from diffusers_ddpm_ext.utils import random_keys as keys

MAX_READERS = 4
"""Threads that read blocks."""
TURNS = 1000
"""Samples in which the sources of a mixture have their shares as exactly as whole numbers can."""


@dataclass(frozen=True)
class BatchLayout:
    """Split of the effective batch.

    Attributes:
        batch: samples per micro-batch.
        accumulation: micro-batches per optimizer step.
        rank: of this process.
        world: number of processes.
    """

    batch: int
    accumulation: int = 1
    rank: int = 0
    world: int = 1

    @property
    def effective_batch(self) -> int:
        """Samples per optimizer step."""
        return self.batch * self.accumulation * self.world

    def rank_of(self, position: int) -> int:
        """The process that has a position of the effective batch."""
        return position // self.batch % self.world

    def lanes(self, plan: LanePlan, rank: int) -> set[int]:
        """The lanes that a process reads."""
        positions = (each for each in range(self.effective_batch) if self.rank_of(each) == rank)
        return {lane for each in positions for lane in plan.lanes_of(each, self.effective_batch)}


class RowRequest(NamedTuple):
    """The rows of a micro-batch, number ``micro`` of its step, and their positions in the effective batch."""

    step: int
    micro: int
    rows: Sequence[Row]
    positions: Sequence[int]


@dataclass(frozen=True)
class StreamedMicroBatches(Dataset[WorkerBatch | RunError]):
    """Micro-batches of rows, decoded when they are requested."""

    decoder: RowDecoder
    seed: int
    replaces_bad: bool

    def __getitem__(self, request: RowRequest) -> WorkerBatch | RunError:
        try:
            decoded = [self.decoder.decode(row) for row in request.rows]
            if failures := self.decoder.failures(decoded):
                if not self.replaces_bad:
                    place, reason = failures[0]
                    return unreadable(self.decoder, request.rows[place], reason)
                return WorkerBatch(
                    NO_LEVELS.values, torch.tensor(request.positions), torch.empty(0), request.step, request.micro, [],
                    failures=failures,
                )  # fmt: skip
            return self.batch(request, [image for image in decoded if isinstance(image, DecodedImage)])
        except RunError as error:  # raised in a worker it would arrive with a page of traceback
            return error

    def batch(self, request: RowRequest, decoded: Sequence[DecodedImage]) -> WorkerBatch:
        """The micro-batch of decoded rows."""
        step, positions = request.step, torch.tensor(request.positions)
        images = self.decoder.image_set(request.rows, decoded, positions)
        steps = [step] * len(positions)
        levels = images.load_levels(positions, self.seed, steps)
        conditions = images.conditions(positions, self.seed, steps)
        if images.dropout is not None:
            conditions = images.dropout.apply(conditions, self.seed, step, positions)
        indices = torch.tensor([row.number for row in request.rows])
        return WorkerBatch(levels.values, positions, indices, step, request.micro, levels.replacements, conditions)


def unreadable(decoder: RowDecoder, row: Row, reason: str) -> RunError:
    """The error for an image that cannot be read."""
    name = row_name(decoder.opened, row)
    return RunError(
        f"{name} of {decoder.opened.option} cannot be read: {reason}; repair it, or resume with --skip_bad_images,"
        " which trains on another image in its place"
    )


class StreamReader:
    """Reads the rows of this process' micro-batches.

    Attributes:
        in_flight: draws of the micro-batches that were requested and have not arrived, by step and micro-batch; and
            the positions of the lanes after the step, for its last micro-batch.
    """

    def __init__(
        self, rows: RowStream, plan: LanePlan, layout: BatchLayout, seed: int, positions: Mapping[int, LanePosition]
    ) -> None:
        self._plan, self._layout, self._seed = plan, layout, seed
        self._turns = WeightedTurns(plan.weights, TURNS) if plan.weights else None
        self._groups: tuple[int, list[int]] = (-1, [])
        self._executor = ThreadPoolExecutor(MAX_READERS, thread_name_prefix="stream")
        self._lanes = {}
        for number in sorted(layout.lanes(plan, layout.rank)):
            source, own = plan.locate(number)
            own_seed = seed if source == 0 else keys.key(keys.MIXTURE_SOURCE, seed, source)
            own_plan, position = (plan.sources or (plan,))[source], positions.get(number, LanePosition())
            self._lanes[number] = Lane(rows.sources[source], own_plan, own_seed, own, position, self._executor)
        self.in_flight: dict[tuple[int, int], tuple[list[Draw], dict[int, LanePosition] | None]] = {}
        self._next_step: int | None = None

    def close(self) -> None:
        """Stop reading."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def requests(self, number: int) -> Iterator[RowRequest]:
        """Yield a request for each micro-batch from this number on; those in flight are repeated."""
        step, micro = divmod(number, self._layout.accumulation)
        lost = sorted(key for key in self.in_flight if key >= (step, micro))
        for key in lost:
            yield self._request(*key)
        if self._next_step is None:
            self._next_step = step
        while True:
            step = self._next_step
            self._next_step = step + 1
            self._draw_step(step)
            for micro in range(self._layout.accumulation):
                yield self._request(step, micro)

    def _draw_step(self, step: int) -> None:
        """Take a row for each position of a step that this process' lanes fill, and keep those of its own."""
        layout = self._layout
        draws: list[list[Draw]] = [[] for _ in range(layout.accumulation)]
        for position in range(layout.effective_batch):
            source = self._source(step * layout.effective_batch + position)
            lane = self._lanes.get(self._plan.lanes_of(position, layout.effective_batch)[source])
            if lane is not None:
                draw = lane.draw()
                if layout.rank_of(position) == layout.rank:
                    draws[position // (layout.batch * layout.world)].append(draw)
        after = {number: lane.position for number, lane in self._lanes.items()}
        for micro, taken in enumerate(draws):
            self.in_flight[step, micro] = taken, after if micro == layout.accumulation - 1 else None

    def _source(self, sample: int) -> int:
        """The source of a sample of the run."""
        if self._turns is None:
            return 0
        block, place = divmod(sample, TURNS)
        if self._groups[0] != block:
            self._groups = block, self._turns.groups_and_numbers(self._seed, block)[0].tolist()
        return self._groups[1][place]

    def _request(self, step: int, micro: int) -> RowRequest:
        first = (micro * self._layout.world + self._layout.rank) * self._layout.batch
        draws, _ = self.in_flight[step, micro]
        return RowRequest(step, micro, [draw.row for draw in draws], range(first, first + self._layout.batch))


def stream_batches(
    decoder: RowDecoder,
    plan: LanePlan,
    layout: BatchLayout,
    seed: int,
    *,
    start_step: int = 0,
    lanes: Mapping[int, LanePosition] | None = None,
    replaces_bad: bool = False,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Yield this rank's micro-batches, ``accumulation`` per optimizer step, without end.

    Args:
        decoder: of the rows.
        plan: of the stream, for this effective batch.
        layout: split of the effective batch.
        seed: of the run.
        start_step: first optimizer step.
        lanes: where the lanes are before it, by number; at their beginning by default.
        replaces_bad: replace an unreadable image by the next readable one of its block.
        num_workers: processes that decode images; the batches do not depend on it.
        device: of the pixels and conditions.

    Raises:
        RunError: (while iterating) rows cannot be read, an image is unreadable, or of another kind than the others.
    """
    target = torch.device(device)
    reader = StreamReader(decoder.opened.rows, plan, layout, seed, lanes or {})
    micro_batches = StreamedMicroBatches(decoder, seed, replaces_bad)
    first = start_step * layout.accumulation
    positions: list[dict[int, LanePosition] | None] = []

    def arrived() -> Iterator[WorkerBatch]:
        for item in fetch(micro_batches, reader.requests, first, layout.accumulation, num_workers, target):
            draws, after = reader.in_flight.pop((item.step, item.micro))
            positions.append(after)
            yield with_replacements(micro_batches, item, draws) if item.failures else item

    try:
        for batch in to_device(arrived(), decoder.sample, target):
            yield replace(batch, lanes=positions.pop())
    finally:
        reader.close()


def with_replacements(micro_batches: StreamedMicroBatches, item: WorkerBatch, draws: Sequence[Draw]) -> WorkerBatch:
    """A micro-batch with another row of the same block in place of each unreadable one.

    Raises:
        RunError: no image of a block can be read.
    """
    decoder, rows, sentences = micro_batches.decoder, [draw.row for draw in draws], []
    for place, reason in item.failures:
        row = next(
            (row for row in draws[place].replacements() if not isinstance(decoder.decode(row), UnreadableImage)), None
        )
        if row is None:
            raise RunError(f"{unreadable(decoder, rows[place], reason)}; and no other image of its block can be read")
        name = row_name(decoder.opened, rows[place])
        sentences.append(
            f"{name} of {decoder.opened.option} cannot be read: {reason}; {row_name(decoder.opened, row)} takes its"
            " place (--skip_bad_images)"
        )
        rows[place] = row
    decoded = [image for image in map(decoder.decode, rows) if isinstance(image, DecodedImage)]
    request = RowRequest(item.step, item.micro, rows, item.positions.tolist())
    batch = micro_batches.batch(request, decoded)
    return batch._replace(replacements=[*sentences, *batch.replacements])

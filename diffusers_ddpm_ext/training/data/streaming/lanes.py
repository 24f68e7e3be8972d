"""Order of a stream: lanes, which are the same for every number of processes.

The rows of a source are divided into parts, and the positions of the effective batch into as many runs of neighbors as
there are lanes: a lane fills the positions of its run, in every step. In epoch ``e`` the parts are dealt to the lanes
by the key of (seed, e), to each one out of every group of neighbors, so that all lanes see all regions of the source.
A lane reads its parts in blocks; the order within a block is shuffled by the key of (seed, e, lane, block). So a lane
is a function of the seed, and is resumed anywhere by reading one block again.

Lanes pass through the epochs each at its own pace. Where the number of rows is known, all lanes have the same number
of them in an epoch, up to one; then each row occurs once per epoch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from itertools import islice, repeat
from typing import NamedTuple

import torch

from diffusers_ddpm_ext.errors import RunError, printable
from diffusers_ddpm_ext.training.data.streaming.rows import MAX_PARTS, Row, RowStream
from diffusers_ddpm_ext.utils import random_keys as keys

RETRY_SECONDS = (1.0, 5.0, 25.0)
"""Waits before rows are read again that the network or the disk did not give."""


@dataclass(frozen=True)
class LanePlan:
    """Division of a stream.

    Attributes:
        lanes: that fill the effective batch; a divisor of it.
        parts: of the rows.
        block: rows that a lane shuffles at a time; of a mixture the largest number.
        sources: plans of the sources of a mixture, whose lanes are counted one after the other.
        weights: how often a row of each of them is drawn.
    """

    lanes: int
    parts: int
    block: int
    sources: tuple[LanePlan, ...] = ()
    weights: tuple[float, ...] = ()

    def lanes_of(self, position: int, effective_batch: int) -> list[int]:
        """The lanes that may fill a position of the effective batch: one of each source."""
        lanes, first = [], 0
        for plan in self.sources or (self,):
            lanes.append(first + position * plan.lanes // effective_batch)
            first += plan.lanes
        return lanes

    def locate(self, lane: int) -> tuple[int, int]:
        """The source of a lane, and its number among the lanes of that source."""
        for source, plan in enumerate(self.sources):
            if lane < plan.lanes:
                return source, lane
            lane -= plan.lanes
        return 0, lane


def plan_lanes(rows: RowStream, effective_batch: int, shuffle_buffer: int) -> LanePlan:
    """Divide a stream for an effective batch: as many lanes as its parts allow, which all have as many parts.

    Args:
        rows: of the stream.
        effective_batch: samples per optimizer step, over all processes.
        shuffle_buffer: rows that are shuffled at a time, over all lanes; those of a mixture share it by their weights.
    """
    if rows.weights:
        shares = [max(1, round(shuffle_buffer * weight / sum(rows.weights))) for weight in rows.weights]
        plans = tuple(plan_lanes(*each) for each in zip(rows.sources, repeat(effective_batch), shares, strict=False))
        lanes, parts = sum(plan.lanes for plan in plans), sum(plan.parts for plan in plans)
        return LanePlan(lanes, parts, max(plan.block for plan in plans), plans, rows.weights)
    most = min(rows.num_parts, MAX_PARTS)
    if rows.num_rows is not None:
        lanes = next(count for count in range(most, 0, -1) if effective_batch % count == 0)
        parts = most // lanes * lanes
    else:
        parts = rows.num_parts
        lanes = next(count for count in range(most, 0, -1) if effective_batch % count == 0 and parts % count == 0)
    return LanePlan(lanes, parts, max(1, shuffle_buffer // lanes))


class LanePosition(NamedTuple):
    """Where a lane is between two rows.

    Attributes:
        epoch: of the lane.
        block: number of the present block in the epoch.
        part: place, in the lane's order of parts, of the part that the block begins in.
        row: of that part, that the block begins with.
        taken: rows of the block that were taken.
    """

    epoch: int = 0
    block: int = 0
    part: int = 0
    row: int = 0
    taken: int = 0


@dataclass(frozen=True)
class Block:
    """Rows that are shuffled together.

    Attributes:
        rows: in their shuffled order.
        start: position of the lane before the first of them.
    """

    rows: Sequence[Row]
    start: LanePosition


class Draw(NamedTuple):
    """A row that a lane has drawn: its block, and its place in it."""

    block: Block
    place: int

    @property
    def row(self) -> Row:
        """The row."""
        return self.block.rows[self.place]

    def replacements(self) -> Iterator[Row]:
        """The other rows of the block, from the next one on, for a row that cannot be used."""
        count = len(self.block.rows)
        yield from (self.block.rows[(self.place + offset) % count] for offset in range(1, count))


class Lane:
    """One lane of a stream, which reads the next block while the present one is used.

    Args:
        rows: of the stream.
        plan: of the stream.
        seed: of the run.
        lane: number of this lane.
        position: where it begins.
        executor: reads blocks in the background.
    """

    def __init__(
        self, rows: RowStream, plan: LanePlan, seed: int, lane: int, position: LanePosition, executor: Executor
    ) -> None:
        self._executor = executor
        self._cursor = _Cursor(rows, plan, seed, lane, position._replace(taken=0))
        self._block: Block | None = None
        self._next: Future[Block] = executor.submit(self._cursor.read_block)
        self._start, self._taken = position, position.taken

    @property
    def position(self) -> LanePosition:
        """Where the lane is."""
        return self._start._replace(taken=self._taken)

    def draw(self) -> Draw:
        """Take the next row.

        Raises:
            RunError: the rows cannot be read, or there are none.
        """
        while self._block is None or self._taken >= len(self._block.rows):
            if self._block is not None:
                self._taken = 0
            self._block = self._next.result()
            self._start = self._block.start
            self._next = self._executor.submit(self._cursor.read_block)
        self._taken += 1
        return Draw(self._block, self._taken - 1)


class _Cursor:
    """Reads the blocks of a lane one after the other."""

    def __init__(self, rows: RowStream, plan: LanePlan, seed: int, lane: int, position: LanePosition) -> None:
        self._rows, self._plan, self._seed, self._lane = rows, plan, seed, lane
        self._at = position
        self._order: tuple[int, list[int]] = (position.epoch, self._parts(position.epoch))
        self._open: Iterator[Row] | None = None

    def read_block(self) -> Block:
        """Read the next block, of this epoch or the next one that has rows; a RunError where that is not possible."""
        for _ in range(self._plan.parts + 1):
            start = self._at
            if self._order[0] != start.epoch:
                self._order = start.epoch, self._parts(start.epoch)
            try:
                rows = self._read_with_retries(self._order[1])
            except Exception as error:  # of any library that reads files or the network
                reason = " ".join(f"{type(error).__name__} {error}".split())
                raise RunError(
                    f"the images can no longer be read ({printable(reason, 300)}); resume from the last checkpoint"
                ) from None
            if rows:
                key = (keys.STREAM_BLOCK, self._seed, start.epoch, self._lane, start.block)
                order = torch.randperm(len(rows), generator=keys.generator(*key)).tolist()
                return Block([rows[place] for place in order], start)
            self._at, self._open = LanePosition(start.epoch + 1), None
        raise RunError("no row is left to train on")

    def _read_with_retries(self, parts: list[int]) -> list[Row]:
        """`_read_rows`, again from the beginning of the block after a failure of the network or the disk."""
        for seconds in RETRY_SECONDS:
            try:
                return self._read_rows(parts)
            except (FileNotFoundError, PermissionError):
                raise
            except OSError:
                self._open = None
                time.sleep(seconds)
        return self._read_rows(parts)

    def _read_rows(self, parts: list[int]) -> list[Row]:
        """Up to a block of rows, less at the end of an epoch, none after it; moves on behind them."""
        rows: list[Row] = []
        at = self._at
        while at.part < len(parts) and len(rows) < self._plan.block:
            if self._open is None:
                self._open = self._rows.read(parts[at.part], self._plan.parts, at.row)
            read = list(islice(self._open, self._plan.block - len(rows)))
            rows += read
            at = at._replace(row=at.row + len(read))
            if len(rows) < self._plan.block:
                at, self._open = at._replace(part=at.part + 1, row=0), None
        self._at = at._replace(block=at.block + 1)
        return rows

    def _parts(self, epoch: int) -> list[int]:
        """The parts that this lane reads in an epoch, in their order: one of each group of neighbors."""
        lanes, groups = self._plan.lanes, self._plan.parts // self._plan.lanes
        dealt = torch.rand(groups, lanes, generator=keys.generator(keys.STREAM_PARTS, self._seed, epoch))
        own = dealt.argsort(dim=1, stable=True)[:, self._lane] + lanes * torch.arange(groups)
        order = torch.randperm(groups, generator=keys.generator(keys.STREAM_PARTS, self._seed, epoch, self._lane))
        parts: list[int] = own[order].tolist()
        return parts

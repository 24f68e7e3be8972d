"""Tests of the order of a stream: every row once per epoch, the same for every split, resumed anywhere."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import pytest

from diffusers_ddpm_ext.errors import RunError
from diffusers_ddpm_ext.training.data.streaming.batches import BatchLayout, StreamReader
from diffusers_ddpm_ext.training.data.streaming.lanes import Lane, LanePlan, LanePosition, plan_lanes
from diffusers_ddpm_ext.training.data.streaming.rows import CountedRows, ShardedRows, first_rows, spread_rows


@dataclass(frozen=True)
class Numbers:
    """Rows whose only cell is their number."""

    count: int
    num_parts: int = 64

    def __len__(self):
        return self.count

    def cells(self, start, stop):
        return ({"number": number} for number in range(start, stop))

    def only(self, column):
        return self

    def name(self, number):
        return f"row {number}"


@dataclass(frozen=True)
class Shards:
    """Shards of different lengths, whose rows are (shard, place)."""

    lengths: tuple[int, ...]

    @property
    def num_shards(self):
        return len(self.lengths)

    def cells(self, shard, start):
        return ({"number": (shard, place)} for place in range(start, self.lengths[shard]))

    def only(self, column):
        return self

    def name(self, shard):
        return f"shard {shard}"


def sharded(*lengths):
    return ShardedRows(Shards(lengths), tuple((shard, 0) for shard in range(len(lengths))))


def stream(rows, layouts, steps, buffer=20, seed=3):
    """Rows at each position of the effective batch, from the readers of all processes: (steps, E)."""
    result = [[None] * layouts[0].effective_batch for _ in range(steps)]
    for layout in layouts:
        reader = StreamReader(rows, plan_lanes(rows, layout.effective_batch, buffer), layout, seed, {})
        for request in islice(reader.requests(0), steps * layout.accumulation):
            for position, row in zip(request.positions, request.rows, strict=True):
                assert result[request.step][position] is None
                result[request.step][position] = row.cells["number"]
        reader.close()
    return result


def flat(batches):
    return [number for batch in batches for number in batch]


@pytest.mark.parametrize(("rows", "count"), [(CountedRows(Numbers(96)), 96), (sharded(24, 24, 24, 24), 96)])
def test_an_epoch_has_every_row_once_in_a_new_order(rows, count):
    batches = flat(stream(rows, [BatchLayout(8)], 24))
    first, second = batches[:count], batches[count:]
    everything = {row.cells["number"] for row in first_rows(rows, 1000)}
    assert len(everything) == count
    assert set(first) == set(second) == everything
    assert first != second
    assert first != sorted(first)
    assert flat(stream(rows, [BatchLayout(8)], 12, seed=4)) != first


@pytest.mark.parametrize(
    "rows", [CountedRows(Numbers(50)), sharded(7, 11, 3, 9), sharded(40), CountedRows(Numbers(3))]
)
@pytest.mark.parametrize("split", [(4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 1, 8), (2, 4, 1)])
def test_positions_have_the_same_rows_for_every_split(rows, split):
    batch, accumulation, world = split
    layouts = [BatchLayout(batch, accumulation, rank, world) for rank in range(world)]
    assert stream(rows, layouts, 9) == stream(rows, [BatchLayout(8)], 9)


@pytest.mark.parametrize("rows", [CountedRows(Numbers(50)), sharded(7, 11, 3, 9), sharded(20)])
@pytest.mark.parametrize("stop", [1, 5, 6, 7, 13])
def test_a_stream_resumes_from_its_positions(rows, stop):
    layout, plan = BatchLayout(4, 2), plan_lanes(rows, 8, 12)
    reader = StreamReader(rows, plan, layout, 0, {})
    requests = list(islice(reader.requests(0), 40))
    _, lanes = reader.in_flight[stop - 1, 1]
    resumed = StreamReader(rows, plan, layout, 0, lanes)
    assert list(islice(resumed.requests(stop * 2), 40 - stop * 2)) == requests[stop * 2 :]
    # Fewer processes or more: lanes that several processes read are where all of them are.
    both = [StreamReader(rows, plan, BatchLayout(4, 1, rank, 2), 0, lanes) for rank in range(2)]
    for other in both:
        request = next(other.requests(stop))
        expected = requests[stop * 2 + request.positions[0] // 4]
        assert request.rows == expected.rows
    for each in (reader, resumed, *both):
        each.close()


def test_requests_in_flight_are_repeated_after_a_lost_worker():
    rows, layout = CountedRows(Numbers(40)), BatchLayout(2, 2)
    reader = StreamReader(rows, plan_lanes(rows, 4, 8), layout, 0, {})
    before = list(islice(reader.requests(0), 7))
    for request in before[:3]:
        del reader.in_flight[request.step, request.micro]
    again = list(islice(reader.requests(3), 9))
    assert again[:4] == before[3:]
    assert flat([request.rows for request in [*before[:3], *again]]) == flat(
        [request.rows for request in islice(StreamReader(rows, plan_lanes(rows, 4, 8), layout, 0, {}).requests(0), 12)]
    )
    reader.close()


def test_lanes_are_as_many_as_parts_and_batch_allow():
    assert plan_lanes(CountedRows(Numbers(1000)), 16, 1000) == LanePlan(16, 64, 62)
    assert plan_lanes(CountedRows(Numbers(1000)), 12, 1000).lanes == 12
    assert plan_lanes(CountedRows(Numbers(1000, num_parts=1)), 16, 1000) == LanePlan(1, 1, 1000)
    assert plan_lanes(CountedRows(Numbers(3)), 16, 1) == LanePlan(2, 2, 1)
    assert plan_lanes(sharded(1, 1, 1), 16, 30) == LanePlan(1, 3, 30)
    assert plan_lanes(sharded(*[1] * 6), 16, 30) == LanePlan(2, 6, 15)
    layout = BatchLayout(8, 1, 0, 2)
    assert [layout.lanes(LanePlan(4, 4, 1), rank) for rank in range(2)] == [{0, 1}, {2, 3}]
    assert [layout.lanes(LanePlan(1, 1, 1), rank) for rank in range(2)] == [{0}, {0}]


def test_shards_of_different_lengths_are_seen_equally_often_in_the_end():
    """Lanes pass through the epochs at different paces; which shards one reads in an epoch is random."""
    counts = Counter(flat(stream(sharded(2, 10, 4, 8), [BatchLayout(4)], 1500, buffer=64)))
    mean = 6000 / 24
    assert max(abs(count - mean) for count in counts.values()) < 0.2 * mean


def test_held_out_rows_are_left_out():
    for rows in (CountedRows(Numbers(20)), sharded(3, 2, 0, 15)):
        everything = first_rows(rows, 100)
        held_out = first_rows(rows, 5)
        rest = rows.without_first(5)
        assert held_out == everything[:5]
        assert first_rows(rest, 100) == everything[5:]
        seen = flat(stream(rest, [BatchLayout(3)], 40))
        assert {row.cells["number"] for row in held_out}.isdisjoint(seen)
        assert {row.cells["number"] for row in everything[5:]} == set(seen)


def test_a_sample_is_spread_over_the_parts():
    assert [row.number for row in spread_rows(CountedRows(Numbers(640)), 16)][::2] == [
        0,
        80,
        160,
        240,
        320,
        400,
        480,
        560,
    ]
    assert len(spread_rows(sharded(100), 64)) == 64


@pytest.mark.parametrize(("failures", "error"), [(2, OSError), (9, OSError), (1, FileNotFoundError), (1, ValueError)])
def test_a_failing_network_is_tried_again(monkeypatch, failures, error):
    """From the beginning of the block, so that no row is lost or read twice; what stays wrong ends the run."""
    left = [failures]

    class Failing(Numbers):
        def cells(self, start, stop):
            for number in range(start, stop):
                if number == 13 and left[0]:
                    left[0] -= 1
                    raise error("no answer")
                yield {"number": number}

    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    rows, expected = CountedRows(Failing(40, 1)), stream(CountedRows(Numbers(40, 1)), [BatchLayout(8)], 10)
    if (failures, error) == (2, OSError):
        assert stream(rows, [BatchLayout(8)], 10) == expected
        assert waits == [1, 5]
    else:
        with pytest.raises(RunError, match=f"can no longer be read .{error.__name__} no answer"):
            stream(rows, [BatchLayout(8)], 10)
        assert len(waits) == (3 if error is OSError else 0)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)])
def test_a_stream_without_rows_ends_in_an_error(lengths):
    with ThreadPoolExecutor(1) as executor:
        lane = Lane(sharded(*lengths), LanePlan(1, len(lengths), 4), 0, 0, LanePosition(), executor)
        with pytest.raises(RunError, match="no row is left"):
            lane.draw()

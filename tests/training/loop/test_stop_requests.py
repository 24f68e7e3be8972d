"""Requests that several processes agree on: no step waits for the others, and each request is obeyed once."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from diffusers_ddpm_ext.training.config.options import CheckpointOptions
from diffusers_ddpm_ext.training.loop import stop_requests
from diffusers_ddpm_ext.training.loop.stop_requests import RequestPoller, StopRequest
from diffusers_ddpm_ext.training.signals import SignalRequests

NOTHING, SAVE = StopRequest(), StopRequest(checkpoint=True)
STOP = StopRequest(checkpoint=True, stop=True, signal=int(signal.SIGTERM))


class Wire:
    """Exchanges with another process, whose requests are scripted; it records what is started and awaited."""

    def __init__(self, others: list[tuple[int, int, int]]) -> None:
        self.others = others
        self.events: list[str] = []

    def start(self, _: Any, *values: int) -> Callable[[], list[int]]:
        number = sum(event.startswith("start") for event in self.events)
        self.events.append(f"start {number}")
        other = self.others[number] if number < len(self.others) else (0, 0, 0)

        def wait() -> list[int]:
            self.events.append(f"wait {number}")
            return [max(pair) for pair in zip(map(int, values), other, strict=True)]

        return wait


def make(
    monkeypatch: pytest.MonkeyPatch, processes: int, others: list[tuple[int, int, int]] | None = None
) -> tuple[RequestPoller, SignalRequests, Wire]:
    wire, signals = Wire(others or []), SignalRequests()
    monkeypatch.setattr(stop_requests, "start_max_over_ranks", wire.start)
    accelerator: Any = SimpleNamespace(num_processes=processes, is_main_process=True)
    return RequestPoller(accelerator, CheckpointOptions(), signals, 0.0), signals, wire


def test_a_step_reads_what_was_exchanged_while_it_computed(monkeypatch):
    """One exchange per step, and each is awaited only after the next step: never the one that was just started."""
    poller, _, wire = make(monkeypatch, 2)
    for _ in range(4):
        assert poller.poll() == NOTHING
    assert wire.events == ["start 0", "wait 0", "start 1", "wait 1", "start 2", "wait 2", "start 3"]


def test_one_process_exchanges_nothing_and_obeys_at_once(monkeypatch):
    poller, signals, wire = make(monkeypatch, 1)
    signals.handle(signal.SIGTERM)
    assert poller.poll() == STOP
    assert not wire.events


def test_a_stop_of_another_process_is_obeyed_after_the_next_step_and_nothing_is_left_in_flight(monkeypatch):
    poller, _, wire = make(monkeypatch, 2, [(1, 1, int(signal.SIGTERM))])
    assert [poller.poll(), poller.poll()] == [NOTHING, STOP]
    assert wire.events == ["start 0", "wait 0"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_requested_checkpoint_is_written_once(monkeypatch, processes):
    poller, signals, _ = make(monkeypatch, processes)
    signals.handle(signal.SIGUSR1)
    written = 0
    for _ in range(6):
        if poller.poll().checkpoint:
            written += 1
            signals.clear()  # as the checkpoint does
    assert written == 1


@pytest.mark.parametrize("processes", [1, 2])
def test_a_checkpoint_requested_during_a_task_is_due_after_the_next_step(monkeypatch, processes):
    """Between tasks only the end of the run is obeyed; the other request must not be forgotten."""
    poller, signals, _ = make(monkeypatch, processes)
    poller.poll()
    signals.handle(signal.SIGUSR1)
    assert not poller.poll_now().stop
    assert poller.poll() == SAVE
    signals.clear()
    assert [poller.poll(), poller.poll()] == [NOTHING, NOTHING]


def test_minutes_that_end_during_a_task_are_not_forgotten(monkeypatch):
    poller, _, _ = make(monkeypatch, 1)
    poller._options = CheckpointOptions(checkpointing_minutes=1.0)
    monkeypatch.setattr(stop_requests.time, "monotonic", lambda: 1e9)
    assert not poller.poll_now().stop
    assert [poller.poll(), poller.poll()] == [SAVE, NOTHING]


def test_between_tasks_a_stop_of_any_process_is_obeyed_at_once(monkeypatch):
    poller, signals, wire = make(monkeypatch, 2)
    poller.poll()
    signals.handle(signal.SIGTERM)
    assert poller.poll_now() == STOP
    assert wire.events[-1].startswith("wait")

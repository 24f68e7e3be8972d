"""Copies beside the steps, with the calls of CUDA recorded: no machine with CUDA is needed, and none is measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.data._utils.pin_memory import pin_memory

from diffusers_ddpm_ext.models.conditioning import Conditions
from diffusers_ddpm_ext.training.data.batches import Batch, WorkerBatch
from diffusers_ddpm_ext.training.data.copy_stream import copied_beside_steps
from diffusers_ddpm_ext.training.data.posterior import Posterior


def batches(events: list[str], count: int = 3) -> Iterator[Batch]:
    for number in range(count):
        events.append(f"copy {number}")
        yield Batch(torch.zeros(1), torch.zeros(1), torch.zeros(1), number)


def test_a_cpu_gets_the_batches_themselves():
    source = batches([])
    assert copied_beside_steps(source, torch.device("cpu")) is source


def test_each_batch_is_copied_on_its_own_stream_and_awaited_by_the_steps(monkeypatch):
    events: list[str] = []

    class Stream:
        def __init__(self, device: torch.device | None = None) -> None:
            self.device = device

        def wait_stream(self, other: Stream) -> None:
            events.append("the steps wait" if self is steps and other.device is not None else "the copy waits")

    steps = Stream()

    @contextmanager
    def within(stream: Stream) -> Iterator[None]:
        events.append("enter")
        yield
        events.append("leave")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: steps)
    for number, batch in enumerate(copied_beside_steps(batches(events), torch.device("cuda", 0))):
        assert batch.step == number
        assert events[-4:] == ["enter", f"copy {number}", "leave", "the steps wait"]
        events.append("step")


def test_every_tensor_of_a_batch_gets_to_page_locked_memory(monkeypatch):
    """By the function of torch's data loader, which skips what it does not know."""
    seen: list[int] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: seen.append(id(tensor)) or tensor)
    tensors = [torch.full((1,), float(number)) for number in range(9)]
    conditions = Conditions(*tensors[3:7])
    posterior = Posterior(*tensors[7:])
    batch = WorkerBatch(*tensors[:3], 4, 1, ["a sentence"], conditions, posterior)
    pinned = pin_memory(batch)
    assert sorted(seen) == sorted(map(id, tensors))
    assert pinned.conditions.captions is tensors[6]
    assert pinned.replacements == ["a sentence"]

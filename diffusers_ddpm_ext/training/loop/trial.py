"""A trial of a run for its printed plan: real steps on this machine, timed, and the memory that a batch needs."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from diffusers_ddpm_ext.training.loop.batches import open_batches, run_layout
from diffusers_ddpm_ext.training.loop.setup import Setup
from diffusers_ddpm_ext.training.loop.step import forward_backward, train_step
from diffusers_ddpm_ext.training.tracking.plan import SLOW_ON_CPU, Trial

STEPS = 3
PEAK = 1.5  # of the memory of a backward pass to the activations that it keeps
USABLE = 0.9  # of the free memory


def run_trial(setup: Setup) -> Trial:
    """Take three real steps, of which the fastest counts; on a CPU with a large network only one image of a step.

    Weights, optimizer and average change: the caller ends afterwards. Collective call.
    """
    accelerator, plan = setup.accelerator, setup.plan
    size = sum(parameter.numel() for parameter in setup.network_parameters)
    is_slow = accelerator.device.type == "cpu" and size >= SLOW_ON_CPU
    setup.task.train()
    kept = _KeptTensors(setup)
    batch = 1 if is_slow else plan.batch
    stream = open_batches(setup, 0, layout=replace(run_layout(setup), batch=1, accumulation=1) if is_slow else None)
    times: list[float] = []
    records = not setup.config.loop.torch_compile
    try:
        if records and not is_slow:
            # One micro-batch: the next one gets the freed memory of this one, at the same addresses.
            with kept.recording():
                forward_backward(setup, 0, 0, next(islice(stream, 1)))
        for step in range(1 if is_slow else STEPS):
            start = time.perf_counter()
            if is_slow:
                with kept.recording() if records else nullcontext():
                    forward_backward(setup, step, 0, next(islice(stream, 1)))
            else:
                train_step(setup, step, stream)
            _wait_for(accelerator.device)
            times.append(time.perf_counter() - start)
    except torch.OutOfMemoryError:
        return Trial(None, None, 0, is_extrapolated=False)
    seconds = min(times) * (plan.batch * plan.accumulation if is_slow else 1)
    per_image = int(PEAK * kept.bytes / batch) or None
    return Trial(seconds, per_image, _free_memory(accelerator.device), is_extrapolated=is_slow)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _KeptTensors:
    """Counts the bytes of the tensors that a backward pass needs, weights excepted."""

    def __init__(self, setup: Setup) -> None:
        self.bytes = 0
        self._seen = {parameter.data_ptr() for parameter in setup.task.parameters()}

    def recording(self) -> torch.autograd.graph.saved_tensors_hooks:
        """A context in which kept tensors are counted, each storage once."""
        return torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)

    def _count(self, tensor: Tensor) -> Tensor:
        pointer = tensor.data_ptr()
        if pointer not in self._seen:
            self._seen.add(pointer)
            self.bytes += tensor.numel() * tensor.element_size()
        return tensor


def _free_memory(device: torch.device) -> int:
    """Bytes that a run may use beside its state; 0 where that is unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(USABLE * (free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)))
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(USABLE * 1024 * int(available.split()[1]))
    with suppress(OSError, ValueError, AttributeError):
        return int(USABLE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return 0

"""Copies of batches to a CUDA device beside the steps that are queued there."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from diffusers_ddpm_ext.training.data.batches import Batch


def copied_beside_steps(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches. On CUDA each is copied and converted on a stream of its own.

    The host asks for a batch while the device still works on the step before, so that the copy, from page-locked
    memory, runs beside it; only the kernels that use the batch wait for it.
    """
    return _on_own_stream(batches, device) if device.type == "cuda" else batches


def _on_own_stream(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    stream = torch.cuda.Stream(device)
    while True:
        with torch.cuda.stream(stream):
            batch = next(batches, None)
        if batch is None:
            return
        steps = torch.cuda.current_stream(device)
        steps.wait_stream(stream)
        for tensor in (batch.pixels, *batch.conditions.as_dict().values()):
            if tensor.device.type == "cuda":
                tensor.record_stream(steps)  # or its memory could be reused as soon as the copying stream is done
        yield batch

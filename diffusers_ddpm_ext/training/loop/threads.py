"""CPU threads of a run: the user's number, the checkpoint's, or the fastest in a short measurement before the plan."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from diffusers_ddpm_ext.training.checkpoints.state_file import MAX_THREADS
from diffusers_ddpm_ext.training.data.batches import Batch
from diffusers_ddpm_ext.training.distributed import any_rank, fail_together, max_over_ranks
from diffusers_ddpm_ext.training.loop.batches import open_batches
from diffusers_ddpm_ext.training.loop.run import RunProgress
from diffusers_ddpm_ext.training.loop.setup import Setup
from diffusers_ddpm_ext.training.loop.step import forward_backward
from diffusers_ddpm_ext.training.threads import ThreadChoice, candidates, cores_per_process, fastest, users_variable

LEAST_PASSES_PER_CANDIDATE = 200
"""Forward passes that a run must still have for each number that is measured; one takes at most some ten passes."""
MAX_SECONDS = 1.2
"""After these no further round is begun."""
LONG_PASS = 0.5
"""Seconds after which a pass counts without a repetition."""
TURN = 0.05
"""Seconds of repeated passes in a turn."""


def settle_threads(setup: Setup, progress: RunProgress) -> ThreadChoice | None:
    """Choose and set the number of threads of a run on a CPU. Collective call.

    Args:
        setup: of the run. Neither its weights nor its random numbers change.
        progress: whose ``threads`` are those of the checkpoint, and become those of the run.

    Returns:
        The choice, for the printed plan; None on an accelerator.
    """
    accelerator = setup.accelerator
    if accelerator.device.type != "cpu":
        progress.threads = None
        return None
    cores = -max_over_ranks(accelerator, -cores_per_process())[0]
    count, reason = _choose(setup, progress, cores)
    torch.set_num_threads(count)
    choice = ThreadChoice(count, reason, cores)
    progress.threads = choice.record() if count <= MAX_THREADS else None  # OMP_NUM_THREADS may be anything
    return choice


def _choose(setup: Setup, progress: RunProgress, cores: int) -> tuple[int, str]:
    """The number of threads, and who has chosen it."""
    saved, present = progress.threads, torch.get_num_threads()
    option, variable = setup.config.loop.num_threads, users_variable()
    if option != "auto" or any_rank(setup.accelerator, variable is not None):
        name = "--num_threads" if option != "auto" else variable or "the environment"
        return present, name + _difference(saved, present)
    if saved == {}:
        return present, "as in the version that wrote the checkpoint"
    if saved is not None and saved["cores"] == cores:
        return saved["count"], "as in the checkpoint"
    counts = candidates(cores)
    passes = (setup.plan.steps - progress.step) * setup.plan.accumulation
    if len(counts) == 1:  # a container's quota, of which torch knows nothing, may leave only one
        return cores, "all" + _difference(saved, cores)
    if passes < LEAST_PASSES_PER_CANDIDATE * len(counts):
        return present, "the run is too short to measure others" + _difference(saved, present)
    count = measure_threads(setup, counts)
    names = ", ".join(map(str, reversed(counts)))
    return count, f"the fastest of {names}; --num_threads {count} repeats this run" + _difference(saved, count)


def _difference(saved: Mapping[str, int] | None, count: int) -> str:
    """What the plan says where a run resumes with another number of threads than its checkpoint was written with."""
    if not saved or saved["count"] == count:
        return ""
    return f"; the checkpoint was written with {saved['count']}, so the last bits will differ"


def measure_threads(setup: Setup, counts: list[int]) -> int:
    """The number of threads on which forward and backward passes of the run's batch are fastest. Collective call."""
    start_time, accelerator = time.perf_counter(), setup.accelerator
    stream = open_batches(setup, 0)
    with fail_together(accelerator):
        batch = next(stream)
    setup.task.train()

    def measure(count: int) -> float:
        torch.set_num_threads(count)
        seconds = _agreed(setup, _seconds_of(setup, batch))
        if seconds >= LONG_PASS and warm:
            return seconds
        warm.append(count)
        times = [_seconds_of(setup, batch) for _ in range(max(1, min(5, int(TURN / seconds))))]
        return _agreed(setup, min(times))

    warm: list[int] = []
    with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
        count = fastest(counts, measure, lambda: _agreed(setup, time.perf_counter() - start_time) < MAX_SECONDS)
    setup.optimizer.zero_grad()
    return count


def _seconds_of(setup: Setup, batch: Batch) -> float:
    """Wall time of a forward and backward pass in this process."""
    start_time = time.perf_counter()
    with setup.accelerator.no_sync(setup.task):
        forward_backward(setup, 0, 0, batch)
    return time.perf_counter() - start_time


def _agreed(setup: Setup, seconds: float) -> float:
    """The time of the slowest process, at least a microsecond, so that all make the same choice."""
    return max(1, *max_over_ranks(setup.accelerator, int(1e6 * seconds))) / 1e6

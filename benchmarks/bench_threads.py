"""Threads as a run chooses them against one thread and against all cores, in turns.

For each network the trainer's own choice is made first, by its own measurement, as often as there are rounds. Then
steps of the run are timed on one thread, on all cores and on the chosen number, in short turns whose order rotates,
so that other programs on the machine slow all three equally. Reported are the medians, their spread (quartiles), and
chosen / better: the time on the worst number that was ever chosen, over the better of one and all.

    python benchmarks/bench_threads.py [--rounds 15] [--models NAME ...] [--json FILE]

Wall time is what threads change, so the machine must be quiet: the load is printed before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState

from diffusers_ddpm_ext.cli.process import SPINS
from diffusers_ddpm_ext.training.config.train_config import TrainConfig
from diffusers_ddpm_ext.training.data.batches import Batch
from diffusers_ddpm_ext.training.loop.attention import settle_attention
from diffusers_ddpm_ext.training.loop.batches import open_batches
from diffusers_ddpm_ext.training.loop.run import RunProgress
from diffusers_ddpm_ext.training.loop.setup import Setup, build_setup
from diffusers_ddpm_ext.training.loop.step import train_step
from diffusers_ddpm_ext.training.loop.threads import measure_threads
from diffusers_ddpm_ext.training.threads import candidates, cores

ALLOWED = 1.05
"""Of the better of one thread and all cores."""
TURN = 0.3
"""Seconds of steps in a turn; at least one step."""
SMALL: dict[str, Any] = {"block_out_channels": [8, 16], "norm_num_groups": 4, "resolution": 8, "attention_levels": [1]}
MODELS: dict[str, dict[str, Any]] = {
    "tiny, 8 x 1 x 8 x 8": SMALL | {"train_batch_size": 8, "layers_per_block": 1},
    "tiny, 64 x 1 x 8 x 8": SMALL | {"train_batch_size": 64, "layers_per_block": 1},
    "digits, 64 x 1 x 8 x 8": {},
    "digits, 256 x 1 x 8 x 8": {"train_batch_size": 256},
    "4 M, 16 x 3 x 16 x 16": {
        "block_out_channels": [64, 128], "attention_levels": [1], "norm_num_groups": 32, "layers_per_block": 2,
        "resolution": 16, "channels": 3, "train_batch_size": 16,
    },
    "15 M, 8 x 3 x 32 x 32": {
        "block_out_channels": [64, 128, 256], "attention_levels": [1], "norm_num_groups": 32, "layers_per_block": 2,
        "resolution": 32, "channels": 3, "train_batch_size": 8,
    },
}  # fmt: skip


def seconds_per_step(setup: Setup, batches: Iterator[Batch], threads: int, first: int) -> float:
    """Time of a step on a number of threads; the first one of the turn is not counted."""
    torch.set_num_threads(threads)
    train_step(setup, first, batches)
    start_time, steps = time.perf_counter(), 0
    while steps == 0 or time.perf_counter() - start_time < TURN:
        steps += 1
        train_step(setup, first + steps, batches)
    return (time.perf_counter() - start_time) / steps


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Choices and times of one network."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    defaults = {"report_to": "none", "max_train_steps": 10**6, "output_dir": "bench_threads"}
    setup = build_setup(TrainConfig.from_flat(defaults | MODELS[name]))
    settle_attention(setup, RunProgress())
    counts = candidates(cores())
    start_time = time.perf_counter()
    choices = [measure_threads(setup, counts) for _ in range(rounds)]
    search = (time.perf_counter() - start_time) / rounds
    batches = open_batches(setup, 0)
    every = sorted({1, counts[0], *choices})
    times: dict[int, list[float]] = {count: [] for count in every}
    for number in range(rounds):
        turn = number % len(every)
        for count in [*every[turn:], *every[:turn]]:
            times[count].append(seconds_per_step(setup, batches, count, 0))
    medians = {count: statistics.median(values) for count, values in times.items()}
    better = min(medians[1], medians[counts[0]])
    return {
        "network": name,
        "choices": dict(Counter(choices)),
        "all": counts[0],
        "search_seconds": search,
        "seconds": medians,
        "quartiles": {count: statistics.quantiles(values, n=4) for count, values in times.items()},
        "chosen_to_better": max(medians[count] for count in choices) / better,
    }


def row(result: dict[str, Any]) -> str:
    """One row of the table."""
    times = []
    for count in (1, result["all"]):
        low, _, high = (1000 * value for value in result["quartiles"][count])
        times.append(f"{1000 * result['seconds'][count]:.1f} ({low:.1f}-{high:.1f})")
    choices = ", ".join(f"{count}: {often}" for count, often in sorted(result["choices"].items()))
    ratio = f"{result['chosen_to_better']:.2f}" + (" TOO SLOW" if result["chosen_to_better"] > ALLOWED else "")
    return "| " + " | ".join([result["network"], *times, choices, ratio, f"{result['search_seconds']:.2f}"]) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if "GOMP_SPINCOUNT" not in os.environ:  # as `ddpm-ext` does; torch reads it on import
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"GOMP_SPINCOUNT": SPINS})
    print(f"{cores()} cores, load {os.getloadavg()[0]:.1f} before")
    results = [measure(name, args.rounds) for name in args.models]
    print(f"load {os.getloadavg()[0]:.1f} after\n")
    print("| network, batch | 1 thread, ms per step | all cores, ms | choices | chosen / better | search, s |")
    print("|---|---|---|---|---|---|")
    print("\n".join(map(row, results)))
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

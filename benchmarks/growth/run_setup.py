"""Steps of a run in this process, for measurements that compare several settings in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

from accelerate.state import AcceleratorState, GradientState

from diffusers_ddpm_ext.training.config.train_config import parse_train_args
from diffusers_ddpm_ext.training.loop.batches import open_batches
from diffusers_ddpm_ext.training.loop.setup import Setup, build_setup
from diffusers_ddpm_ext.training.loop.step import train_step

COMMON = ["--resolution", "8", "--layers_per_block", "1", "--attention_levels", "none", "--report_to", "none"]
COMMON += ["--validation_fraction", "0", "--lr_warmup_steps", "0", "--lr_scheduler", "constant"]
TINY = [*COMMON, "--block_out_channels", "8", "16", "--norm_num_groups", "4"]


def make_setup(options: Sequence[str]) -> Setup:
    """Build what a run with these options has before its first step."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return build_setup(parse_train_args([*options, "--max_train_steps", "1000000"]))


def step_of(setup: Setup) -> Callable[[], None]:
    """A function that takes the next optimizer step."""
    batches, number = open_batches(setup, 0), 0
    setup.task.train()

    def step() -> None:
        nonlocal number
        train_step(setup, number, batches)
        number += 1

    return step


def seconds_in_turns(
    calls: Mapping[object, Callable[[], object]], rounds: int, repeats: int = 1
) -> dict[object, list[float]]:
    """Processor's seconds per call: each round calls all of them, in an order that is reversed every time."""
    for call in calls.values():
        call()
    seconds: dict[object, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            start = time.process_time()
            for _ in range(repeats):
                calls[name]()
            seconds[name].append((time.process_time() - start) / repeats)
    return seconds


def milliseconds(seconds: Sequence[float]) -> float:
    """Median, in milliseconds."""
    return 1e3 * median(seconds)

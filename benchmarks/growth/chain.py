"""Time of a training step and of a sampling step, and memory, against the length T of the chain."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from growth.fit import fit_power, print_table
from growth.run_setup import TINY, make_setup, milliseconds, seconds_in_turns, step_of

LENGTHS = (100, 300, 1000, 3000, 10_000)
VARIANTS = {
    "uniform timesteps": [],
    "`--learn_logvar`": ["--learn_logvar"],
    "`--timestep_sampler log_snr_uniform`": ["--timestep_sampler", "log_snr_uniform"],
    "`--timestep_sampler loss_second_moment`": ["--timestep_sampler", "loss_second_moment"],
    "`--loss_type hybrid`": ["--loss_type", "hybrid", "--variance_type", "learned_range"],
}


def chain_options(length: int, variant: str) -> list[str]:
    """Options of a tiny run with T steps."""
    plain = [*TINY, "--train_batch_size", "16", "--beta_schedule", "squaredcos_cap_v2"]
    learned = [] if variant == "`--learn_logvar`" else ["--no_learn_logvar"]
    return [*plain, *learned, "--num_train_timesteps", str(length), *VARIANTS[variant]]


def warm(step: Callable[[], None], setup: object) -> Callable[[], None]:
    """Fill the history of a sampler that learns, which takes at least 10 T losses, before the first step."""
    sampler = setup.trained.sampler  # type: ignore[attr-defined]
    if sampler is not None and sampler.learns:
        sampler.losses.fill_(0.5)
        sampler.counts.fill_(sampler.losses.shape[1])
    return step


def scheduler_step(length: int) -> Callable[[], object]:
    """One step of the scheduler on 4 x 3 x 32 x 32."""
    from diffusers_ddpm_ext import DDPMExtScheduler

    scheduler = DDPMExtScheduler(length, beta_schedule="squaredcos_cap_v2")
    scheduler.set_timesteps(50)
    sample, draw = torch.randn(4, 3, 32, 32), torch.Generator().manual_seed(0)
    timestep = scheduler.timesteps[10]
    return lambda: scheduler.step(sample, timestep, sample, generator=draw)


def own_memory(length: int) -> float:
    """Memory in MiB of a process that builds a run with T steps and takes three of them."""
    command = [sys.executable, str(Path(__file__).parents[1] / "bench_growth.py"), "chain", "--memory_of", str(length)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(output.splitlines()[-1]))


def print_own_memory(length: int) -> None:
    """Print this process' memory after three steps."""
    step = step_of(make_setup(chain_options(length, "uniform timesteps")))
    for _ in range(3):
        step()
    status = Path("/proc/self/status").read_text().splitlines()
    print(json.dumps(sum(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024))


def main(rounds: int, lengths: tuple[int, ...] = LENGTHS) -> None:
    """Print a row for each variant, with the exponent of T."""
    rows = []
    for variant in VARIANTS:
        setups = {length: make_setup(chain_options(length, variant)) for length in lengths}
        calls = {length: warm(step_of(setup), setup) for length, setup in setups.items()}
        seconds = seconds_in_turns(calls, rounds, repeats=3)
        times = [milliseconds(seconds[length]) for length in lengths]
        rows.append((f"training step, {variant}", *(f"{each:.2f} ms" for each in times), fit_power(lengths, times)))
    seconds = seconds_in_turns({length: scheduler_step(length) for length in lengths}, rounds, repeats=20)
    times = [milliseconds(seconds[length]) for length in lengths]
    rows.append(("`DDPMExtScheduler.step`", *(f"{each:.3f} ms" for each in times), fit_power(lengths, times)))
    memory = [own_memory(length) for length in lengths]
    rows.append(("memory of the process", *(f"{each:.0f} MiB" for each in memory), fit_power(lengths, memory)))
    print_table(["", *(f"T = {length:,}" for length in lengths), "exponent of T"], rows)

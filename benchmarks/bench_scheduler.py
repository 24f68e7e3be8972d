"""Time of one `DDPMExtScheduler.step`, compared with `DDPMScheduler.step` of the installed Diffusers.

    python benchmarks/bench_scheduler.py [--rounds 40]

Both do the same work: epsilon, clipped, integer timesteps, noise from equal generators. One thread; the two alternate
in short rounds, and the median of the rounds' ratios is reported, so that a busy machine slows both equally. The time
to draw the noise is a lower limit.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import DDPMScheduler

from diffusers_ddpm_ext import DDPMExtScheduler

SHAPES = [(1, 3, 32, 32), (4, 3, 32, 32), (4, 4, 64, 64), (16, 3, 64, 64)]
STEPS = 1000


def stepper(scheduler: DDPMScheduler | DDPMExtScheduler, shape: tuple[int, ...]) -> Callable[[int], None]:
    """A function that runs `count` reverse steps from the middle of the chain."""
    scheduler.set_timesteps(STEPS)
    timesteps = scheduler.timesteps.tolist()
    sample, output = torch.randn(shape), torch.randn(shape)
    generator = torch.Generator().manual_seed(0)

    def run(count: int) -> None:
        for t in timesteps[300 : 300 + count]:
            scheduler.step(output, t, sample, generator=generator)

    return run


def noise(shape: tuple[int, ...]) -> Callable[[int], None]:
    """A function that draws the noise of `count` steps and does nothing else."""
    generator = torch.Generator().manual_seed(0)

    def run(count: int) -> None:
        for _ in range(count):
            torch.empty(shape).normal_(generator=generator)

    return run


def seconds(run: Callable[[int], None], count: int) -> float:
    """Wall-clock time of one step."""
    start = time.perf_counter()
    run(count)
    return (time.perf_counter() - start) / count


def compare(shape: tuple[int, ...], rounds: int) -> tuple[float, float, float, float]:
    """Median microseconds of stock, ours and the noise alone, and the median ratio stock / ours."""
    runs = [stepper(DDPMScheduler(), shape), stepper(DDPMExtScheduler(), shape), noise(shape)]
    count = max(5, min(100, int(2e6 / torch.Size(shape).numel() / 5)))
    for run in runs:
        run(count)
    times: list[list[float]] = [[], [], []]
    for i in range(rounds):
        for k in (0, 1, 2) if i % 2 == 0 else (2, 1, 0):
            times[k].append(seconds(runs[k], count))
    ratio = statistics.median(stock / ours for stock, ours in zip(times[0], times[1], strict=True))
    stock, ours, floor = (1e6 * statistics.median(each) for each in times)
    return stock, ours, floor, ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print("| shape | DDPMScheduler us | DDPMExtScheduler us | noise alone us | stock / ours |")
    print("|---|---|---|---|---|")
    for shape in SHAPES:
        stock, ours, floor, ratio = compare(shape, rounds)
        print(f"| {'x'.join(map(str, shape))} | {stock:.0f} | {ours:.0f} | {floor:.0f} | {ratio:.2f}x |")


if __name__ == "__main__":
    main()

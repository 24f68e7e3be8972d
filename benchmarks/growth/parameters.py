"""Time of a step, memory and checkpoint against the number of parameters."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from diffusers_ddpm_ext.training.checkpoints import snapshot as snapshots
from diffusers_ddpm_ext.training.checkpoints.state import capture_snapshot
from diffusers_ddpm_ext.training.checkpoints.writer import write_checkpoint
from diffusers_ddpm_ext.training.loop.resume import saved_progress, training_objects
from diffusers_ddpm_ext.training.loop.run import RunProgress
from diffusers_ddpm_ext.training.loop.setup import Setup
from diffusers_ddpm_ext.training.loop.step import clip
from growth.fit import fit_power, print_table
from growth.run_setup import COMMON, make_setup, milliseconds, seconds_in_turns, step_of

WIDTHS = (32, 64, 128, 256, 384)
BATCH = 4


def options_of(width: int) -> list[str]:
    """Options of a network of two levels, of this width and twice it, at 8 x 8."""
    sizes = ["--block_out_channels", str(width), str(2 * width), "--norm_num_groups", "32"]
    return [*COMMON, "--train_batch_size", str(BATCH), *sizes]


def around_network(setup: Setup) -> None:
    """The parts of a step around forward and backward whose work grows with the parameters."""
    clip(setup)
    setup.optimizer.step()
    if setup.ema is not None:
        setup.ema.step(setup.trained.network)


def checkpoint_of(setup: Setup, folder: Path, step: int) -> tuple[int, float]:
    """Write a checkpoint; its bytes and the seconds on the clock."""
    start = time.perf_counter()
    snapshot = capture_snapshot(
        training_objects(setup), saved_progress(setup, RunProgress(step), 0), share_memory=True
    )
    assert snapshot is not None
    path = write_checkpoint(folder, step, partial(snapshots.write_snapshot, snapshot))
    seconds = time.perf_counter() - start
    return sum(file.stat().st_size for file in path.iterdir()), seconds


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def measure(width: int) -> None:
    """Print memory and checkpoint of one width, in a process of its own."""
    torch.set_num_threads(1)
    setup = make_setup(options_of(width))
    before = peak_memory()
    step = step_of(setup)
    for _ in range(3):
        step()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        written = [checkpoint_of(setup, Path(folder), number) for number in (1, 2, 3)]
    count = sum(parameter.numel() for parameter in setup.network_parameters)
    fastest = min(seconds for _, seconds in written)
    print(
        json.dumps(
            {"parameters": count, "peak": peak_memory(), "before": before, "bytes": written[0][0], "seconds": fastest}
        )
    )


def main(rounds: int, widths: tuple[int, ...] = WIDTHS) -> None:
    """Print a row per size, and the exponents."""
    facts = []
    for width in widths:
        command = [
            sys.executable,
            str(Path(__file__).parents[1] / "bench_growth.py"),
            "parameters",
            "--of",
            str(width),
        ]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        facts.append(json.loads(output.splitlines()[-1]))
    setups = {width: make_setup(options_of(width)) for width in widths}
    whole = seconds_in_turns({width: step_of(setup) for width, setup in setups.items()}, rounds)
    for setup in setups.values():
        for parameter in setup.network_parameters:
            parameter.grad = torch.randn_like(parameter)
    parts = seconds_in_turns({width: (lambda s=setup: around_network(s)) for width, setup in setups.items()}, rounds)
    counts = [fact["parameters"] for fact in facts]
    steps, rest = ([milliseconds(times[width]) for width in widths] for times in (whole, parts))
    rows = [
        (
            f"{fact['parameters']:,}", f"{step:.1f}", f"{part:.2f}", f"{fact['peak'] / 2**20:.0f}",
            f"{fact['bytes'] / 1e6:.1f}", f"{fact['seconds']:.3f}",
        )
        for fact, step, part in zip(facts, steps, rest, strict=True)
    ]  # fmt: skip
    columns = (steps, rest, *([fact[name] for fact in facts] for name in ("peak", "bytes", "seconds")))
    rows.append(("exponent of the number", *(str(fit_power(counts, column)) for column in columns)))
    header = [
        "parameters",
        "step, ms",
        "of it clipping, AdamW and EMA, ms",
        "peak memory, MiB",
        "checkpoint, MB",
        "it blocks, s",
    ]
    print_table(header, rows)

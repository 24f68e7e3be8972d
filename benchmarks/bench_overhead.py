"""Share of a training step that is neither forward pass, backward pass nor optimizer, in the trainer's own loop.

CPU seconds of the training thread with one thread of torch, so that a busy machine changes little: whole steps, as the
trainer takes them (batches, noise, clipping, average, losses, metrics.jsonl), and inside them the network's forward
pass, the backward pass, and the optimizer's update. The rest is the loop. Blocks of steps, of which the median and the
spread (first and third quartile) are printed; validation, images and checkpoints are left out.

    python benchmarks/bench_overhead.py [--blocks 9] [--steps 10]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffusers_ddpm_ext.cli.process import tune_process
from diffusers_ddpm_ext.training.config.train_config import TrainConfig
from diffusers_ddpm_ext.training.loop.attention import settle_attention
from diffusers_ddpm_ext.training.loop.metrics_logging import log_losses, open_metrics_logger
from diffusers_ddpm_ext.training.loop.run import Run, RunProgress
from diffusers_ddpm_ext.training.loop.run_batches import RunBatches
from diffusers_ddpm_ext.training.loop.setup import build_setup
from diffusers_ddpm_ext.training.loop.step import train_step
from diffusers_ddpm_ext.training.signals import SignalRequests
from diffusers_ddpm_ext.training.tracking.step_losses import LossMeter

TINY = {"block_out_channels": [64, 128], "attention_levels": [1], "layers_per_block": 2, "norm_num_groups": 32}
NETWORKS: dict[str, dict[str, Any]] = {
    "4.0 M, 8 x 8, batch 64": TINY | {"train_batch_size": 64},
    "4.0 M, 8 x 8, batch 16": TINY | {"train_batch_size": 16},
    "half as wide, batch 16": TINY | {"block_out_channels": [32, 64], "train_batch_size": 16},
}
PARTS = ("forward", "backward", "optimizer")


class PartTimes:
    """CPU seconds spent in parts of a step, whose functions are replaced by timed ones."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Time a function of an object or a class."""
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            result = function(*args, **kwargs)
            self.seconds[part] += time.thread_time() - start
            return result

        setattr(owner, name, timed)


def open_run(folder: Path, options: dict[str, Any]) -> Run:
    """A run of the digits without checkpoints, images and validation."""
    sizes = {"resolution": 8, "max_train_steps": 10**6, "logging_steps": 10, "report_to": "none", "num_threads": 1}
    setup, progress = build_setup(TrainConfig.from_flat(sizes | options)), RunProgress()
    settle_attention(setup, progress)
    logger = open_metrics_logger(setup, folder, progress)
    return Run(setup, folder, None, None, SignalRequests(), LossMeter(), logger, progress)


def take_steps(run: Run, batches: RunBatches, count: int) -> None:
    """Take steps as the trainer does."""
    for _ in range(count):
        trace = train_step(run.setup, run.progress.step, batches)
        run.progress.step += 1
        batches.note_lanes()
        run.meter.add(trace)
        run.logger.progress_bar.update()
        if run.progress.step % run.setup.config.output.logging_steps == 0:
            log_losses(run)


def measure(name: str, blocks: int, steps: int, folder: Path) -> str:
    """One row of the table."""
    run, times = open_run(folder, NETWORKS[name]), PartTimes()
    run.setup.task.train()
    batches, backward = RunBatches(run), torch.Tensor.backward
    optimizer: Any = run.setup.optimizer
    times.watch(run.setup.denoiser, "forward", "forward")
    times.watch(optimizer.optimizer, "step", "optimizer")
    times.watch(torch.Tensor, "backward", "backward")
    try:
        take_steps(run, batches, steps)
        shares, totals = [], []
        for _ in range(blocks):
            times.seconds = dict.fromkeys(PARTS, 0.0)
            start = time.thread_time()
            take_steps(run, batches, steps)
            total = time.thread_time() - start
            totals.append(1000 * total / steps)
            shares.append(100 * (1 - sum(times.seconds.values()) / total))
    finally:
        torch.Tensor.backward = backward  # type: ignore[method-assign]
    low, median, high = statistics.quantiles(shares, n=4)
    return f"| {name} | {statistics.median(totals):.1f} | {median:.1f} % ({low:.1f} to {high:.1f}) |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    tune_process()  # as `ddpm-ext train` does
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Seems like `optimizer.step\\(\\)` has been overridden")  # by the stopwatch
    rows = []
    for name in NETWORKS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, args.blocks, args.steps, Path(folder)))
    print("\n| network | CPU ms per step | beside forward, backward and optimizer |")
    print("|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()

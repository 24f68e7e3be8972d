"""Memory of a training step per parameter: weights, gradients, optimizer, EMA and activations, measured apart.

    python benchmarks/bench_memory.py [--widths 256 512] [--batch 32] [--cases default "EMA in bfloat16"] [--json FILE]

Each case runs in a process of its own. The objects of a run are built one after the other, and after each the memory
in use is read: of the device (``torch.cuda.memory_allocated``) where there is one, else of the process (resident
memory, after a first run of a tiny network, so that libraries are loaded; freed memory leaves the process at once).
"step" is the peak of a whole step beside what was in use before the run, and "planned" what the plan of the run says
without activations. All are bytes per parameter; activations are of the batch, in MB, and grow with it: the peak of a
second backward pass.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import itertools
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "EMA in bfloat16": {"ema_dtype": "bfloat16"},
    "EMA in main memory": {"offload_ema": True},
    "no EMA": {"use_ema": False},
    "8-bit optimizer": {"use_8bit_adam": True},
    "gradient checkpointing": {"gradient_checkpointing": True},
}
PARTS = ("weights", "EMA", "gradients", "optimizer")
THRESHOLD = 64 * 1024  # bytes from which the C library maps a block of its own, and gives it back at once


class Meter:
    """Memory of this process, or of its CUDA device: in use, and the largest since `reset`."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda

    def now(self) -> int:
        """Bytes in use."""
        import torch

        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            return torch.cuda.memory_allocated()
        return self._status("VmRSS")

    def peak(self) -> int:
        """The most bytes in use since `reset`."""
        import torch

        return torch.cuda.max_memory_allocated() if self.cuda else self._status("VmHWM")

    def reset(self) -> None:
        """Start a new peak from the present use."""
        import torch

        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    @staticmethod
    def _status(name: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def options(widths: list[int], batch: int, case: str) -> dict[str, Any]:
    """Options of the run of a case on the digits; the average is made apart."""
    return {
        "resolution": 8,
        "block_out_channels": widths,
        "attention_levels": [],
        "norm_num_groups": 8,
        "train_batch_size": batch,
        "max_train_steps": 10,
        "lr_warmup_steps": 0,
        "report_to": "none",
        **CASES[case],
    }


def give_back_freed_memory() -> None:
    """Let freed blocks leave the process, which a run keeps."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(parameter, THRESHOLD)


def measure(case: str, widths: list[int], batch: int) -> dict[str, float]:
    """Bytes of each part of a run, and of the peak of a step."""
    import torch

    from diffusers_ddpm_ext.training.config.train_config import TrainConfig
    from diffusers_ddpm_ext.training.factory.parts import build_ema
    from diffusers_ddpm_ext.training.loop.batches import open_batches
    from diffusers_ddpm_ext.training.loop.description import state_sizes
    from diffusers_ddpm_ext.training.loop.setup import build_setup
    from diffusers_ddpm_ext.training.loop.step import forward_backward, train_step

    meter = Meter(torch.cuda.is_available())
    config = TrainConfig.from_flat(options(widths, batch, case))
    bare = TrainConfig.from_flat(
        options(widths, batch, case) | {"use_ema": False, "ema_dtype": "float32", "offload_ema": False}
    )
    points = [meter.now()]
    setup = build_setup(bare)
    give_back_freed_memory()
    batches = open_batches(setup, 0)
    points.append(meter.now())
    average = build_ema(config.ema, setup.trained.network)
    points.append(meter.now())
    forward_backward(setup, 0, 0, next(batches))
    points.append(meter.now())
    meter.reset()
    forward_backward(setup, 0, 1, next(batches))
    activations = meter.peak() - points[-1]
    setup.optimizer.step()
    points.append(meter.now())
    setup.optimizer.zero_grad()
    object.__setattr__(setup, "ema", average)
    meter.reset()
    train_step(setup, 1, batches)
    step, sizes = meter.peak(), state_sizes(setup)
    parts = dict(zip(PARTS, (b - a for a, b in itertools.pairwise(points)), strict=True))
    return parts | {
        "parameters": sizes.parameters,
        "activations": activations,
        "step": step - points[0],
        "planned": sizes.on_device,
    }


def measure_apart(case: str, widths: list[int], batch: int) -> dict[str, float]:
    """`measure` in a new process, after a run of a tiny network that loads the libraries."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        process.submit(measure, case, [8, 8], batch).result()
        return process.submit(measure, case, widths, batch).result()


def main() -> None:
    """Measure every case, and print the table."""
    parser = argparse.ArgumentParser(description="Bytes per parameter of a training run.")
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--json", type=Path, help="also write the bytes to this file")
    args = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    print("| case | weights | gradients | optimizer | EMA | planned | step | activations, MB |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for case in args.cases:
        if case == "8-bit optimizer" and importlib.util.find_spec("bitsandbytes") is None:
            print(f"| {case} | not measured: `pip install bitsandbytes` |||||||")
            continue
        row = results[case] = measure_apart(case, args.widths, args.batch)
        names = ("weights", "gradients", "optimizer", "EMA", "planned", "step")
        numbers = " | ".join(f"{row[name] / row['parameters']:.2f}" for name in names)
        print(f"| {case} | {numbers} | {row['activations'] / 1e6:.0f} |", flush=True)
    for row in [*results.values()][:1]:
        print(f"\n{row['parameters']:,} parameters, batch {args.batch}")
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Time and memory of what reads all metrics of a run, against its length: resuming, and the curves at its end."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.training.tracking.row_files import trim_rows
from diffusers_ddpm_ext.utils.run_metrics import read_metrics
from growth.fit import fit_power, print_table

NAMES = ("train/loss_simple", "val/loss_simple", "val/loss_simple_ema")


def write_rows(path: Path, steps: int) -> None:
    """Rows as a run writes them, with a validation every 500 steps."""
    with path.open("w") as file:
        for step in range(1, steps + 1):
            loss = 0.1 + 1 / (step + 10)
            row = {"step": step, "train/loss": loss, "train/loss_simple": loss, "train/loss_vlb": loss / 3}
            file.write(json.dumps(row | {"train/grad_norm": 2 * loss, "lr": 1e-4}) + "\n")
            if step % 500 == 0:
                file.write(json.dumps({"step": step, "val/loss_simple": loss, "val/loss_simple_ema": loss}) + "\n")


def memory_of(name: str) -> int:
    """A field of this process' status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def measured(call: Callable[[], Any]) -> tuple[float, float]:
    """Processor's seconds of a call, and the largest memory above that before it in MiB, in a forked process."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)

    def child() -> None:
        before, start = memory_of("VmRSS"), time.process_time()
        call()
        sender.send((time.process_time() - start, (memory_of("VmHWM") - before) / 2**20))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    result: tuple[float, float] = receiver.recv()
    process.join()
    return result


def main(lengths: list[int]) -> None:
    """Print a row for each length, and the exponents."""
    rows, columns = [], []
    with tempfile.TemporaryDirectory() as folder:
        for steps in lengths:
            path = Path(folder) / "metrics.jsonl"
            write_rows(path, steps)
            resume = measured(lambda path=path, steps=steps: trim_rows(path, lambda row: row["step"] <= steps))
            curves = measured(lambda path=path: read_metrics(path, NAMES))
            columns.append((path.stat().st_size / 1e6, *resume, *curves))
            shown = [f"{value:.3f}" if value < 1 else f"{value:.1f}" for value in columns[-1]]
            rows.append((f"{steps:,}", *shown))
    seconds = [str(fit_power(lengths, [column[index] for column in columns])) for index in (0, 1, 3)]
    rows.append(("exponent", seconds[0], seconds[1], "", seconds[2], ""))
    header = ["steps", "metrics.jsonl, MB", "resuming: trim, CPU s", "MiB", "end: read curves, CPU s", "MiB"]
    print_table(header, rows)

"""Time that training is blocked by a checkpoint, compared with a plain copy of the same bytes with fsync.

    python benchmarks/bench_checkpoint.py [--folder .] [--rounds 5] [--megabytes 50 200 400]

Both write the same bytes from memory into files with a checkpoint's proportions (weights, EMA weights, two moments in
one file) and wait for the disk: the copy only does fsync, ours also reads every file back for its sha256, writes the
manifest, syncs the folders and renames. The two alternate, and the medians and the median of the rounds' ratios are
reported. The last column is the search at the next start, which reads every byte.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from diffusers_ddpm_ext.training.checkpoints.folders import newest
from diffusers_ddpm_ext.training.checkpoints.writer import write_checkpoint

SHARES = {"model.safetensors": 1, "ema.safetensors": 1, "optimizer.safetensors": 2}
SMALL = {"state.json": b"{}" * 2000, "logvar.safetensors": b"l" * 4000}
BLOCK = os.urandom(1 << 20)


def fill(folder: Path, megabytes: int) -> None:
    """Write the files of a checkpoint, without waiting for the disk."""
    for name, share in SHARES.items():
        with open(folder / name, "wb", buffering=0) as file:
            for _ in range(megabytes * share // sum(SHARES.values())):
                file.write(BLOCK)
    for name, data in SMALL.items():
        (folder / name).write_bytes(data)


def copy(parent: Path, megabytes: int) -> None:
    """The lower limit: the same bytes in the same files, each on the disk when this returns."""
    folder = parent / "copy"
    folder.mkdir()
    fill(folder, megabytes)
    for name in (*SHARES, *SMALL):
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock time of one call, started after all earlier writes have finished."""
    os.sync()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def one_round(folder: Path, megabytes: int, ours_first: bool) -> tuple[float, float, float]:
    """Seconds of a copy, of a checkpoint, and of the search that reads it."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        parent = Path(temporary)
        runs = {
            "copy": lambda: copy(parent, megabytes),
            "ours": lambda: write_checkpoint(parent, 4, lambda draft: fill(draft, megabytes)),
        }
        took = {name: seconds(runs[name]) for name in sorted(runs, reverse=ours_first)}
        shutil.rmtree(parent / "copy")
        return took["copy"], took["ours"], seconds(lambda: newest(parent))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="A checkpoint compared with a plain copy with fsync.")
    parser.add_argument("--folder", type=Path, default=Path("."), help="a folder on the disk to measure")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[50, 200, 400])
    arguments = parser.parse_args()
    print("| MB | copy with fsync, s | checkpoint, s | ratio | lowest and highest ratio | search, s |")
    print("|---:|---:|---:|---:|---:|---:|")
    for megabytes in arguments.megabytes:
        rounds = [one_round(arguments.folder, megabytes, bool(turn % 2)) for turn in range(arguments.rounds)]
        plain, ours, search = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratios = sorted(ours / plain for plain, ours, _ in rounds)
        print(
            f"| {megabytes} | {plain:.2f} | {ours:.2f} | {statistics.median(ratios):.2f} "
            f"| {ratios[0]:.2f} to {ratios[-1]:.2f} | {search:.2f} |"
        )


if __name__ == "__main__":
    main()

"""Start-up and memory of a streamed run against its number of rows.

    python benchmarks/bench_streaming.py [--rows 1000 100000 1000000] [--rounds 5] [--folder DIR]

Parquet files of 8 x 8 images, each different, in two layouts: one file with row groups as large as pyarrow makes them
(2**20 rows), and 16 files with groups of 1,000. A new process for each measurement opens the stream as a run does
(`load_data`: footers, sample, 100 held-out images), and takes batches of 16. Sizes take turns, the order is reversed
in every round, and the ratios are those of one round, of which the median is shown.

    seconds     from the call of `load_data` to the first batch, after all imports; and the processor's
    resume      to the first batch at the middle of the first epoch, from the lanes that a checkpoint would have
    per step    of the batches after the first
    MiB         largest resident memory of the process after 200 batches, above that with the fewest rows
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

BATCH, STEPS, HELD_OUT = 16, 200, 100
LAYOUTS = {"one file": (1, 1 << 20), "16 files": (16, 1000)}
HEADER = b"P5 8 8 255\n"


def write_rows(folder: Path, rows: int, files: int, group: int) -> None:
    """Write rows with an image and a number."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(rows)
    schema = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("number", pa.int64())])
    features = {"image": {"_type": "Image"}, "number": {"dtype": "int64", "_type": "Value"}}
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    for number in range(files):
        low, high = number * rows // files, (number + 1) * rows // files
        with pq.ParquetWriter(folder / f"train-{number:05d}-of-{files:05d}.parquet", schema) as writer:
            for start in range(low, high, group):
                numbers = range(start, min(start + group, high))
                pixels = generator.integers(0, 256, (len(numbers), 64), dtype=np.uint8)
                images = pa.StructArray.from_arrays(
                    [pa.array([HEADER + row.tobytes() for row in pixels]), pa.nulls(len(numbers), pa.string())],
                    names=["bytes", "path"],
                )
                writer.write_table(pa.Table.from_arrays([images, pa.array(numbers)], schema=schema), group)


def measure(folder: str, rows: int) -> dict[str, float]:
    """Open a stream, take batches, and open it again in the middle; in this process."""
    import datasets  # noqa: F401  (not a part of the start that depends on the rows)

    from diffusers_ddpm_ext.training.config.data_options import DataOptions
    from diffusers_ddpm_ext.training.data.dataset import load_data
    from diffusers_ddpm_ext.training.data.streaming.batches import BatchLayout, stream_batches
    from diffusers_ddpm_ext.training.data.streaming.lanes import LanePosition

    options = DataOptions(
        dataset_name=folder, streaming=True, resolution=(8, 8), validation_fraction=None, validation_examples=HELD_OUT
    )
    wall, cpu = time.perf_counter(), time.process_time()
    data = load_data(options)
    assert data.stream is not None
    plan = data.stream.plan(BATCH)

    def batches(lanes: dict[int, LanePosition] | None = None):
        return stream_batches(data.stream.decoder(data.train), plan, BatchLayout(BATCH), 0, lanes=lanes)

    stream = batches()
    next(stream)
    seconds, processor = time.perf_counter() - wall, time.process_time() - cpu
    begin = time.process_time()
    for _ in range(STEPS):
        next(stream)
    per_step = (time.process_time() - begin) / STEPS
    stream.close()
    peak = peak_memory()
    parts = plan.parts // plan.lanes
    half = LanePosition(0, 1, parts // 2, 0 if parts > 1 else (rows - HELD_OUT) // plan.lanes // 2, 0)
    begin = time.process_time()
    stream = batches(dict.fromkeys(range(plan.lanes), half))
    next(stream)
    resume = time.process_time() - begin
    stream.close()
    return {"seconds": seconds, "cpu": processor, "resume": resume, "step": per_step, "mib": peak}


def peak_memory() -> float:
    """Largest resident memory of this program, in MiB; that of `getrusage` is its parent's where that had more."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def main() -> None:
    """Measure all sizes in both layouts, and print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the files are, or are written")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "ROWS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure[0], int(arguments.measure[1]))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.folder or Path(temporary)
        for name, (files, group) in LAYOUTS.items():
            results: dict[int, list[dict[str, float]]] = {rows: [] for rows in arguments.rows}
            folders = {rows: root / f"{name.replace(' ', '-')}-{rows}" for rows in arguments.rows}
            for rows, folder in folders.items():
                if not folder.exists():
                    write_rows(folder, rows, files, group)
            for number in range(arguments.rounds):
                for rows in arguments.rows[:: -1 if number % 2 else 1]:
                    command = [sys.executable, __file__, "--measure", str(folders[rows]), str(rows)]
                    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                    results[rows].append(json.loads(output.splitlines()[-1]))
            print_table(name, results)


def print_table(name: str, results: dict[int, list[dict[str, float]]]) -> None:
    """Print the medians, and the ratios to the smallest number of rows."""
    smallest = results[min(results)]
    print(f"{name}\n      rows  seconds  ratio     cpu  ratio  resume  per step    MiB   more")
    for rows, runs in results.items():
        middle = {key: median(run[key] for run in runs) for key in runs[0]}
        pairs = list(zip(runs, smallest, strict=True))
        wall, cpu = (median(run[key] / first[key] for run, first in pairs) for key in ("seconds", "cpu"))
        more = median(run["mib"] - first["mib"] for run, first in pairs)
        print(
            f"{rows:>10,} {middle['seconds']:>8.3f} {wall:>6.2f} {middle['cpu']:>7.3f} {cpu:>6.2f}"
            f" {middle['resume']:>7.3f}"
            f" {1e3 * middle['step']:>7.2f}ms {middle['mib']:>6.0f} {more:>+6.1f}"
        )


if __name__ == "__main__":
    main()

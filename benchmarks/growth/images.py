"""Start, memory and time of a batch against the number of images: in memory, from the cache, and streamed."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_data import SEED, own_memory, save_rows

from growth.fit import fit_power, print_table

KINDS = {
    "in memory": {"cache_images": "never"},
    "cached, first start": {"cache_images": "always"},
    "cached, later start": {"cache_images": "always"},
    "streamed": {"streaming": True, "validation_fraction": None, "validation_examples": 100},
}
BATCH, STEPS, LATER = 64, 200, 2
MOST_IN_MEMORY = 300_000  # a run caches 10,000 images or more unless it is told not to


def measure(kind: str, folder: str, cache: str) -> None:
    """Print the figures of a start in this process."""
    import datasets
    import torch

    from diffusers_ddpm_ext.training.config.data_options import DataOptions
    from diffusers_ddpm_ext.training.data.batches import batch_stream
    from diffusers_ddpm_ext.training.data.dataset import load_data
    from diffusers_ddpm_ext.training.data.streaming.batches import BatchLayout, stream_batches

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    options = DataOptions(dataset_name=folder, resolution=(8, 8), cache_dir=cache, **KINDS[kind])  # type: ignore[arg-type]
    before, start = own_memory(), time.process_time()
    data = load_data(options)
    if data.stream is None:
        batches = batch_stream(data.train, SEED, BATCH)
    else:
        plan = data.stream.plan(BATCH)
        batches = stream_batches(data.stream.decoder(data.train), plan, BatchLayout(BATCH), SEED)
    next(batches)
    ready, steps = time.process_time() - start, []
    for _ in range(STEPS):
        start = time.process_time()
        next(batches)
        steps.append(time.process_time() - start)
    print(json.dumps({"ready": ready, "memory": own_memory() - before, "step": 1e3 * statistics.median(steps)}))


def starts_of(kind: str, place: Path, cache: Path) -> dict[str, float]:
    """Figures of a start; of several later ones the least."""
    found = []
    for _ in range(1 if kind in ("in memory", "cached, first start") else LATER):
        script = str(Path(__file__).parents[1] / "bench_growth.py")
        command = [sys.executable, script, "images", "--measure", kind, str(place), str(cache)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found.append(json.loads(output.splitlines()[-1]))
    return {name: min(each[name] for each in found) for name in found[0]}


def main(counts: list[int], folder: Path | None = None) -> None:
    """Print a row for each kind and number, and the exponents."""
    with tempfile.TemporaryDirectory() as name:
        root = folder or Path(name)
        for count in {*counts, *(min(count, MOST_IN_MEMORY) for count in counts)}:
            if not (root / str(count)).exists():
                save_rows(root / str(count), count, "parquet")
        rows = []
        for kind in KINDS:
            sizes = [min(count, MOST_IN_MEMORY) for count in counts] if kind == "in memory" else counts
            facts = [starts_of(kind, root / str(count), root / "cache") for count in sizes]
            for label, key, digits in (
                ("start, CPU s", "ready", 2),
                ("memory, MiB", "memory", 1),
                ("a batch of 64, ms", "step", 2),
            ):
                values = [fact[key] for fact in facts]
                exponent = fit_power(sizes, values) if min(values) > 0 else "-"
                shown = kind if sizes == counts else f"{kind} (the last: {sizes[-1]:,})"
                rows.append((shown, label, *(f"{value:.{digits}f}" for value in values), exponent))
                print(rows[-1], file=sys.stderr, flush=True)
    print_table(["images", "", *(f"{count:,}" for count in counts), "exponent"], rows)

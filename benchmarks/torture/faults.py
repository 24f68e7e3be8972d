"""Random single-bit and truncation faults in checkpoint files: is each one reported, and an older checkpoint used?

    python benchmarks/torture/faults.py [--count 3000] [--seed 0]

A run folder has two checkpoints. Each fault changes one file of the newer one (every file in turn, including the
manifest, so that small files are covered); then the folder is searched as a resuming run would do. A fault is *silent*
if the damaged folder is used, and *unnamed* if the reason does not name the changed file.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from diffusers_ddpm_ext.training.checkpoints.folders import newest
from diffusers_ddpm_ext.training.checkpoints.writer import write_checkpoint

SIZES = {"model": 20_000, "ema": 20_000, "optimizer": 40_000, "logvar": 400}  # bytes of tensor data


@dataclass
class Tally:
    """Results of the faults: how many of each kind, and a line for each that was not handled correctly."""

    faults: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    silent: list[str] = field(default_factory=list)
    unnamed: list[str] = field(default_factory=list)


def fill(folder: Path) -> None:
    """Write files like those of a checkpoint: tensors in safetensors, and JSON."""
    draw = random.Random(0)
    for name, size in SIZES.items():
        header = json.dumps({"x": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
        data = struct.pack("<Q", len(header)) + header + draw.randbytes(size)
        (folder / f"{name}.safetensors").write_bytes(data)
    (folder / "state.json").write_text(json.dumps({"epoch": 3, "records": 4096, "monitor": [0.1, 0.25]}))
    (folder / "config.json").write_text(json.dumps({"seed": 7, "learning_rate": 1e-4}))


def damage(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    """One fault: half of them flip a bit, the others truncate the file, possibly to nothing."""
    if draw.random() < 0.5:
        bit = draw.randrange(8 * len(data))
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        return f"bit {bit}", bytes(changed)
    length = draw.randrange(len(data))
    return f"cut to {length}", data[:length]


def torture(folder: Path, count: int, seed: int) -> Tally:
    """Damage a checkpoint repeatedly, restoring it in between.

    Args:
        folder: an empty folder, which becomes a run's folder.
        count: number of faults.
        seed: random seed.

    Returns:
        The results.
    """
    older, newer = write_checkpoint(folder, 4, fill), write_checkpoint(folder, 8, fill)
    files = sorted(path for path in newer.iterdir())
    draw, tally = random.Random(seed), Tally()
    for number in range(count):
        file = files[number % len(files)]
        original = file.read_bytes()
        fault, data = damage(original, draw)
        file.write_bytes(data)
        search = newest(folder)
        line = f"{file.name}, {fault}: {search.damaged}"
        if search.checkpoint is None or search.checkpoint.path != older:
            tally.silent.append(line)
        elif [path for path, _ in search.damaged] != [newer] or file.name not in search.damaged[0][1]:
            tally.unnamed.append(line)
        tally.faults += 1
        kind = fault.split()[0]
        tally.kinds[kind] = tally.kinds.get(kind, 0) + 1
        file.write_bytes(original)
    assert newest(folder).damaged == [], "restoring failed: the results are invalid"
    return tally


def main() -> int:
    """Run it and print the results; status 1 if any fault was silent or unnamed."""
    parser = argparse.ArgumentParser(description="Random faults in the files of a checkpoint.")
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start_time = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        tally = torture(Path(name), arguments.count, arguments.seed)
    kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(tally.kinds.items()))
    print(f"faults   {tally.faults} ({kinds}), seed {arguments.seed}")
    print(f"silent   {len(tally.silent)}")
    print(f"unnamed  {len(tally.unnamed)}")
    print(f"seconds  {time.perf_counter() - start_time:.1f}")
    print(*tally.silent, *tally.unnamed, sep="\n", end="")
    return 1 if tally.silent or tally.unnamed else 0


if __name__ == "__main__":
    sys.exit(main())

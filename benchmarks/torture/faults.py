"""Random single-bit and truncation faults over the files of a checkpoint: is each one named, and an older one taken?

    python benchmarks/torture/faults.py [--count 3000] [--seed 0]

A run folder holds two checkpoints. Each fault strikes one file of the newer one (every file in turn, the manifest
among them, so that small files get their share); then the folder is searched as a resuming run would. A fault is
*silent* if the damaged folder is taken, and *unnamed* if the reason does not name the file that was struck.
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
    """What came of the faults: how many of each kind, and a line for each that went wrong."""

    faults: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    silent: list[str] = field(default_factory=list)
    unnamed: list[str] = field(default_factory=list)


def fill(folder: Path) -> None:
    """Files like those of a checkpoint: tensors in safetensors, and JSON."""
    draw = random.Random(0)
    for name, size in SIZES.items():
        header = json.dumps({"x": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
        data = struct.pack("<Q", len(header)) + header + draw.randbytes(size)
        (folder / f"{name}.safetensors").write_bytes(data)
    (folder / "state.json").write_text(json.dumps({"epoch": 3, "records": 4096, "monitor": [0.1, 0.25]}))
    (folder / "config.json").write_text(json.dumps({"seed": 7, "learning_rate": 1e-4}))


def strike(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    """One fault: half of them flip a bit, the others cut the end off (now and then all of it)."""
    if draw.random() < 0.5:
        bit = draw.randrange(8 * len(data))
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        return f"bit {bit}", bytes(changed)
    length = draw.randrange(len(data))
    return f"cut to {length}", data[:length]


def torture(folder: Path, count: int, seed: int) -> Tally:
    """Strike a checkpoint again and again, mending it in between.

    Args:
        folder: empty; a run's folder from now on.
        count: faults.
        seed: of the faults.

    Returns:
        What came of them.
    """
    older, newer = write_checkpoint(folder, 4, fill), write_checkpoint(folder, 8, fill)
    files = sorted(path for path in newer.iterdir())
    draw, tally = random.Random(seed), Tally()
    for number in range(count):
        file = files[number % len(files)]
        whole = file.read_bytes()
        fault, data = strike(whole, draw)
        file.write_bytes(data)
        found = newest(folder)
        line = f"{file.name}, {fault}: {found.damaged}"
        if found.checkpoint is None or found.checkpoint.path != older:
            tally.silent.append(line)
        elif [path for path, _ in found.damaged] != [newer] or file.name not in found.damaged[0][1]:
            tally.unnamed.append(line)
        tally.faults += 1
        kind = fault.split()[0]
        tally.kinds[kind] = tally.kinds.get(kind, 0) + 1
        file.write_bytes(whole)
    assert newest(folder).damaged == [], "mending failed: the figures mean nothing"
    return tally


def main() -> int:
    """Run it and print the figures; status 1 if any fault was silent or unnamed."""
    parser = argparse.ArgumentParser(description="Random faults over the files of a checkpoint.")
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        tally = torture(Path(name), arguments.count, arguments.seed)
    kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(tally.kinds.items()))
    print(f"faults   {tally.faults} ({kinds}), seed {arguments.seed}")
    print(f"silent   {len(tally.silent)}")
    print(f"unnamed  {len(tally.unnamed)}")
    print(f"seconds  {time.perf_counter() - began:.1f}")
    print(*tally.silent, *tally.unnamed, sep="\n", end="")
    return 1 if tally.silent or tally.unnamed else 0


if __name__ == "__main__":
    sys.exit(main())

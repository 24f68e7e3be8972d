"""Seconds of the processor that commands take from the start of Python to their end, this version beside another one.

    python benchmarks/bench_startup.py OTHER_CLONE [--rounds 3] [--run FOLDER]

Every command is a process of its own, this clone's and the other's in turns; ``user`` and ``system`` time of the
process and its children are counted, one thread each, so that a busy machine disturbs less than by the clock.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "version": ["-m", "diffusers_ddpm_ext", "--version"],
    "report --help": ["-m", "diffusers_ddpm_ext", "report", "--help"],
    "report": ["-m", "diffusers_ddpm_ext", "report", "RUN", "--out", "SCRATCH/report.html"],
    "plot": ["-m", "diffusers_ddpm_ext", "plot", "RUN", "--out", "SCRATCH/plots"],
    "doctor FOLDER": ["-m", "diffusers_ddpm_ext", "doctor", "RUN", "--offline"],
    "train.py --dry_run": ["training/train.py", "--dry_run", "--output_dir", "SCRATCH/dry"],
    "train.py, 1 step": [
        "training/train.py",
        "--max_train_steps",
        "1",
        "--output_dir",
        "SCRATCH/out",
        "--overwrite_output_dir",
    ],
}


def seconds(clone: Path, command: list[str], run: Path, scratch: Path) -> float:
    """Processor's seconds of one process; RuntimeError if it fails."""
    arguments = [word.replace("RUN", str(run)).replace("SCRATCH", str(scratch)) for word in command]
    environment = os.environ | {"PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=clone, env=environment, capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} in {clone}: {done.stderr[-500:]}")
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="clone of the version to compare with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", type=Path, help="finished run; by default one of 2 steps is made")
    parser.add_argument("--commands", nargs="*", default=list(COMMANDS), choices=list(COMMANDS), metavar="NAME")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        run = arguments.run
        if run is None:
            run = scratch / "run"
            seconds(ROOT, ["training/train.py", "--max_train_steps", "2", "--output_dir", str(run)], run, scratch)
        print("| command | other, s | this, s | other / this |\n|---|---|---|---|")
        for title in arguments.commands:
            times: dict[Path, list[float]] = {arguments.other.resolve(): [], ROOT: []}
            for turn in range(arguments.rounds):
                for clone in list(times)[:: 1 if turn % 2 else -1]:
                    times[clone].append(seconds(clone, COMMANDS[title], run.resolve(), scratch))
            old, new = (median(values) for values in times.values())
            print(f"| `{title}` | {old:.2f} | {new:.2f} | {old / new:.1f}x |", flush=True)


if __name__ == "__main__":
    main()

"""Bit-exact resume on the device: 12 steps, the same again, and the last 6 again from the checkpoint of step 6.

The second run shows whether the device itself repeats its numbers; only then a difference of the third is one of the
resume. Compared are the weights, the average and the optimizer of the last checkpoint, byte by byte.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import TINY, arguments, write
from stock.contenders import Job, environment, our_command, save_images

STEPS = 12


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a command."""
    with log.open("wb") as file:
        return subprocess.Popen(command, env=environment(1, stock=False), stdout=file, stderr=file)


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for a command; SystemExit with the end of its output where it failed."""
    if process.wait():
        sys.exit(f"error: a run ended with status {process.returncode}:\n{log.read_text(errors='replace')[-3000:]}")


def digests(run_folder: Path) -> dict[str, str]:
    """sha256 of the tensors' files of the last checkpoint."""
    files = sorted((run_folder / f"checkpoint-{STEPS}").glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def main() -> None:
    """Write whether the three runs are equal."""
    args = arguments(__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_images(folder / "images", TINY.side, 64)
        job = Job(TINY, STEPS // 2, folder / "images", "bf16" if torch.cuda.is_available() else "no")

        def command(output: str, *options: str) -> list[str]:
            kept = [part for part in our_command(job, folder / output) if not part.startswith("--max_train_steps")]
            return [*kept, f"--max_train_steps={STEPS}", *options]

        logs = {name: folder / f"{name}.log" for name in ("whole", "again", "resumed")}
        runs = {name: start(command(name), logs[name]) for name in ("whole", "again")}
        for name, process in runs.items():
            finish(process, logs[name])
        shutil.copytree(folder / "whole", folder / "resumed")
        half = folder / "resumed" / f"checkpoint-{STEPS // 2}"
        finish(start(command("resumed", f"--resume_from_checkpoint={half}"), logs["resumed"]), logs["resumed"])
        whole, again, resumed = (digests(folder / name) for name in ("whole", "again", "resumed"))
    if not whole:
        sys.exit("error: the run left no checkpoint to compare")
    write(args.out, whole == resumed, files=len(whole), repeats=whole == again, resumed_is_equal=whole == resumed)


if __name__ == "__main__":
    main()

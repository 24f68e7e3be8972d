"""A launcher that is terminated must end its training processes, and leave checkpoints that load.

    python benchmarks/torture/signals.py [--times 20] [--processes 1 2] [--seed 0] [--folder FOLDER]

Starts `accelerate launch training/train.py`, or alternately `torchrun --nproc_per_node 2 training/train.py`, and
sends SIGTERM, then in other runs SIGKILL, to the launcher alone at a random moment of the run. Ten seconds later no
process of the run may remain, every checkpoint must verify, and the same command must resume. Exit status 1 otherwise.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from diffusers_ddpm_ext.training.checkpoints.folders import list_checkpoints
from diffusers_ddpm_ext.training.checkpoints.manifest import DamagedCheckpoint, verify

SCRIPT = Path(__file__).parents[2] / "training" / "train.py"
ARGUMENTS = (
    "--max_train_steps 400 --checkpointing_steps 5 --checkpoints_total_limit 2 --seed 7 --learn_logvar "
    "--train_batch_size 8 --dataloader_num_workers 1 --resume_from_checkpoint auto --block_out_channels 8 16 "
    "--validation_steps 20 --save_images_steps 50 --num_preview_images 2 --ddpm_num_inference_steps 20"
)
LAUNCHERS = {
    1: ["-m", "accelerate.commands.launch"],
    2: ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}
SECONDS_TO_EXIT = 10


def start(folder: Path, processes: int) -> subprocess.Popen[bytes]:
    """Start the launcher."""
    command = [sys.executable, *LAUNCHERS[processes], str(SCRIPT), *ARGUMENTS.split(), "--output_dir", str(folder)]
    log = open(f"{folder}.log", "ab")  # noqa: SIM115 - the processes use it
    return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})


def alive(folder: Path) -> list[int]:
    """Processes whose command line names the folder, data workers included."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_bytes().split(b"\0")
            if str(folder).encode() in arguments and b"Z" not in (path.parent / "stat").read_bytes().split()[2:3]:
                pids.append(int(path.parent.name))
        except OSError:
            continue
    return pids


def steps(folder: Path) -> int:
    """Number of lines in metrics.jsonl."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def terminate_one(folder: Path, processes: int, number: signal.Signals, draw: random.Random) -> str:
    """Start a run and terminate its launcher; return a description of the problem, "" if there is none."""
    launcher = start(folder, processes)
    before, early = steps(folder), draw.random() < 0.2
    while launcher.poll() is None and not early and steps(folder) <= before:
        time.sleep(0.01)
    time.sleep(draw.random() * (4 if early else 2))
    if launcher.poll() is not None:
        return f"the run ended before it could be terminated, status {launcher.returncode}"
    launcher.send_signal(number)
    sent = time.monotonic()
    while alive(folder) and time.monotonic() - sent < SECONDS_TO_EXIT:
        launcher.poll()
        time.sleep(0.05)
    orphans = [pid for pid in alive(folder) if pid != launcher.pid]
    for pid in alive(folder):
        os.kill(pid, signal.SIGKILL)
    launcher.wait()
    if orphans:
        return f"{len(orphans)} orphans after {SECONDS_TO_EXIT} s"
    try:
        for path in list_checkpoints(folder):
            verify(path)
    except DamagedCheckpoint as error:
        return str(error)
    return ""


def main() -> int:
    """Terminate launchers, check, and resume."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="repetitions of each signal")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], choices=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    base = options.folder or Path(tempfile.mkdtemp())
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    draw, wrong = random.Random(options.seed), 0
    for number in (signal.SIGTERM, signal.SIGKILL):
        good = 0
        for turn in range(options.times):
            processes = options.processes[turn % len(options.processes)]
            folder = base / f"run-{processes}"
            if steps(folder) > 300:
                shutil.rmtree(folder)
            problem = terminate_one(folder, processes, number, draw)
            good += not problem
            print(f"{number.name} {turn + 1}, {processes} processes: {problem or 'ended, intact'}", flush=True)
        print(f"{number.name}: {good} of {options.times}", flush=True)
        wrong += options.times - good
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())

"""Memory and time of a step against the number of steps that are done, in one run of the real command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from growth.fit import fit_line, print_table

TICKS = os.sysconf("SC_CLK_TCK")
BLOCKS = 20
OPTIONS = (
    "--resolution 8 --block_out_channels 8 16 --layers_per_block 1 --norm_num_groups 4 --attention_levels none"
    " --train_batch_size 4 --learn_logvar --logging_steps 10 --report_to tensorboard"
    " --validation_steps 200 --validation_max_images 16 --save_images_steps 200 --num_preview_images 4"
    " --ddpm_num_inference_steps 4 --checkpointing_steps 100 --checkpoints_total_limit 2"
)


@dataclass(frozen=True)
class Sample:
    """State of the process after a step: memory that is its own, and the processor's seconds for its own code."""

    step: int
    own_bytes: int
    user_seconds: float


class StepReader:
    """Reads the last step in a ``metrics.jsonl`` that grows, each byte once."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset, self.step, self.rest = path, 0, 0, b""

    def read(self) -> int:
        """The last complete row's step; 0 before the first."""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read()
            self.offset += len(data)
            *lines, self.rest = (self.rest + data).split(b"\n")
            if lines:
                self.step = json.loads(lines[-1])["step"]
        return self.step


def read_process(pid: int, step: int) -> Sample:
    """Read a process' memory, without mapped files, and user time from ``/proc``."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    own = sum(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return Sample(step, own, int(fields[11]) / TICKS)


def watch_run(steps: int, folder: Path, options: list[str]) -> list[Sample]:
    """Train with the real command, and sample its process once a second; a SIGTERM to it ends this early."""
    command = [sys.executable, "-m", "diffusers_ddpm_ext", "train", "--output_dir", str(folder)]
    command += [*options, "--max_train_steps", str(steps)]
    reader, samples = StepReader(folder / "metrics.jsonl"), []
    with open(folder.parent / "output.txt", "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        while process.poll() is None:
            try:
                step = reader.read()
                if 0 < step < steps:  # after the last step the final images are drawn
                    samples.append(read_process(process.pid, step))
            except (FileNotFoundError, ProcessLookupError):
                pass
            time.sleep(1)
    if process.returncode not in (0, 143):
        raise SystemExit((folder.parent / "output.txt").read_text()[-2000:])
    return samples


def block_rows(samples: list[Sample], steps: int) -> list[tuple[int, float, float]]:
    """For each of `BLOCKS` parts of a run: its end, the median of the memory, and user seconds per step."""
    rows, width = [], steps // BLOCKS
    for number in range(BLOCKS):
        block = [each for each in samples if number * width <= each.step < (number + 1) * width]
        if len(block) < 2 or block[-1].step == block[0].step:
            continue
        seconds = (block[-1].user_seconds - block[0].user_seconds) / (block[-1].step - block[0].step)
        rows.append(((number + 1) * width, median(each.own_bytes for each in block), seconds))
    return rows


def main(steps: int, folder: Path | None = None) -> None:
    """Run, and print the table and the slopes without the first tenth."""
    with tempfile.TemporaryDirectory() as name:
        root = folder or Path(name)
        root.mkdir(parents=True, exist_ok=True)
        samples = watch_run(steps, root / "run", OPTIONS.split())
    rows = block_rows(samples, steps)
    shown = [rows[index] for index in (1, 3, 7, 11, 15, len(rows) - 1) if index < len(rows)]
    print_table(
        ["steps done", "memory, MiB", "user ms per step"],
        [(f"{end:,}", f"{own / 2**20:.1f}", f"{1e3 * seconds:.2f}") for end, own, seconds in shown],
    )
    ends, memory, seconds = zip(*rows[BLOCKS // 10 :], strict=True)
    bytes_per_step, drift = fit_line(ends, memory), fit_line(ends, seconds)
    scale = 1e4 * 100 / median(seconds)
    print(f"\nmemory: {bytes_per_step} bytes per step; time of a step:", end=" ")
    print(f"{scale * drift.value:+.2f} +- {scale * drift.margin:.2f} % in 10,000 steps")

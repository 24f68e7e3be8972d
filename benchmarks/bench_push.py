"""Cost of pushing during training: the same run with and without `--push_to_hub --hub_strategy every_save`.

    python benchmarks/bench_push.py [--rounds 3] [--steps 400] [--every 2]

The Hub is that of the tests, on the loopback, in this process. Runs of the default digits network alternate; the
wall-clock time of their steps is read from timing.jsonl, which excludes sample images, validation and saving. The
pipeline is saved, and pushed, every `--every` epochs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from helpers.hub_server import LoopbackHub  # noqa: E402


def seconds(folder: Path) -> float:
    """Seconds per step, over all steps after the first logging interval."""
    rows = [json.loads(line) for line in (folder / "timing.jsonl").read_text().splitlines()]
    return float(rows[-1]["seconds"] - rows[0]["seconds"]) / (rows[-1]["step"] - rows[0]["step"])


def main() -> int:
    """Train alternately and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=2, help="epochs between two saves (26 steps each)")
    arguments = parser.parse_args()
    ratios, pushes = [], 0
    with LoopbackHub({"hf_writer": "write"}) as hub, tempfile.TemporaryDirectory() as name:
        environment = os.environ | hub.environment(f"{name}/home", "hf_writer") | {"PYTHONPATH": str(ROOT)}
        for turn in range(arguments.rounds):
            cost = {}
            for pushing in (turn % 2 == 0, turn % 2 == 1):
                folder = Path(name, f"{turn}-{pushing}")
                command = [
                    sys.executable, "-m", "diffusers_ddpm_ext", "train", "--output_dir", str(folder),
                    "--max_train_steps", str(arguments.steps), "--save_model_epochs", str(arguments.every),
                    "--save_images_epochs", "none", "--ddpm_num_inference_steps", "20", "--report_to", "none",
                ]  # fmt: skip
                command += ["--push_to_hub", "--hub_strategy", "every_save"] if pushing else []
                subprocess.run(command, env=environment, check=True, capture_output=True)
                cost[pushing] = seconds(folder)
            pushes += len(hub.repos[f"alice/{turn}-True"].commits) - 1
            ratios.append(cost[True] / cost[False])
            print(
                f"round {turn + 1}: {1000 * cost[False]:.1f} ms per step, pushing {1000 * cost[True]:.1f} ms",
                flush=True,
            )
    rounds = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    print(f"| {arguments.steps} steps | {pushes} pushes | {statistics.median(ratios):.3f}x | {rounds} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())

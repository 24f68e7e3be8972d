"""The digits: the default recipe against the former one, in turns: seconds of the processor, and quality.

    python benchmarks/digits_recipes.py FOLDER [--seeds 0 1 2] [--num_images 2997] [--steps 100]

Both are whole commands, `accelerate launch training/train.py` of this clone, one after the other in an order that
changes with each seed; the former recipe had 4,000 steps on linear betas. Runs are kept in FOLDER, and the same
command goes on after the last one that was finished. Then digits_quality.py measures the runs of the default recipe.
Exit status 1 if a run takes more than 0.42 of the former one's seconds, has less than 0.97 of the confidence of real
digits, or more than 0.9 of their Frechet distance.

On one core, as `taskset -c 0 python ...`, other programs and the number of threads change the seconds least.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", str(HERE.parent / "training" / "train.py"))
FORMER = (
    "--beta_schedule linear --learning_rate 2e-3 --lr_scheduler cosine --ema_decay 0.999 --ema_use_num_updates true "
    "--max_train_steps 4000 --eval_batch_size 16 --validation_steps 500 --save_images_steps 1000 --attention_levels 1"
)
RECIPES = {"default": "", "former": FORMER}
MOST_TIME, LEAST_CONFIDENCE, MOST_DISTANCE = 0.42, 0.97, 0.9


def main() -> int:
    """Train both recipes with each seed, and measure the default one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_images", type=int, default=2997)
    parser.add_argument("--steps", type=int, default=100, help="of sampling")
    options = parser.parse_args()
    if options.folder.exists() and not options.folder.is_dir():
        parser.error(f"{options.folder} is a file: name a folder")
    options.folder.mkdir(parents=True, exist_ok=True)
    is_met = True
    for place, seed in enumerate(options.seeds):
        for name in sorted(RECIPES, reverse=bool(place % 2)):
            train(options.folder, name, seed)
    for seed in options.seeds:
        seconds = {name: json.loads(record(options.folder, name, seed).read_text("utf-8")) for name in RECIPES}
        ratio = seconds["default"] / seconds["former"]
        confidence, distance = quality(options.folder / f"default-{seed}", options.num_images, options.steps)
        met = ratio <= MOST_TIME and confidence >= LEAST_CONFIDENCE and distance <= MOST_DISTANCE
        print(
            f"seed {seed}: {seconds['default']:.0f} of {seconds['former']:.0f} CPU s, {ratio:.3f}; confidence "
            f"{confidence:.3f}, Frechet {distance:.3f} of real: {'met' if met else 'NOT MET'}",
            flush=True,
        )
        is_met = is_met and met
    return 0 if is_met else 1


def record(folder: Path, name: str, seed: int) -> Path:
    """File with the seconds of the processor of a finished run."""
    return folder / f"{name}-{seed}.json"


def train(folder: Path, name: str, seed: int) -> None:
    """Run a recipe from its start, unless it has finished."""
    if record(folder, name, seed).exists():
        return
    words = [*LAUNCH, "--seed", str(seed), "--output_dir", str(folder / f"{name}-{seed}"), "--overwrite_output_dir"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with open(folder / f"{name}-{seed}.log", "wb") as log:
        subprocess.run([*words, *RECIPES[name].split()], check=True, stdout=log, stderr=log)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    record(folder, name, seed).write_text(json.dumps(seconds), encoding="utf-8")
    print(f"{name}, seed {seed}: {seconds:.1f} CPU s, load {os.getloadavg()[0]:.1f}", flush=True)


def quality(run: Path, num_images: int, steps: int) -> tuple[float, float]:
    """Confidence and Frechet distance of a run's samples, relative to real digits."""
    words = [sys.executable, str(HERE / "digits_quality.py"), str(run), "--num_images", str(num_images)]
    lines = subprocess.run([*words, "--steps", str(steps)], stdout=subprocess.PIPE, text=True).stdout
    found = [re.search(rf"^{name} .*ratio ([0-9.]+)$", lines, re.MULTILINE) for name in ("confidence", "Frechet")]
    if not all(found):
        sys.exit(f"error: digits_quality.py did not measure {run}")
    confidence, distance = (float(match[1]) for match in found if match)
    return confidence, distance


if __name__ == "__main__":
    sys.exit(main())

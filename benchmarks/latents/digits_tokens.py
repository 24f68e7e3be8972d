"""Class-conditional digits through cross attention: trained, sampled, classified.

    python benchmarks/latents/digits_tokens.py FOLDER [--train_steps 1500]

The network is a `UNet2DConditionModel` of the recipe `digits`' sizes, whose tokens of cross attention are the rows of
a table, one per class, that is trained with it (CompVis' ``ClassEmbedder``). A logistic regression that was trained on
half of the real digits (../digits_classes.py) classifies 500 samples; at least 95 % must be the requested digit.
``FOLDER/digits_tokens.json`` has the shares and the seconds, ``FOLDER/digits_tokens.png`` ten samples of each digit, a
column per digit.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> int:
    """Train unless that is done, sample and classify."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train_steps", type=int, default=1500)
    parser.add_argument("--sampling_steps", type=int, default=50)
    options = parser.parse_args()
    run, report_file = options.folder / "run", options.folder / "digits_tokens.json"
    seconds_file = options.folder / "seconds.json"
    if not seconds_file.exists():
        ddpm_ext("train", "--conditioning_key", "crossattn", "--conditioning_dropout", '{"class_labels": 0.1}',
                 "--max_train_steps", str(options.train_steps), "--no_learn_logvar", "--validation_steps", "0",
                 "--save_images_steps", "1000000", "--num_preview_images", "10", "--ddpm_num_inference_steps", "20",
                 "--output_dir", str(run), "--overwrite_output_dir")  # fmt: skip
        seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        seconds_file.write_text(json.dumps({"training": seconds}) + "\n", encoding="utf-8")
    steps = str(options.sampling_steps)
    ddpm_ext("sample", str(run), "--num_images", "100", "--num_inference_steps", steps,
             "--out", str(options.folder / "digits_tokens.png"))  # fmt: skip
    script = str(HERE.parent / "digits_classes.py")
    classify = [sys.executable, script, str(run), "--steps", steps, "--required", "0.95",
                "--guidance_scale", "1", "2", "--json", str(report_file)]  # fmt: skip
    status = subprocess.run(classify).returncode
    report = json.loads(report_file.read_text(encoding="utf-8"))
    report |= {"training_steps": options.train_steps, "cpu_seconds": json.loads(seconds_file.read_text())}
    report_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return status


def ddpm_ext(*arguments: str) -> None:
    """Run a command of the package on one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "diffusers_ddpm_ext", *arguments], check=True, env=environment)


if __name__ == "__main__":
    sys.exit(main())

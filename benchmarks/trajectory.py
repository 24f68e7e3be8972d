"""Fingerprints of short runs, to show that a refactor changes no result.

Runs small trainings and the commands that read their folders, and writes the sha256 of every file whose bytes must not
change. Run it on two versions, on the same machine and number of threads, and compare:

    python benchmarks/trajectory.py OUT [--package FOLDER_OF_ANOTHER_CHECKOUT] [--compare OUT_OF_ANOTHER]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
STEPS = "--max_train_steps 30 --validation_steps 15 --logging_steps 1"
FOLDER_RUN = (
    "--train_data_dir images --resolution 8 --random_flip --gradient_accumulation_steps 2 --dataloader_num_workers 1"
    " --timestep_sampler loss_second_moment --loss_weighting min_snr --block_out_channels 32 64 --layers_per_block 1"
    " --attention_levels 1 --norm_num_groups 32 --train_batch_size 8 --checkpointing_steps 13 --lr_warmup_steps 5"
    " --num_train_timesteps 100 --ddpm_num_inference_steps 10 --learn_logvar --report_to none"
)
GOLDEN = ROOT / "tests" / "golden" / "h_ckpt" / "latent_logvar"
COMMANDS = {
    "digits": f"train {STEPS} --output_dir digits",
    "hybrid": f"train --config digits_hybrid {STEPS} --output_dir hybrid",
    "classes": f"train --config digits_classes {STEPS} --output_dir classes",
    "folder": f"train {FOLDER_RUN} {STEPS} --output_dir folder",
    "resumed": f"train {FOLDER_RUN} {STEPS} --output_dir resumed --resume_from_checkpoint folder/checkpoint-13",
    "sample": "sample digits --num_images 8 --num_inference_steps 20 --out digits.png",
    "sample-classes": "sample classes --num_images 8 --num_inference_steps 20 --class_labels 3 5 --guidance_scale 2"
    " --out classes.png",
    "sample-hybrid": "sample hybrid --num_images 8 --num_inference_steps 20 --individual hybrid-images"
    " --out hybrid.npz",
    "evaluate": "evaluate digits --num_timesteps 5 --max_images 20 --json evaluate.json",
    "fit-variance": "fit-variance digits --draws 2 --max_steps 5",
    "to-compvis": "convert --to compvis folder --out folder.ckpt --config_out folder.yaml",
    "from-own": "convert --from compvis --checkpoint folder.ckpt --config folder.yaml --out folder-back",
    "from-compvis": f"convert --from compvis --checkpoint {GOLDEN}.ckpt --config {GOLDEN}.yaml --out latent",
}
FINGERPRINTED = {".jsonl", ".safetensors", ".png", ".json", ".npz", ".ckpt", ".yaml", ".npy"}
MACHINE_DEPENDENT = {"environment.json", "manifest.json", "timing.jsonl"}


def make_images(folder: Path) -> None:
    """Write 48 images of smooth noise, the same everywhere."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(48):
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(np.kron(pixels, np.ones((3, 3, 1), dtype=np.uint8))).save(folder / f"{number:02}.png")


def fingerprints(out: Path) -> dict[str, str]:
    """The sha256 of every file below a folder that must not change, by relative path."""
    files = sorted(path for path in out.rglob("*") if path.suffix in FINGERPRINTED and path.is_file())
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name not in MACHINE_DEPENDENT and path.name != "fingerprints.json"
    }


def main() -> int:
    """Run every command, write the fingerprints, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("out", type=Path, help="the folder to create")
    parser.add_argument("--package", type=Path, default=ROOT, help="the checkout to run (default: this one)")
    parser.add_argument("--compare", type=Path, help="fingerprints.json of another version")
    args = parser.parse_args()
    out = args.out.resolve()
    make_images(out / "images")
    environment = os.environ | {"PYTHONPATH": str(args.package.resolve()), "OMP_NUM_THREADS": "1"}
    for name, command in COMMANDS.items():
        completed = subprocess.run(
            [sys.executable, "-m", "diffusers_ddpm_ext", *shlex.split(command)],
            cwd=out,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        (out / f"{name}.log").write_text(completed.stdout + completed.stderr, encoding="utf-8")
        print(f"{name}: exit status {completed.returncode}", flush=True)
        if completed.returncode:
            print(completed.stderr[-2000:])
            return 1
    result = fingerprints(out)
    (out / "fingerprints.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{len(result)} files")
    if args.compare is None:
        return 0
    other = json.loads(args.compare.read_text(encoding="utf-8"))
    names = sorted(result.keys() | other.keys())
    differing = [name for name in names if result.get(name) != other.get(name)]
    print(f"{len(names) - len(differing)} of {len(names)} equal", *differing, sep="\n  ")
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())

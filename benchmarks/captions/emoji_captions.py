"""Pictures by prompt: a diffusion model with a tiny text encoder of random weights, frozen and trained.

    python benchmarks/captions/emoji_captions.py FOLDER [--train_steps 800]

One command: draws the set (shapes.py), writes a text encoder of random weights with a tokenizer of its own
(text_model.py), trains the same model of the pixels twice, with the text encoder frozen and with it trained
(``--train_text_encoder``), and samples every caption. The same command goes on after the last step that was finished.
Each training command has one thread; ``seconds.json`` has its processor time in user mode.

A sample is right if its nearest neighbor among all pictures of the set, by the squared distance of the pixels, is
the emoji of its prompt. ``FOLDER/captions.json`` has the shares, by guidance scale: of the names that the runs were
trained on (at least 90 % with the better scale, else exit status 1), of these names after a word that no caption has,
of the names that were left out of the training, and, for what chance gives, of the first ones where the prompts are
shuffled among the samples. ``FOLDER/frozen.png`` and ``trained.png`` have four samples of each name.

Then two short runs with and without stored embeddings, and one that is interrupted and resumed, must have files equal
to the bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from PIL import Image
from shapes import LEFT_OUT
from text_model import write_text_model
from torch import Tensor

from diffusers_ddpm_ext import DDPMExtPipeline
from diffusers_ddpm_ext.plotting.sheets import save_grid

HERE = Path(__file__).parent
STEPS, BATCH, PER_NAME, SCALES = 20, 50, 4, (1.0, 1.5)
COMMON = ["--report_to", "none", "--seed", "0", "--resolution", "12", "--validation_fraction", "0",
          "--save_images_epochs", "100000", "--save_model_epochs", "100000", "--caption_column", "text",
          "--conditioning_dropout", '{"captions": 0.1}', "--block_out_channels", "32", "64", "--attention_levels", "1",
          "--layers_per_block", "1", "--attention_head_dim", "16", "--norm_num_groups", "8",
          "--train_batch_size", "32", "--prediction_type", "v_prediction", "--beta_schedule", "squaredcos_cap_v2",
          "--learning_rate", "2e-3", "--ema_decay", "0.99", "--num_preview_images", "1",
          "--ddpm_num_inference_steps", "5"]  # fmt: skip
RUNS: dict[str, list[str]] = {"frozen": [], "trained": ["--train_text_encoder"]}
REQUIRED = 0.9
PHRASE = "my {}"
SHORT, HALF = 12, 5
"""Optimizer steps of the runs that are compared to the bit, and where one of them is interrupted."""


def main() -> int:
    """Train, sample and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train_steps", type=int, default=800)
    options = parser.parse_args()
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "shapes").exists():
        subprocess.run([sys.executable, HERE / "shapes.py", folder / "shapes"], check=True)
    rows = read_rows(folder / "shapes" / "train")
    names = sorted({row["name"] for row in rows})
    if not (folder / "text").exists():
        write_text_model(folder / "text", sorted({caption for row in rows for caption in row["text"]}))
    data = ["--train_data_dir", str(folder / "shapes" / "train"), "--text_encoder", str(folder / "text"), *COMMON]
    report: dict[str, Any] = {}
    for name, extra in RUNS.items():
        train(folder, name, [*data, *extra, "--max_train_steps", str(options.train_steps)])
        report[name] = measure(folder, name, names)
        print(name, json.dumps(report[name]), flush=True)
    equal = {name: compare_runs(folder / "equal" / name, [*data, *extra]) for name, extra in RUNS.items()}
    report |= {
        "equal": equal,
        "seconds": json.loads((folder / "seconds.json").read_text(encoding="utf-8")),
        "training_steps": options.train_steps,
        "names": len(names),
        "samples_per_name": PER_NAME,
        "sampling_steps": STEPS,
    }
    (folder / "captions.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(equal))
    is_right = all(max(report[name]["captions"].values()) >= REQUIRED for name in RUNS)
    return int(not is_right or not all(all(checks.values()) for checks in equal.values()))


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of ``metadata.jsonl``."""
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def train(folder: Path, name: str, arguments: list[str]) -> None:
    """Train a run into ``folder/name`` unless it has finished, and record its processor time."""
    record = folder / "seconds.json"
    seconds = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    if name in seconds:
        return
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    run("train", *arguments, "--lr_warmup_steps", "50", "--overwrite_output_dir", "--output_dir", str(folder / name))
    seconds[name] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    record.write_text(json.dumps(seconds, indent=2) + "\n", encoding="utf-8")


def run(*arguments: str) -> None:
    """Run a command of the package on one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", "diffusers_ddpm_ext", *arguments], check=True, env=environment)


# ------------------------------------------------------------------ does the prompt decide the picture?


def measure(folder: Path, run_name: str, names: list[str]) -> dict[str, Any]:
    """Shares of samples whose nearest neighbor is the emoji of their prompt, by guidance scale."""
    pipeline = DDPMExtPipeline.from_pretrained(folder / run_name)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline.set_progress_bar_config(disable=True)
    drawings, drawn_names = read_drawings(folder / "shapes" / "all")
    report: dict[str, Any] = {"captions": {}, "new_word": {}, "left_out": {}, "chance": {}}
    for scale in SCALES:
        wanted = [name for name in names for _ in range(PER_NAME)]
        samples = sample(pipeline, wanted, scale)
        nearest = nearest_names(samples, drawings, drawn_names)
        report["captions"][f"{scale:g}"] = share(nearest, wanted)
        report["chance"][f"{scale:g}"] = share(nearest, np.random.default_rng(0).permutation(wanted).tolist())
        if scale == SCALES[0]:
            save_grid(samples * 2 - 1, folder / f"{run_name}.png", columns=4 * PER_NAME, enlarge=1)
            wrong = [(prompt, found) for prompt, found in zip(wanted, nearest, strict=True) if prompt != found]
            report["mistaken"] = {f"{prompt} -> {found}": wrong.count((prompt, found)) for prompt, found in wrong}
        phrases = sample(pipeline, [PHRASE.format(name) for name in names], scale)
        report["new_word"][f"{scale:g}"] = share(nearest_names(phrases, drawings, drawn_names), names)
        left_out = [name for name in LEFT_OUT for _ in range(4 * PER_NAME)]
        found = nearest_names(sample(pipeline, left_out, scale), drawings, drawn_names)
        report["left_out"][f"{scale:g}"] = share(found, left_out)
    return report


def sample(pipeline: DDPMExtPipeline, prompts: list[str], scale: float) -> Tensor:
    """Samples (N, 3, H, W) in [0, 1] of prompts; sample i has seed i; DDIM."""
    parts = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        generators = [torch.Generator().manual_seed(start + number) for number in range(len(part))]
        output = pipeline(
            part, generator=generators, num_inference_steps=STEPS, guidance_scale=scale, output_type="pt"
        )
        parts.append(output.images)
    return torch.cat(parts)


def read_drawings(folder: Path) -> tuple[Tensor, list[str]]:
    """All drawings, (N, 3, H, W) in [0, 1], and their names."""
    rows = read_rows(folder)
    pixels = np.stack([np.asarray(Image.open(folder / str(row["file_name"]))) for row in rows])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, [str(row["name"]) for row in rows]


def nearest_names(samples: Tensor, drawings: Tensor, names: list[str]) -> list[str]:
    """The name of each sample's nearest drawing."""
    return [names[index] for index in torch.cdist(samples.flatten(1), drawings.flatten(1)).argmin(1).tolist()]


def share(found: list[str], wanted: list[str]) -> float:
    """Share of the places where both are the same."""
    return sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)


# ------------------------------------------------------------------ equal to the bit


def compare_runs(folder: Path, arguments: list[str]) -> dict[str, bool]:
    """Whether a short run with stored embeddings, and one that is interrupted, end with the files of a plain run."""
    shutil.rmtree(folder, ignore_errors=True)
    constant = ["--lr_scheduler", "constant", "--lr_warmup_steps", "0", "--checkpointing_steps", str(SHORT)]
    base = ["train", *arguments, *constant, "--resume_from_checkpoint", "auto"]
    is_frozen = "--train_text_encoder" not in arguments
    run(*base, *(["--no_cache_text_embeddings"] if is_frozen else []), *target(folder / "plain", SHORT))
    if is_frozen:
        run(*base, *target(folder / "cached", SHORT))
    for steps in (HALF, SHORT):
        run(*base, *target(folder / "resumed", steps))
    expected = digests(folder / "plain")
    return {path.name: digests(path) == expected for path in sorted(folder.iterdir()) if path.name != "plain"}


def target(folder: Path, steps: int) -> list[str]:
    """Options of the output folder and of the length."""
    return ["--output_dir", str(folder), "--max_train_steps", str(steps)]


def digests(folder: Path) -> dict[str, str]:
    """sha256 of the losses, the saved weights and the last checkpoint of a run."""
    parts = ("unet", "text_encoder", f"checkpoint-{SHORT}")
    files = [path for part in parts for path in sorted((folder / part).glob("*.safetensors"))]
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (*files, folder / "metrics.jsonl")
    }


if __name__ == "__main__":
    sys.exit(main())

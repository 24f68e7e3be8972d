"""Latent diffusion against diffusion of pixels, in the same processor time: emoji by class.

    python benchmarks/latents/emoji_latents.py FOLDER [--scale 1]

One command: draws the set (emoji.py), trains a first stage of factor 4 and a diffusion model of its latents, trains a
diffusion model of the pixels for as long as both together, samples the same seeds from both, and measures the samples
(distances.py). The same command goes on after the last step that was finished. ``--scale 4`` takes four times as many
training steps.

Time is the processor time of the training commands in user mode, on one thread, with loading, validation and saving.
``FOLDER/seconds.json`` has it for every step, ``FOLDER/distances.json`` the distances, ``FOLDER/pixels.png`` and
``FOLDER/latents.png`` the samples of the seeds 0 to 63 in order, classes in turn, and ``FOLDER/reconstructions.png``
held-out pictures above what the first stage makes of them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch import Tensor

from diffusers_ddpm_ext import DDPMExtPipeline
from diffusers_ddpm_ext.plotting.sheets import image_grid

HERE = Path(__file__).parent
SIZE, SEEDS, STEPS, BATCH = 64, 256, 32, 32
GRID = 64
COMMON = ["--report_to", "none", "--checkpointing_steps", "1000000", "--validation_steps", "0", "--seed", "0",
          "--validation_max_images", "32", "--save_images_epochs", "100000", "--save_model_epochs", "100000",
          "--resolution", str(SIZE), "--overwrite_output_dir"]  # fmt: skip
DIFFUSION = ["--conditioning_key", "adm", "--conditioning_dropout", '{"class_labels": 0.1}',
             "--train_batch_size", "16", "--prediction_type", "v_prediction", "--learning_rate", "4e-4",
             "--lr_warmup_steps", "50", "--num_preview_images", "1", "--ddpm_num_inference_steps", "5"]  # fmt: skip
PIXELS = ["--block_out_channels", "32", "64", "128", "128", "--attention_levels", "3", "--layers_per_block", "1",
          "--attention_head_dim", "32"]  # fmt: skip
LATENTS = ["--block_out_channels", "64", "128", "192", "--attention_levels", "1", "2", "--layers_per_block", "1",
           "--attention_head_dim", "32"]  # fmt: skip
FIRST_STAGE = ["--block_out_channels", "24", "48", "96", "--norm_num_groups", "8", "--train_batch_size", "8",
               "--learning_rate", "2e-3", "--lr_warmup_steps", "50", "--kl_weight", "3e-4"]  # fmt: skip
TRAINING_STEPS = {"pixels": 700, "vae": 1200, "latents": 1100}
"""About 11 minutes a side at --scale 1, on the machine of the recorded figures."""


def main() -> int:
    """Train, sample and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all numbers of steps")
    options = parser.parse_args()
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    emoji = folder / "emoji"
    if not emoji.exists():
        subprocess.run([sys.executable, HERE / "emoji.py", emoji], check=True)
    data = ["--train_data_dir", str(emoji / "train"), "--validation_data_dir", str(emoji / "held_out")]
    steps = {name: round(count * options.scale) for name, count in TRAINING_STEPS.items()}
    train(folder, "vae", "train-vae", [*data, *COMMON, *FIRST_STAGE, "--max_train_steps", str(steps["vae"])])
    first_stage = ["--vae", str(folder / "vae"), "--cache_latents", str(folder / "cache")]
    for name, own in (("latents", [*LATENTS, *first_stage]), ("pixels", PIXELS)):
        train(folder, name, "train", [*data, *COMMON, *DIFFUSION, *own, "--max_train_steps", str(steps[name])])
        if not (folder / f"{name}.npz").exists():
            samples = sample(folder / name)
            np.savez_compressed(folder / f"{name}.npz", samples.permute(0, 2, 3, 1).numpy())
        first = torch.from_numpy(np.load(folder / f"{name}.npz")["arr_0"][:GRID]).permute(0, 3, 1, 2)
        save_sheet(first.float() / 127.5 - 1, folder / f"{name}.png")
    psnr = reconstruct(folder / "latents", emoji / "held_out", folder / "reconstructions.png")
    print(f"first stage: {psnr:.2f} dB on the held-out pictures", flush=True)
    seconds = json.loads((folder / "seconds.json").read_text(encoding="utf-8"))
    print("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()), flush=True)
    files = [folder / "pixels.npz", folder / "latents.npz"]
    subprocess.run(
        [sys.executable, HERE / "distances.py", emoji, *files, "--json", folder / "distances.json"], check=True
    )
    report = json.loads((folder / "distances.json").read_text(encoding="utf-8"))
    report |= {"seconds": seconds, "steps": steps, "held_out_psnr": psnr, "samples": SEEDS, "sampling_steps": STEPS}
    (folder / "distances.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def train(folder: Path, name: str, command: str, arguments: list[str]) -> None:
    """Run a training command into ``folder/name`` unless it has finished, and record its processor time."""
    record = folder / "seconds.json"
    seconds = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    if name in seconds:
        return
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-m", "diffusers_ddpm_ext", command, *arguments, "--output_dir", str(folder / name)]
    subprocess.run(words, check=True, env=environment)
    seconds[name] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    record.write_text(json.dumps(seconds, indent=2) + "\n", encoding="utf-8")


def sample(folder: Path) -> Tensor:
    """8-bit samples (N, 3, H, W): sample i has seed i and class i modulo their number; DDIM."""
    pipeline = DDPMExtPipeline.from_pretrained(folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline.set_progress_bar_config(disable=True)
    classes = len(pipeline.class_names)
    parts = []
    for start in range(0, SEEDS, BATCH):
        seeds = range(start, start + BATCH)
        output = pipeline(
            len(seeds),
            [torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=STEPS,
            output_type="pt",
            class_labels=[seed % classes for seed in seeds],
        )
        parts.append((output.images * 255).round().to(torch.uint8))
    return torch.cat(parts)


def save_sheet(pictures: Tensor, path: Path) -> None:
    """Write pictures (N, 3, H, W) in [-1, 1], sixteen to a row, in 256 colors: a small file."""
    image_grid(pictures, columns=16, enlarge=1).quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


@torch.no_grad()
def reconstruct(folder: Path, pictures: Path, path: Path) -> float:
    """Draw held-out pictures above their reconstructions; return the mean PSNR of all, dB of 8-bit levels."""
    pipeline = DDPMExtPipeline.from_pretrained(folder)
    files = sorted(pictures.glob("*/*.png"))
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(file).convert("RGB"))) for file in files])
    pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    decoded = []
    for part in pixels.split(BATCH):
        latents = pipeline.encode_images(part, generator=torch.Generator().manual_seed(0))
        decoded.append(pipeline.decode_latents(latents).clamp(-1, 1))
    made = torch.cat(decoded)
    error = (made - pixels).square().mean((1, 2, 3)) / 4
    shown = torch.linspace(0, len(files) - 1, 16).long()
    save_sheet(torch.cat([pixels[shown], made[shown]]), path)
    return float((-10 * error.log10()).mean())


if __name__ == "__main__":
    sys.exit(main())

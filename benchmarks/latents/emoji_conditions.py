"""Super-resolution and inpainting by concatenation, in the latents of a first stage: emoji at 64 x 64.

    python benchmarks/latents/emoji_conditions.py FOLDER [--train_steps 2400]

``FOLDER`` is that of emoji_latents.py, whose set and first stage it takes. Both models draw latents (16 x 16):

- super-resolution, 16 x 16 to 64 x 64: the low-resolution picture has the latents' size and is joined to them as it is
  (as in CompVis' bsr_sr). It is the picture averaged over 4 x 4 pixels, which is what ``--concat_column`` makes of
  pictures that are larger than the latents;
- inpainting: the picture with a transparent rectangle, encoded by the first stage (``--concat_through_vae``), and the
  mask.

The held-out pictures are then sampled once each (``ddpm-ext sample --concat``, 32 steps of DDIM). Rows of 16 of them:
``FOLDER/super_resolution.png`` has the low resolution, its bicubic enlargement, the sample and the picture;
``FOLDER/inpainting.png`` the picture with its hole, the sample, the sample pasted into the picture, and the picture.
``FOLDER/conditions.json``:

- super-resolution: PSNR of samples and of the bicubic enlargement; of samples averaged back to 16 x 16, against what
  was given; and of the first stage's reconstructions;
- inpainting: PSNR inside the rectangle of samples, of plain white and of the first stage's reconstructions; outside
  it of samples and of reconstructions. Pasted samples keep the known pixels exactly.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from emoji_latents import COMMON, DIFFUSION, LATENTS, STEPS, save_sheet, train
from PIL import Image
from torch import Tensor

from diffusers_ddpm_ext import DDPMExtPipeline
from diffusers_ddpm_ext.utils import random_keys as keys

FACTOR, SHOWN, BATCH = 4, 16, 32
WITHOUT_CLASSES = [word for word in DIFFUSION if word not in ("--conditioning_key", "adm")]


def main() -> int:
    """Prepare the pictures, train, sample and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train_steps", type=int, default=2400)
    options = parser.parse_args()
    folder = options.folder
    for part in ("train", "held_out"):
        write_holes(folder / "emoji" / part, folder / "conditions" / part)
    data = ["--train_data_dir", str(folder / "conditions" / "train"),
            "--validation_data_dir", str(folder / "conditions" / "held_out"), "--vae", str(folder / "vae"),
            "--cache_latents", str(folder / "cache"),
            "--max_train_steps", str(options.train_steps), "--conditioning_key", "concat"]  # fmt: skip
    at = WITHOUT_CLASSES.index("--conditioning_dropout")
    diffusion = WITHOUT_CLASSES[:at] + WITHOUT_CLASSES[at + 2 :]
    report = {}
    for name, column, extra in (("super_resolution", "picture", []), ("inpainting", "hole", ["--concat_through_vae"])):
        train(folder, name, "train", [*data, *COMMON, *diffusion, *LATENTS, "--concat_column", column, *extra])
        pictures = folder / "conditions" / "held_out" / {"picture": "pictures", "hole": ".holes"}[column]
        drawn = folder / f"{name}_samples"
        if not drawn.exists():
            words = ["sample", str(folder / name), "--concat", str(pictures), "--out", str(drawn),
                     "--num_inference_steps", str(STEPS), "--batch_size", str(BATCH), "--scheduler", "DDIMScheduler",
                     "--scheduler_args", "timestep_spacing=trailing"]  # fmt: skip
            subprocess.run([sys.executable, "-m", "diffusers_ddpm_ext", *words], check=True)
        measure = measure_super_resolution if column == "picture" else measure_inpainting
        report[name] = measure(folder, drawn)
        print(name, json.dumps(report[name]), flush=True)
    seconds = json.loads((folder / "seconds.json").read_text(encoding="utf-8"))
    report |= {"seconds": {name: seconds[name] for name in report}, "train_steps": options.train_steps}
    (folder / "conditions.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def write_holes(source: Path, target: Path) -> None:
    """Copy pictures to ``target/pictures``, with a hole to ``target/.holes``, and name both in metadata.csv."""
    if target.exists():
        return
    (target / "pictures").mkdir(parents=True)
    (target / ".holes").mkdir()
    rows = []
    for path in sorted(source.glob("*/*.png")):
        picture = Image.open(path).convert("RGB")
        name = path.name
        picture.save(target / "pictures" / name)
        draw = keys.generator("holes", name)
        height, width = torch.randint(16, 41, (2,), generator=draw).tolist()
        top = int(torch.randint(4, 60 - height, (), generator=draw))
        left = int(torch.randint(4, 60 - width, (), generator=draw))
        pixels = np.dstack([np.asarray(picture), np.full((picture.height, picture.width), 255, np.uint8)])
        pixels[top : top + height, left : left + width] = 0
        Image.fromarray(pixels, "RGBA").save(target / ".holes" / name)
        rows.append([f"pictures/{name}", f"pictures/{name}", f".holes/{name}"])
    with (target / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["file_name", "picture", "hole"], *rows])


def read(folder: Path, mode: str = "RGB") -> Tensor:
    """Pictures of a folder in the order of their names, (N, C, H, W), in [0, 1]."""
    arrays = [np.asarray(Image.open(path).convert(mode)) for path in sorted(folder.glob("*.png"))]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def psnr(a: Tensor, b: Tensor, where: Tensor | None = None) -> float:
    """Mean over pictures of the PSNR in dB, of all pixels or of those where ``where`` (N, 1, H, W) is 1."""
    weights = torch.ones_like(a) if where is None else where.expand_as(a)
    error = ((a - b).square() * weights).sum((1, 2, 3)) / weights.sum((1, 2, 3))
    return float((-10 * error.clamp_min(1e-10).log10()).mean())


@torch.no_grad()
def reconstructions(run: Path, pictures: Tensor) -> Tensor:
    """What the first stage makes of pictures, in [0, 1]."""
    stage = DDPMExtPipeline.from_pretrained(run)
    parts = [stage.decode_latents(stage.encode_images(part * 2 - 1)) for part in pictures.split(BATCH)]
    return torch.cat(parts).clamp(-1, 1) / 2 + 0.5


def average(pictures: Tensor) -> Tensor:
    """Pictures averaged over 4 x 4 pixels."""
    return torch.nn.functional.avg_pool2d(pictures, FACTOR)


def enlarge(pictures: Tensor, resample: Image.Resampling) -> Tensor:
    """Pictures enlarged four times by Pillow."""
    levels = (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    large = [Image.fromarray(one).resize((FACTOR * one.shape[1], FACTOR * one.shape[0]), resample) for one in levels]
    return torch.from_numpy(np.stack([np.asarray(one) for one in large])).permute(0, 3, 1, 2).float() / 255


def rows_of(path: Path, *sets: Tensor) -> None:
    """Draw the same pictures of several sets, a row each."""
    shown = torch.linspace(0, len(sets[0]) - 1, SHOWN).long()
    save_sheet(torch.cat([each[shown] for each in sets]) * 2 - 1, path)


def measure_super_resolution(folder: Path, drawn: Path) -> dict[str, float]:
    """Draw the grid and return the figures."""
    pictures, samples = read(folder / "conditions" / "held_out" / "pictures"), read(drawn)
    low = average(pictures)
    bicubic = enlarge(low, Image.Resampling.BICUBIC)
    rows_of(folder / "super_resolution.png", enlarge(low, Image.Resampling.NEAREST), bicubic, samples, pictures)
    return {
        "samples_psnr": psnr(samples, pictures),
        "bicubic_psnr": psnr(bicubic, pictures),
        "samples_averaged_psnr": psnr(average(samples), low),
        "first_stage_psnr": psnr(reconstructions(folder / "super_resolution", pictures), pictures),
        "pictures": len(pictures),
    }


def measure_inpainting(folder: Path, drawn: Path) -> dict[str, float]:
    """Draw the grid and return the figures."""
    pictures, samples = read(folder / "conditions" / "held_out" / "pictures"), read(drawn)
    known = read(folder / "conditions" / "held_out" / ".holes", "RGBA")[:, 3:]
    pasted = known * pictures + (1 - known) * samples
    given = known * pictures + (1 - known) * 0.5
    rows_of(folder / "inpainting.png", given, samples, pasted, pictures)
    made = reconstructions(folder / "inpainting", pictures)
    return {
        "inside_samples_psnr": psnr(samples, pictures, 1 - known),
        "inside_white_psnr": psnr(torch.ones_like(pictures), pictures, 1 - known),
        "inside_first_stage_psnr": psnr(made, pictures, 1 - known),
        "outside_samples_psnr": psnr(samples, pictures, known),
        "outside_first_stage_psnr": psnr(made, pictures, known),
        "pictures": len(pictures),
    }


if __name__ == "__main__":
    sys.exit(main())

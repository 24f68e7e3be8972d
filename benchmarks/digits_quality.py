"""Are the samples of a digits run digits? A classifier that knows only real ones looks at them.

    python benchmarks/digits_quality.py RUN_FOLDER [--num_images 999] [--steps 250] [--draws 64]

A logistic regression is trained on one half of the real digits and looks at the other half and at samples from the
run's pipeline. Reported, each with what the other real half gets:

- confidence: mean probability of the class it chooses. Wanted: at least 0.97 of the real ones'.
- classes: how often it chooses each. Wanted: all ten occur.
- Frechet distance between Gaussians fitted to its ten logits, to the first half. Wanted: at most twice that of the
  other real half.
- the learned log-variance against the measured log loss of the raw weights, where the folder holds one: mean distance,
  and the share of steps within 0.2.

Exit status 1 if one of the first three is missed.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DModel
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, DDPMObjective
from diffusers_ddpm_ext.training.config.options import DataOptions
from diffusers_ddpm_ext.training.data.dataset import load_data
from diffusers_ddpm_ext.training.data.image_set import ImageSet
from diffusers_ddpm_ext.training.evaluation.processes import Processes
from diffusers_ddpm_ext.training.evaluation.validation_loss import log_loss_per_step
from diffusers_ddpm_ext.training.factory.task import DenoisingTask
from diffusers_ddpm_ext.utils import random_keys as keys

CONFIDENCE, DISTANCE = 0.97, 2.0


def samples(pipeline: DDPMExtPipeline, count: int, steps: int) -> np.ndarray:
    """Samples as rows of 64 values in [0, 1], each with a generator of its own."""
    pipeline.set_progress_bar_config(disable=True)
    rows = []
    for start in range(0, count, 111):
        some = range(start, min(start + 111, count))
        generators = [keys.generator("digits_quality", image) for image in some]
        images = pipeline(len(some), generators, num_inference_steps=steps, output_type="np").images
        rows.append(images.reshape(len(some), -1))
    return np.concatenate(rows)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frechet distance of the Gaussians with the means and covariances of two sets of rows."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov_b @ root), 0, None)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


@dataclass(frozen=True)
class Quality:
    """What the classifier says of samples.

    Attributes:
        confidence: mean probability of the class it chooses, of samples and of real digits.
        classes: how often it chooses each of the ten, of samples and of real digits.
        distance: Frechet distance to the first half of the real digits, of samples and of the other half.
    """

    confidence: tuple[float, float]
    classes: tuple[list[int], list[int]]
    distance: tuple[float, float]

    @property
    def sure(self) -> float:
        """Confidence of samples over that of real digits."""
        return self.confidence[0] / self.confidence[1]

    @property
    def far(self) -> float:
        """Distance of samples over that of real digits."""
        return self.distance[0] / self.distance[1]


def look_at(drawn: np.ndarray) -> Quality:
    """Compare samples, rows of 64 values in [0, 1], with real digits."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order] / 16.0, labels[order]
    half = len(images) // 2
    classifier = LogisticRegression(max_iter=5000).fit(images[:half], labels[:half])
    logits = [classifier.decision_function(part) for part in (images[:half], images[half:], drawn)]
    real, ours = (classifier.predict_proba(part) for part in (images[half:], drawn))
    return Quality(
        (float(ours.max(1).mean()), float(real.max(1).mean())),
        (np.bincount(ours.argmax(1), minlength=10).tolist(), np.bincount(real.argmax(1), minlength=10).tolist()),
        (frechet(logits[0], logits[2]), frechet(logits[0], logits[1])),
    )


def judge(drawn: np.ndarray) -> bool:
    """Print the comparison with real digits, and say whether it is passed."""
    found = look_at(drawn)
    write(f"confidence  samples {found.confidence[0]:.4f}  real {found.confidence[1]:.4f}  ratio {found.sure:.3f}")
    write(f"classes     samples {found.classes[0]}  real {found.classes[1]}")
    write(f"Frechet     samples {found.distance[0]:.3f}  real half {found.distance[1]:.3f}  ratio {found.far:.2f}")
    return found.sure >= CONFIDENCE and all(found.classes[0]) and found.far <= DISTANCE


def judge_logvar(folder: Path, logvar: torch.Tensor, training: ImageSet, draws: int) -> None:
    """Print how far the learned log-variance is from what it estimates, by so many draws a step."""
    variant = "raw" if (folder / "unet" / "diffusion_pytorch_model.raw.safetensors").is_file() else None
    denoiser = UNet2DModel.from_pretrained(folder, subfolder="unet", variant=variant)
    scheduler = DDPMExtScheduler.from_pretrained(folder, subfolder="scheduler")
    task = DenoisingTask(denoiser, DDPMObjective(scheduler))
    alone = Processes(0, 1, torch.device("cpu"), lambda tensor: tensor)
    timesteps = torch.arange(len(logvar)).repeat(draws)
    off = np.abs(log_loss_per_step(task, training, 1, timesteps, 256, alone) - logvar.numpy())
    close = f"within 0.2 at {100 * (off < 0.2).mean():.1f} %"
    write(f"logvar      mean distance to the log loss {off.mean():.3f} ({draws} draws a step), {close}")


def write(line: str) -> None:
    """Print at once, for whoever waits."""
    print(line, flush=True)


def main() -> int:
    """Judge a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num_images", type=int, default=999)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--draws", type=int, default=64, help="for the log-variance, a step")
    arguments = parser.parse_args()
    pipeline = DDPMExtPipeline.from_pretrained(arguments.folder)
    passed = judge(samples(pipeline, arguments.num_images, arguments.steps))
    if pipeline.logvar is not None:
        judge_logvar(
            arguments.folder, pipeline.logvar, load_data(DataOptions(resolution=(8, 8))).train, arguments.draws
        )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

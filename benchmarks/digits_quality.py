"""Quality of the samples of a digits run, measured by a classifier trained only on real digits.

    python benchmarks/digits_quality.py RUN_FOLDER [--num_images 999] [--steps 250] [--draws 64]

A logistic regression is trained on one half of the real digits and classifies the other half and samples from the
run's pipeline. Reported, each next to the value of the other real half:

- confidence: mean probability of the predicted class. Required: at least 0.97 of that for real digits.
- classes: how often each class is predicted. Required: all ten occur.
- Frechet distance between Gaussians fitted to the ten logits, to the first half. Required: at most twice that of the
  other real half.
- the learned log-variance compared with the measured log loss of the raw weights, if the folder has one: mean
  distance, and the share of steps within 0.2.

Exit status 1 if one of the first three requirements is not met.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, DDPMObjective
from diffusers_ddpm_ext.diffusion.reverse_step import LEARNED_VARIANCES
from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.training.data.dataset import load_data
from diffusers_ddpm_ext.training.data.image_set import ImageSet
from diffusers_ddpm_ext.training.evaluation.processes import Processes
from diffusers_ddpm_ext.training.evaluation.validation_loss import log_loss_per_step
from diffusers_ddpm_ext.training.factory.task import DenoisingTask
from diffusers_ddpm_ext.utils import random_keys as keys

CONFIDENCE, DISTANCE = 0.97, 2.0


def samples(pipeline: DDPMExtPipeline, count: int, steps: int) -> np.ndarray:
    """Samples as rows of 64 values in [0, 1], each with a separate generator."""
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
    """Results of the classifier for samples.

    Attributes:
        confidence: mean probability of the predicted class, of samples and of real digits.
        classes: how often each of the ten is predicted, of samples and of real digits.
        distance: Frechet distance to the first half of the real digits, of samples and of the other half.
    """

    confidence: tuple[float, float]
    classes: tuple[list[int], list[int]]
    distance: tuple[float, float]

    @property
    def confidence_ratio(self) -> float:
        """Confidence of samples divided by that of real digits."""
        return self.confidence[0] / self.confidence[1]

    @property
    def distance_ratio(self) -> float:
        """Distance of samples divided by that of real digits."""
        return self.distance[0] / self.distance[1]


def measure_quality(drawn: np.ndarray) -> Quality:
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


def print_quality(drawn: np.ndarray) -> bool:
    """Print the comparison with real digits, and return whether the requirements are met."""
    quality = measure_quality(drawn)
    for name, (ours, real), ratio in (
        ("confidence", quality.confidence, quality.confidence_ratio),
        ("Frechet", quality.distance, quality.distance_ratio),
    ):
        write(f"{name:<11} samples {ours:.4f}  real {real:.4f}  ratio {ratio:.3f}")
    write(f"classes     samples {quality.classes[0]}  real {quality.classes[1]}")
    return quality.confidence_ratio >= CONFIDENCE and all(quality.classes[0]) and quality.distance_ratio <= DISTANCE


def print_logvar_error(folder: Path, logvar: torch.Tensor, training: ImageSet, draws: int) -> None:
    """Print how far the learned log-variance is from the log loss measured with ``draws`` draws per step."""
    variant = "raw" if (folder / "unet" / "diffusion_pytorch_model.raw.safetensors").is_file() else None
    denoiser = UNet2DModel.from_pretrained(folder, subfolder="unet", variant=variant)
    scheduler = DDPMExtScheduler.from_pretrained(folder, subfolder="scheduler")
    loss_type: Any = "hybrid" if scheduler.config.variance_type in LEARNED_VARIANCES else "l2"  # same simple loss
    task = DenoisingTask(denoiser, DDPMObjective(scheduler, loss_type=loss_type))
    alone = Processes(0, 1, torch.device("cpu"), lambda tensor: tensor)
    timesteps = torch.arange(len(logvar)).repeat(draws)
    off = np.abs(log_loss_per_step(task, training, 1, timesteps, 256, alone) - logvar.numpy())
    close = f"within 0.2 at {100 * (off < 0.2).mean():.1f} %"
    write(f"logvar      mean distance to the log loss {off.mean():.3f} ({draws} draws per step), {close}")


def write(line: str) -> None:
    """Print a line and flush it."""
    print(line, flush=True)


def main() -> int:
    """Measure a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num_images", type=int, default=999)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--draws", type=int, default=64, help="per step, for the log-variance")
    arguments = parser.parse_args()
    pipeline = DDPMExtPipeline.from_pretrained(arguments.folder)
    passed = print_quality(samples(pipeline, arguments.num_images, arguments.steps))
    if pipeline.logvar is not None:
        print_logvar_error(
            arguments.folder, pipeline.logvar, load_data(DataOptions(resolution=(8, 8))).train, arguments.draws
        )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

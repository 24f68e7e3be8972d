"""Every compatible Diffusers scheduler on the digits, with at most 50 network calls.

    python benchmarks/digits_samplers.py PLAIN_RUN LEARNED_RANGE_RUN [--num_images 899] [--picture FILE]

Both runs predict v. Each scheduler samples from both, and is measured as in digits_quality.py. Then the outputs of the
same networks are converted to the noise and to the clean sample, and the largest difference of 16 images to those of v
is printed. As many images are drawn as the held-out half of the digits has: a Frechet distance grows when fewer are
used.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from digits_quality import measure_quality, write
from torch import Tensor

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from diffusers_ddpm_ext.plotting.curves import save_figure
from diffusers_ddpm_ext.utils import random_keys as keys

CALLS = 50
PREDICTION_TYPES = {"plain": ("epsilon", "sample"), "learned range": ("epsilon",)}


class ConvertedNetwork(ModelMixin, ConfigMixin):
    """A network that predicts v, whose output is converted to the noise or to the clean sample."""

    def __init__(self, unet: Any, schedule: Any, prediction_type: str) -> None:
        super().__init__()
        self.unet, self.prediction_type = unet, prediction_type
        self._internal_dict = unet.config
        abar = schedule.alphas_cumprod
        self.log_sigma = 0.5 * np.log((1 - abar) / abar)

    def forward(self, xt: Tensor, t: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        """The converted output; a variance is unchanged."""
        out = self.unet(xt, t, return_dict=False)[0]
        v, rest = out[:, : xt.shape[1]], out[:, xt.shape[1] :]
        sigma = float(np.exp(np.interp(float(t), np.arange(len(self.log_sigma)), self.log_sigma)))
        root, other = 1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5
        converted = other * xt + root * v if self.prediction_type == "epsilon" else root * xt - other * v
        return (torch.cat([converted, rest], dim=1),)


def steps_within(scheduler: Any) -> int:
    """The largest number of steps with at most `CALLS` network calls."""
    for steps in range(CALLS, 1, -1):
        scheduler.set_timesteps(steps)
        if len(scheduler.timesteps) <= CALLS:
            return steps
    raise AssertionError(scheduler)


def draw(pipeline: DDPMExtPipeline, count: int, steps: int) -> np.ndarray:
    """Images (count, 8, 8) in [0, 1]."""
    parts = []
    for start in range(0, count, 125):
        each = [keys.generator("digits_samplers", image) for image in range(start, min(start + 125, count))]
        parts.append(pipeline(len(each), each, steps, "np").images[..., 0])
    return np.concatenate(parts)


def convert_prediction(pipeline: DDPMExtPipeline, prediction_type: str) -> DDPMExtPipeline:
    """The same pipeline with another prediction type of its network."""
    scheduler = DDPMExtScheduler.from_config(pipeline.trained_scheduler.config, prediction_type=prediction_type)
    other = DDPMExtPipeline(ConvertedNetwork(pipeline.unet, scheduler.schedule, prediction_type), scheduler)
    other.set_progress_bar_config(disable=True)
    return other


def main() -> int:
    """Sample, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plain", type=Path)
    parser.add_argument("learned", type=Path)
    parser.add_argument("--num_images", type=int, default=899)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    names = sorted(kind.__name__ for kind in DDPMExtScheduler().compatibles)
    sheets: dict[str, np.ndarray] = {}
    write("| scheduler | steps | network calls | network | confidence | classes | Frechet | eps | x0 |")
    write("|---|---|---|---|---|---|---|---|---|")
    passed = True
    for kind, folder in (("plain", arguments.plain), ("learned range", arguments.learned)):
        pipeline = DDPMExtPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        for name in names:
            pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.trained_scheduler.config)
            steps = steps_within(pipeline.scheduler)
            images = draw(pipeline, arguments.num_images, steps)
            quality, differences = measure_quality(images.reshape(len(images), -1)), []
            for prediction_type in ("epsilon", "sample"):
                if prediction_type not in PREDICTION_TYPES[kind]:
                    differences.append("")
                    continue
                other = convert_prediction(pipeline, prediction_type)
                other.scheduler = getattr(diffusers, name).from_config(other.trained_scheduler.config)
                differences.append(f"{np.abs(draw(other, 16, steps) - images[:16]).max():.0e}")
            passed &= (
                0.95 <= quality.confidence_ratio <= 1.05 and all(quality.classes[0]) and quality.distance_ratio <= 2
            )
            write(
                f"| {name} | {steps} | {pipeline.num_network_calls} | {kind} | {quality.confidence_ratio:.3f} | "
                f"{sum(map(bool, quality.classes[0]))} | {quality.distance_ratio:.2f} | {' | '.join(differences)} |"
            )
            if kind == "plain":
                sheets[name.removesuffix("Scheduler")] = images[:12]
    if arguments.picture is not None:
        plot_samples(sheets, arguments.picture)
    return 0 if passed else 1


def plot_samples(sheets: dict[str, np.ndarray], path: Path) -> None:
    """One row per scheduler: images from the same initial noise."""
    rows = []
    for images in sheets.values():
        framed = np.pad(images, ((0, 0), (1, 1), (1, 1)), constant_values=0.5)
        rows.append(np.concatenate(list(framed), axis=1))

    def draw_rows(axes: Any) -> None:
        sheet = np.concatenate(rows)
        axes.imshow(sheet, cmap="gray", interpolation="nearest", vmin=0, vmax=1, zorder=3)
        axes.set_xticks([])
        axes.set_yticks(np.arange(len(sheets)) * 10 + 4.5, list(sheets), fontsize=7)
        axes.get_figure().set_size_inches(8.5, 7.2)

    save_figure(path, draw_rows)


if __name__ == "__main__":
    sys.exit(main())

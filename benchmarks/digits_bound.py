"""Bits per dimension of the digits for every reverse variance and choice of steps.

    python benchmarks/digits_bound.py --plain RUN [RUN ...] [--learned RUN ...] [--samples 1000] [--json FILE]
    python benchmarks/digits_bound.py --tables FILE [FILE ...]      tables from the results of several calls

Plain runs predict with a fixed variance; learned ones were trained with `--loss_type hybrid --variance_type
learned_range`, one for each plain run, with the same seed. Every network is evaluated once on the 180 held-out digits
at all T steps, all with the same noise; every variance and chain is then computed from these outputs. v* and the best
steps are fitted on training images. 17-level bins, the exact decoder. With --samples, also Frechet distances of that
many samples of the first runs, as in digits_quality.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digits_quality import frechet
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from diffusers_ddpm_ext.diffusion.likelihood import bits_per_dim
from diffusers_ddpm_ext.diffusion.likelihood_estimate import half_width
from diffusers_ddpm_ext.diffusion.variance_fit import VarianceFit, fit_logvar
from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.training.data.dataset import load_data
from diffusers_ddpm_ext.utils import random_keys as keys

COUNTS = (10, 25, 50, 100, 1000)
SEARCH = (10, 25, 50, 100, 125, 150, 200, 250, 300, 400, 500, 600, 700, 800, 900, 1000)
BIN = 1 / 8


@dataclass
class Outputs:
    """Outputs of a network for the held-out images at every step, and its inputs."""

    scheduler: DDPMExtScheduler
    x0: Tensor
    noise: Tensor
    outputs: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, pipeline: DDPMExtPipeline, x0: Tensor, noise: Tensor) -> Outputs:
        """Call the network T times."""
        schedule, outputs = pipeline.scheduler.schedule, []
        abar = torch.from_numpy(np.array(schedule.alphas_cumprod))
        for t in range(len(schedule)):
            xt = abar[t].sqrt() * x0 + (1 - abar[t]).sqrt() * noise[t]
            outputs.append(pipeline.unet(xt.float(), torch.full((len(x0),), t)).sample)
        return cls(pipeline.scheduler, x0, noise, torch.stack(outputs))

    def bits(self, timesteps: list[int] | None = None, **settings: Any) -> np.ndarray:
        """Total bits of each image for a chain, with these settings of the scheduler."""
        scheduler = DDPMExtScheduler.from_config(self.scheduler.config, **settings)
        steps = list(range(len(scheduler.schedule)))
        if timesteps is not None:
            scheduler.set_timesteps(timesteps=sorted(timesteps, reverse=True))
            steps = sorted(timesteps)

        def denoiser(xt: Tensor, t: Tensor) -> Tensor:
            return self.outputs[t, torch.arange(len(t)) % len(self.x0)]

        bound = bits_per_dim(denoiser, scheduler, self.x0, noise=self.noise[steps], bin_width=BIN)
        return bound.total.numpy()


def even(count: int, first: int = 0, total: int = 1000) -> list[int]:
    """``count`` evenly spaced steps from ``first`` to the last."""
    return np.unique(np.linspace(first, total - 1, count).round().astype(int)).tolist() if count > 1 else [first]


def variants(
    outputs: Outputs, fit: VarianceFit, count: int, chosen: dict[str, dict[int, Any]]
) -> dict[str, np.ndarray]:
    """Totals of the held-out images, by name of variance and chain."""
    fitted = {"v_posterior": fit.optimal.v.tolist(), "v_decoder": fit.v_decoder.tolist()}
    plain = even(count)
    rows = {
        "v = 0": outputs.bits(plain, v_posterior=0.0),
        "v = 1": outputs.bits(plain, v_posterior=1.0),
        "v*": outputs.bits(plain, **fitted),
    }
    if count in chosen["zero"]:
        free = chosen["free"][count].tolist()
        rows["v*, best steps from 0"] = outputs.bits(chosen["zero"][count].tolist(), **fitted)
        rows["v*, best steps"] = outputs.bits(free, **fitted)
        rows["v = 1 from the same first step"] = outputs.bits(even(count, min(free)), v_posterior=1.0)
    return rows


def format_mean(values: list[np.ndarray]) -> str:
    """Mean over all networks, and the widest of their intervals over the images."""
    halves = [half_width(value) or 0.0 for value in values]
    return f"{np.mean([value.mean() for value in values]):.3f} ± {max(halves):.3f}"


class FrechetDistance:
    """Frechet distance of samples to real digits, relative to that of other real ones."""

    def __init__(self) -> None:
        images, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(images))
        images, labels = images[order] / 16.0, labels[order]
        half = len(images) // 2
        self.classifier = LogisticRegression(max_iter=5000).fit(images[:half], labels[:half])
        self.near = self.classifier.decision_function(images[:half])
        self.real = frechet(self.near, self.classifier.decision_function(images[half:]))

    def __call__(self, pipeline: DDPMExtPipeline, count: int, timesteps: list[int]) -> float:
        """The distance of ``count`` samples of a chain."""
        rows = []
        for start in range(0, count, 250):
            some = range(start, min(start + 250, count))
            generators = [keys.generator("digits_bound", image) for image in some]
            images = pipeline(
                len(some), generators, timesteps=sorted(timesteps, reverse=True), output_type="np"
            ).images
            rows.append(images.reshape(len(some), -1))
        return frechet(self.near, self.classifier.decision_function(np.concatenate(rows))) / self.real


def main() -> int:
    """Measure, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", type=Path, nargs="*", default=[])
    parser.add_argument("--tables", type=Path, nargs="*", default=[])
    parser.add_argument("--learned", type=Path, nargs="*", default=[])
    parser.add_argument("--samples", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load_data(DataOptions(resolution=(8, 8)))
    assert data.validation is not None
    x0 = data.validation.pixels(torch.arange(len(data.validation))).double()
    training = data.train.pixels(torch.arange(len(data.train))).double()
    source = torch.Generator().manual_seed(0)
    noise = torch.randn(1000, *x0.shape, generator=source)
    table: dict[int, dict[str, list[np.ndarray]]] = {count: {} for count in COUNTS}
    uniform: dict[int, list[np.ndarray]] = {count: [] for count in SEARCH}
    first_steps: list[dict[int, int]] = []
    distances: dict[Any, dict[str, float]] = {}
    for number, folder in enumerate(arguments.plain):
        pipeline = DDPMExtPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.unet.eval()
        plain = dict(pipeline.scheduler.config) | {"v_posterior": None, "v_decoder": None, "optimal_timesteps": None}
        pipeline.scheduler = DDPMExtScheduler.from_config(plain | {"variance_type": "fixed_small"})
        outputs = Outputs.of(pipeline, x0, noise)
        fit = fit_logvar(
            lambda x, t, unet=pipeline.unet: unet(x.float(), t).sample,
            pipeline.scheduler,
            training,
            generator=torch.Generator().manual_seed(1),
            bin_width=BIN,
        )
        schedule = pipeline.scheduler.schedule
        chosen = {"zero": fit.choose(schedule, 100, 0), "free": fit.choose(schedule, 100)}
        first_steps.append({count: int(chosen["free"][count].min()) for count in COUNTS if count <= 100})
        for count in COUNTS:
            for name, totals in variants(outputs, fit, count, chosen).items():
                table[count].setdefault(name, []).append(totals)
        for count in SEARCH:
            uniform[count].append(outputs.bits(even(count), v_posterior=1.0))
        if len(arguments.learned) > number:
            other = DDPMExtPipeline.from_pretrained(arguments.learned[number])
            other.set_progress_bar_config(disable=True)
            other.unet.eval()
            learned = Outputs.of(other, x0, noise)
            for count in COUNTS:
                table[count].setdefault("learned range", []).append(learned.bits(even(count)))
        if arguments.samples and number == 0:
            fitted = {"v_posterior": fit.optimal.v.tolist(), "v_decoder": fit.v_decoder.tolist()}
            distances = sampled(pipeline, fitted, chosen, other if arguments.learned else None, arguments.samples)
        print(f"{folder}: best first steps {first_steps[-1]}, decoder at 0: {fit.decoder[0]:.4f}", flush=True)
    for file in arguments.tables:
        kept = json.loads(file.read_text())
        for count in COUNTS:
            for name, values in kept["bits"][str(count)].items():
                table[count].setdefault(name, []).extend(map(np.array, values))
        for count in SEARCH:
            uniform[count].extend(map(np.array, kept["uniform"][str(count)]))
        distances = distances or kept["frechet"]
    show(table, uniform, distances)
    if arguments.json:
        bits = {k: {n: [v.tolist() for v in vs] for n, vs in row.items()} for k, row in table.items()}
        even_steps = {k: [v.tolist() for v in vs] for k, vs in uniform.items()}
        kept = {"bits": bits, "uniform": even_steps, "first": first_steps, "frechet": distances}
        arguments.json.write_text(json.dumps(kept))
    return 0


def sampled(
    pipeline: DDPMExtPipeline, fitted: dict[str, Any], chosen: dict[str, dict[int, Any]], learned: Any, count: int
) -> dict[int, dict[str, float]]:
    """Frechet distances of samples, relative to real digits, by number of steps and variant."""
    relative_distance, result = FrechetDistance(), {}
    for steps in (10, 25, 50, 100):
        settings: dict[str, tuple[dict[str, Any], list[int]]] = {
            "v = 0": ({"v_posterior": 0.0}, even(steps)),
            "v = 1": ({"v_posterior": 1.0}, even(steps)),
            "v*": (fitted, even(steps)),
            "v*, best steps from 0": (fitted, chosen["zero"][steps].tolist()),
            "v*, best steps": (fitted, chosen["free"][steps].tolist()),
        }
        result[steps] = {}
        config = pipeline.scheduler.config
        for name, (options, timesteps) in settings.items():
            pipeline.scheduler = DDPMExtScheduler.from_config(config, **options)
            result[steps][name] = relative_distance(pipeline, count, timesteps)
        pipeline.scheduler = DDPMExtScheduler.from_config(config)
        if learned is not None:
            result[steps]["learned range"] = relative_distance(learned, count, even(steps))
        print(f"K = {steps}: Frechet distances {result[steps]}", flush=True)
    return result


def show(
    table: dict[int, dict[str, list[np.ndarray]]],
    uniform: dict[int, list[np.ndarray]],
    distances: dict[Any, dict[str, float]],
) -> None:
    """Print the tables of the benchmarks' page."""
    names = list(max(table.values(), key=len))
    print(f"\n| bits per dimension | {' | '.join(f'K = {count}' for count in table)} |")
    print("|---|" + "---|" * len(table))
    for name in names:
        cells = [format_mean(row[name]) if name in row else "" for row in table.values()]
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"\nv = 1, even steps: {', '.join(f'{k}: {np.mean(uniform[k]):.3f}' for k in uniform)}")
    for count, row in table.items():
        best = np.mean(row.get("v*, best steps", row["v*"]))
        needed = next((k for k in uniform if np.mean(uniform[k]) <= best), None)
        print(f"K = {count}: v = 1 with even steps needs {needed or 'more than 1000'} for {best:.3f}")
        zero = row.get("v*, best steps from 0")
        if zero:
            needed = next((k for k in uniform if np.mean(uniform[k]) <= np.mean(zero)), None)
            print(f"K = {count}: v = 1 with even steps needs {needed or 'more than 1000'} for {np.mean(zero):.3f}")
        if "learned range" in row:
            for name in ("v = 1", "v*"):
                for ours, theirs in zip(row["learned range"], row[name], strict=False):
                    half = half_width(ours - theirs) or 0.0
                    print(f"K = {count}: learned range less {name}: {(ours - theirs).mean():+.3f} ± {half:.3f}")
    if distances:
        variants_of = list(next(iter(distances.values())))
        print(f"\n| Frechet distance / real | {' | '.join(f'K = {count}' for count in distances)} |")
        print("|---|" + "---|" * len(distances))
        for name in variants_of:
            print(f"| {name} | {' | '.join(f'{row[name]:.2f}' for row in distances.values())} |")


if __name__ == "__main__":
    sys.exit(main())

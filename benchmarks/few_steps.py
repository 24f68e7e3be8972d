"""Few steps: which K timesteps give the best samples? KID and FD of each choice, with intervals.

    ddpm-ext fit-variance RUN
    ddpm-ext fit-steps RUN --num_inference_steps 5 10
    ddpm-ext fit-steps RUN --num_inference_steps 5 10 --scheduler DPMSolverMultistepScheduler
    python benchmarks/few_steps.py RUN [--emoji EMOJI_FOLDER] --json FILE

``RUN`` is a run on the digits, or with ``--emoji`` on the set of latents/emoji.py (``--held_out 2``). Every choice of
steps starts from the same noise, fresh for each of three seeds; the reference are the run's held-out images. Features
are those of `--metrics` for the digits, and 64 of a small classifier of the emoji's groups (latents/distances.py).

An interval of a value is over samples: a jackknife of 20 groups, at this reference, whose choice would move all rows
together. The last columns are the difference to the best evenly spaced choice (the least of leading, trailing and
linspace, by the same metric), with its interval over samples and reference images, which both rows share. ``distance``
is the root mean square distance to the samples of many steps (``--many``) from the same noise.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from diffusers_ddpm_ext import DDPMExtPipeline
from diffusers_ddpm_ext.cli.measuring import image_options, load_images
from diffusers_ddpm_ext.cli.pipeline_facts import read_pipeline_facts
from diffusers_ddpm_ext.diffusion.respacing import spaced_timesteps
from diffusers_ddpm_ext.metrics.features import load_feature_extractor
from diffusers_ddpm_ext.metrics.frechet import frechet_distance
from diffusers_ddpm_ext.metrics.intervals import NUM_GROUPS, Estimate, jackknife, random_groups
from diffusers_ddpm_ext.metrics.kernel_distance import kernel_distance
from diffusers_ddpm_ext.metrics.resizing import resize
from diffusers_ddpm_ext.utils.random_keys import generator

sys.path.insert(0, str(Path(__file__).parent / "latents"))

SCHEDULERS = ("DDIMScheduler", "DPMSolverMultistepScheduler")
COUNTS, SEEDS, BATCH = (5, 10), 3, 250
EVEN = ("leading", "trailing", "linspace")
METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {"fd": frechet_distance, "kid": kernel_distance}


def main() -> int:
    """Sample, measure, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--emoji", type=Path, help="folder of emoji.py; default: the digits")
    parser.add_argument("--num_images", type=int, default=500, help="of each seed")
    parser.add_argument("--schedulers", nargs="+", default=SCHEDULERS, metavar="NAME", help="default: all of them")
    parser.add_argument("--many", type=int, default=50, help="steps of the reference from the same noise")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    pipeline = DDPMExtPipeline.from_pretrained(options.folder)
    pipeline.set_progress_bar_config(disable=True)
    if options.emoji is None:
        reference, features, levels = digits(str(options.folder), pipeline)
    else:
        reference, features, levels = emoji(options.emoji, pipeline)
    noise = fresh_noise(pipeline, options.num_images)
    report: dict[str, Any] = {"num_images": options.num_images, "seeds": SEEDS, "num_reference": len(reference)}
    report["rows"] = rows = []
    for name in options.schedulers:
        pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.trained_scheduler.config)
        total = len(pipeline.trained_scheduler)
        many = draw(pipeline, noise, spaced_timesteps(options.many, total, "trailing").tolist())
        measured_many = features(rounded(many, levels))
        rows.append(describe(name, options.many, "trailing", None, many, many, measured_many, reference))
        print_row(rows[-1])
        for count in COUNTS:
            measured = {}
            for spacing, steps in choices(pipeline, count).items():
                samples = draw(pipeline, noise, steps)
                measured[spacing] = features(rounded(samples, levels))
                rows.append(describe(name, count, spacing, steps, samples, many, measured[spacing], reference))
                print_row(rows[-1])
            for row in rows[-len(measured) :]:
                row["difference"] = differences(row["spacing"], measured, reference)
                print(name, count, row["spacing"], row["difference"], flush=True)
            if options.json is not None:
                options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print("\n" + table(rows))
    return 0


def choices(pipeline: DDPMExtPipeline, count: int) -> dict[str, list[int]]:
    """The steps of every row."""
    total = len(pipeline.trained_scheduler)
    quadratic = np.linspace(0, np.sqrt(0.8 * total), count) ** 2  # Song et al. 2021, appendix D.2
    steps = {spacing: spaced_timesteps(count, total, spacing).tolist() for spacing in EVEN}
    steps["quadratic"] = [int(step) for step in quadratic.round()[::-1]]
    for name in ("bound", "samples"):
        chosen = pipeline.chosen_timesteps(count, name)
        assert chosen is not None
        steps[name] = chosen
    return steps


def fresh_noise(pipeline: DDPMExtPipeline, count: int) -> Tensor:
    """Starting noise (SEEDS * count, C, H, W), none of which a fit has seen."""
    size = pipeline.unet.config.sample_size
    shape = (pipeline.channels, *(size if isinstance(size, (list, tuple)) else (size, size)))
    keys = [("few_steps", seed, image) for seed in range(SEEDS) for image in range(count)]
    return torch.stack([torch.randn(shape, generator=generator(*key)) for key in keys])


def draw(pipeline: DDPMExtPipeline, noise: Tensor, steps: list[int]) -> Tensor:
    """Samples of these steps, in data units."""
    parts = [
        pipeline(len(part), latents=part, timesteps=steps, output_type="latent").images for part in noise.split(BATCH)
    ]
    return torch.cat(parts)


def rounded(samples: Tensor, levels: int) -> Tensor:
    """Samples as a file would hold them."""
    half = (levels - 1) / 2
    return ((samples.clamp(-1, 1) + 1) * half).round() / half - 1


def digits(folder: str, pipeline: DDPMExtPipeline) -> tuple[np.ndarray, Callable[[Tensor], np.ndarray], int]:
    """Features of the held-out digits, the function of features, and the number of levels."""
    facts = read_pipeline_facts(folder)
    assert facts is not None
    data = load_images(folder, pipeline, image_options(facts, {}), progress=False)
    assert data.validation is not None
    assert data.validation.levels is not None
    extractor = load_feature_extractor("digits")

    def features(images: Tensor) -> np.ndarray:
        return extractor(images).double().numpy()

    return features(data.validation.pixels(range(len(data.validation)))), features, data.validation.levels


def emoji(folder: Path, pipeline: DDPMExtPipeline) -> tuple[np.ndarray, Callable[[Tensor], np.ndarray], int]:
    """The same of the held-out emoji, at the size of the samples."""
    import distances

    size = pipeline.unet.config.sample_size
    side = (size, size) if isinstance(size, int) else tuple(size)

    def reduced(pictures: Tensor) -> Tensor:
        parts = [resize(part.float() / 127.5 - 1, side) for part in pictures.split(BATCH)]
        return ((torch.cat(parts) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    pictures, labels, names = distances.read_folder(folder / "train")
    network = distances.fit_classifier(reduced(pictures), labels, names, epochs=25)
    held_out, true, _ = distances.read_folder(folder / "held_out")
    accuracy = float((network.classify(reduced(held_out)) == true).float().mean())
    print(f"the classifier names the group of {accuracy:.0%} of the held-out pictures", flush=True)

    def features(images: Tensor) -> np.ndarray:
        return network.features(((images + 1) * 127.5).round().to(torch.uint8))

    return network.features(reduced(held_out)), features, 256


def describe(
    scheduler: str,
    count: int,
    spacing: str,
    steps: list[int] | None,
    samples: Tensor,
    many: Tensor,
    features: np.ndarray,
    reference: np.ndarray,
) -> dict[str, Any]:
    """A row: metrics of all seeds together with their intervals, and of each seed."""
    row: dict[str, Any] = {"scheduler": scheduler, "steps": count, "spacing": spacing, "timesteps": steps}
    row["distance"] = float((samples - many).double().square().mean().sqrt())
    groups = random_groups(len(features), NUM_GROUPS, 0)
    for name, metric in METRICS.items():
        without = np.array([metric(features[groups != group], reference) for group in range(NUM_GROUPS)])
        row[name] = dict(vars(jackknife(metric(features, reference), without, 0.95)))
        row[name]["of_seeds"] = [metric(part, reference) for part in np.split(features, SEEDS)]
    return row


def differences(spacing: str, measured: dict[str, np.ndarray], reference: np.ndarray) -> dict[str, Any]:
    """The difference to the best evenly spaced choice, by metric, with its interval."""
    result = {}
    for name, metric in METRICS.items():
        best = min(EVEN, key=lambda each: metric(measured[each], reference))
        estimate = paired(metric, measured[spacing], measured[best], reference)
        result[name] = {"to": best, "value": estimate.value, "low": estimate.low, "high": estimate.high}
    return result


def paired(
    metric: Callable[[np.ndarray, np.ndarray], float], first: np.ndarray, second: np.ndarray, reference: np.ndarray
) -> Estimate:
    """The difference of two sets of samples from the same noise, to the same reference."""
    of_samples, of_reference = random_groups(len(first), NUM_GROUPS, 0), random_groups(len(reference), NUM_GROUPS, 1)

    def difference(samples: np.ndarray, images: np.ndarray) -> float:
        return metric(first[samples], reference[images]) - metric(second[samples], reference[images])

    everything = difference(np.ones(len(first), bool), np.ones(len(reference), bool))
    without = [difference(of_samples != group, of_reference != group) for group in range(NUM_GROUPS)]
    return jackknife(everything, np.array(without), 0.95)


def print_row(row: dict[str, Any]) -> None:
    """A row as it is measured."""
    metrics = "  ".join(
        f"{name} {row[name]['value']:.3f} [{row[name]['low']:.3f}, {row[name]['high']:.3f}]" for name in METRICS
    )
    print(f"{row['scheduler']} {row['steps']} {row['spacing']}: distance {row['distance']:.4f}  {metrics}", flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """All rows in Markdown."""
    lines = [
        "| scheduler | steps | timesteps | distance | KID | FD | KID - best even | FD - best even |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        values = [f"{row[name]['value']:.3f} ± {row[name]['high'] - row[name]['value']:.3f}" for name in ("kid", "fd")]
        shown = ["", ""]
        if "difference" in row:
            each = [row["difference"][name] for name in ("kid", "fd")]
            shown = [
                "0"
                if one["to"] == row["spacing"]
                else f"{one['value']:+.3f} ({one['low']:+.3f} to {one['high']:+.3f})"
                for one in each
            ]
        cells = [row["scheduler"].removesuffix("Scheduler"), row["steps"], row["spacing"], f"{row['distance']:.4f}"]
        lines.append("| " + " | ".join(map(str, [*cells, *values, *shown])) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

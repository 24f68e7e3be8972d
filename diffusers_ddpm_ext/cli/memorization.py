"""`ddpm-ext evaluate --memorization`: which samples are copies of training images, and the gap of the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from diffusers_ddpm_ext.cli.measured_latents import as_samples
from diffusers_ddpm_ext.cli.measuring import ConditionedUNet, caption_encoder, images_of_split
from diffusers_ddpm_ext.cli.sample_metrics import Measurement
from diffusers_ddpm_ext.diffusion.levels import choose_bins
from diffusers_ddpm_ext.diffusion.likelihood_estimate import Strata
from diffusers_ddpm_ext.errors import as_config_error, as_run_error
from diffusers_ddpm_ext.metrics.copies import CopyRate, estimate_copies
from diffusers_ddpm_ext.metrics.intervals import t_quantile
from diffusers_ddpm_ext.plotting.gap import plot_gap
from diffusers_ddpm_ext.plotting.sheets import save_grid
from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler
from diffusers_ddpm_ext.training.evaluation.bound import BoundEvaluation, evaluate_bound
from diffusers_ddpm_ext.training.evaluation.validation_loss import evenly_spaced

if TYPE_CHECKING:
    from diffusers_ddpm_ext.training.data.image_set import ImageSet
    from diffusers_ddpm_ext.utils.vocabulary import Decoder

GRID, GAP_PLOT = "copies.png", "loss_gap.png"
SHOWN = 12
"""Samples of the grid: those with the smallest ratios."""
GAP_IMAGES, GAP_STEPS = 64, 20
"""Images of each set, and timesteps of each image, for the gap of the loss."""
PIXEL_BATCH = 256


def measure_memorization(measurement: Measurement) -> tuple[dict[str, Any], list[str]]:
    """The rate of copies, a grid of the nearest training images and the loss' gap: for JSON, and as lines to print.

    Collective call: every process must make it.

    Raises:
        ConfigError: no images are held out, or there are too few images.
        RunError: a picture cannot be written.
    """
    options, data = measurement.options, measurement.data
    held_out, trained_on = images_of_split(data, "validation"), images_of_split(data, "train")
    training = measurement.reference_features(trained_on, "train")
    unseen = measurement.reference_features(held_out, "validation")
    samples = measurement.features(measurement.samples)
    gap = None if measurement.pipeline is None else _loss_gap(measurement, held_out)
    if measurement.processes.rank > 0:
        return {}, []
    with as_config_error("--memorization"):
        copies = estimate_copies(samples, training, unseen, options.confidence)
    folder = options.output_folder
    with as_run_error(folder):
        _save_grid(measurement, copies, evenly_spaced(len(data.train), options.max_images))
        if gap is not None:
            plot_gap(folder / GAP_PLOT, **gap)
    result = {
        "rate": dict(vars(copies.rate)),
        "chance": dict(vars(copies.chance)),
        "threshold": copies.threshold,
        "memorizes": copies.memorizes,
        "num_training": len(training),
        "num_held_out": len(unseen),
        "median_ratio": float(np.median(copies.samples.ratio)),
        "median_ratio_held_out": float(np.median(copies.held_out.ratio)),
    }
    if gap is not None:
        result["loss_gap"] = {name: values.tolist() for name, values in gap.items()}
    return {"memorization": result}, _lines(copies, len(samples), len(training), len(unseen), options.confidence)


def _lines(copies: CopyRate, samples: int, training: int, held_out: int, confidence: float) -> list[str]:
    percent, rate, chance = 100 * confidence, copies.rate, copies.chance
    verdict = (
        "more than chance gives: the model repeats training images"
        if copies.memorizes
        else "not more than chance gives"
    )
    return [
        f"copies of training images  {rate.value:.2%}   {percent:g} % interval {rate.low:.2%} to {rate.high:.2%}   "
        f"N = {samples:,} samples, {training:,} training images",
        f"  of held-out images       {chance.value:.2%}   {percent:g} % interval {chance.low:.2%} to {chance.high:.2%}"
        f"   N = {held_out:,} images (ratio of distances up to {copies.threshold:.3f})",
        f"  {verdict}; the nearest ones are in {GRID}",
    ]


def _save_grid(measurement: Measurement, copies: CopyRate, indices: Tensor) -> None:
    """Rows of four: a sample, its two nearest training images by features, and the nearest one by pixels."""
    train, found = measurement.data.train, copies.samples
    chosen = np.argsort(found.ratio, kind="stable")[:SHOWN].tolist()
    shown = measurement.samples.pixels(chosen)
    by_pixels = _nearest_by_pixels(shown, train, indices)
    tiles, captions = [], []
    for row, number in enumerate(chosen):
        places = [int(indices[found.nearest[number]]), int(indices[found.second[number]]), by_pixels[row]]
        tiles += [shown[row : row + 1], train.pixels(places)]
        captions += [f"sample {number}", f"ratio {found.ratio[number]:.2f}", "second", "by pixels"]
    save_grid(
        torch.cat(tiles),
        measurement.options.output_folder / GRID,
        columns=4,
        captions=captions,
        pixels=measurement.pixels,
    )


def _nearest_by_pixels(images: Tensor, train: ImageSet, indices: Tensor) -> list[int]:
    """Numbers of the nearest training images by the distance of pixels."""
    best = torch.full((len(images),), torch.inf, dtype=torch.float64)
    nearest = torch.zeros(len(images), dtype=torch.int64)
    flat = images.flatten(1).double()
    for part in indices.split(PIXEL_BATCH):
        distances, places = torch.cdist(flat, train.pixels(part).flatten(1).double()).min(dim=1)
        is_closer = distances < best
        best, nearest = torch.where(is_closer, distances, best), torch.where(is_closer, part[places], nearest)
    return nearest.tolist()


def _loss_gap(measurement: Measurement, held_out: ImageSet) -> dict[str, np.ndarray] | None:
    """The bound's terms per step of held-out and of training images, and their difference, (K,) each.

    Collective call. None where the pipeline's noise schedule is not ours.
    """
    options, pipeline = measurement.options, measurement.pipeline
    scheduler = pipeline.trained_scheduler
    if not isinstance(scheduler, DDPMExtScheduler):
        return None
    scheduler = DDPMExtScheduler.from_config(scheduler.config)
    strata = Strata.from_schedule(scheduler.kept, min(GAP_STEPS, len(scheduler.kept)))
    network = ConditionedUNet(pipeline, caption_encoder(pipeline, measurement.data))
    wanted: Decoder | None = None if pipeline.first_stage is None else "continuous"
    decoder, bin_width = choose_bins(wanted, None, held_out.levels)
    bits = []
    for images in (measurement.data.train, held_out):
        evaluation = BoundEvaluation(
            scheduler,
            as_samples(pipeline, images, options.seed, options.folder),
            strata,
            min(GAP_IMAGES, len(images)),
            options.seed,
            batch_size=options.batch_size,
            dtype=getattr(torch, options.dtype),
            decoder=decoder,
            bin_width=bin_width,
        )
        bits.append(evaluate_bound(network, evaluation, measurement.processes).bits)
    train, unseen = bits
    error = np.sqrt(train.var(axis=0, ddof=1) / len(train) + unseen.var(axis=0, ddof=1) / len(unseen))
    width = t_quantile(options.confidence, min(len(train), len(unseen)) - 1) * error
    gap = unseen.mean(axis=0) - train.mean(axis=0)
    return {
        "timesteps": scheduler.kept.timesteps[strata.starts + (strata.sizes - 1) // 2],
        "training": train.mean(axis=0),
        "held_out": unseen.mean(axis=0),
        "gap": gap,
        "low": gap - width,
        "high": gap + width,
    }

"""The scale of a run's latents: measured over a keyed sample of the training images, or taken over.

Every process computes the same scale, for any number of processes and any batch size. The posterior is not sampled for
it: the variance of its samples is that of the means plus the mean variance.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from diffusers_ddpm_ext.errors import ConfigError, as_config_error
from diffusers_ddpm_ext.models.first_stage import FirstStage
from diffusers_ddpm_ext.models.latent_scale import SCALE_KEYS
from diffusers_ddpm_ext.training.config.latent_options import LatentOptions
from diffusers_ddpm_ext.training.data.image_set import ImageSet
from diffusers_ddpm_ext.training.data.latents import LatentEncoder, image_posterior
from diffusers_ddpm_ext.training.distributed import fail_together, gather_rows
from diffusers_ddpm_ext.utils import random_keys as keys

IMAGES_FOR_SCALE = 512
IMAGES_FOR_WARNING = 64
"""A scale that is not measured is only compared with the images."""
GOOD_STD = (0.5, 2.0)
SMALLEST_VARIANCE = 1e-12
BATCH = 16


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and variance of each channel of the latents, before they are scaled.

    Attributes:
        mean: (C,), float64.
        variance: (C,), float64.
        images: number of images that they are from.
    """

    mean: Tensor
    variance: Tensor
    images: int

    @property
    def std(self) -> float:
        """Standard deviation of all latents around their common mean."""
        return _pooled_std(self.mean, self.variance)

    def scaled_std(self, stage: FirstStage) -> float:
        """Standard deviation of the latents as a first stage scales them."""
        shift, scale = stage.shift.double().flatten(), stage.scale.double().flatten()
        return _pooled_std((self.mean - shift) / scale, self.variance / scale**2)


def _pooled_std(mean: Tensor, variance: Tensor) -> float:
    """Standard deviation of the values of all channels together."""
    return math.sqrt(float(variance.mean() + (mean - mean.mean()).square().mean()))


def measure_latents(
    images: ImageSet, encoder: LatentEncoder, accelerator: Accelerator | None, limit: int
) -> LatentStatistics:
    """Measure latents of at most ``limit`` images, center-cropped, not flipped.

    Args:
        images: of which a keyed sample is encoded.
        encoder: with the first stage.
        accelerator: whose processes share the images, a collective call; None: this process encodes them all.
        limit: number of images.

    Raises:
        ValueError: the first stage makes latents that are not finite.
    """
    count = len(images)
    chosen = torch.arange(count)
    if count > limit:
        chosen = torch.randperm(count, generator=keys.generator(keys.LATENT_SCALE, count))[:limit].sort().values
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    rows = torch.zeros(0, 1 + 2 * encoder.stage.latent_channels, dtype=torch.float64)
    with nullcontext() if accelerator is None else fail_together(accelerator):
        parts = chosen[rank::world].split(BATCH)
        rows = torch.cat([rows, *(_moments(images, part, encoder) for part in parts if len(part))])
    if accelerator is not None:
        rows = gather_rows(accelerator, rows)
    mean, square = rows[rows[:, 0].argsort()][:, 1:].mean(0).chunk(2)
    variance = square - mean.square()
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("the first stage makes latents of the training images that are NaN or infinite")
    return LatentStatistics(mean, variance, len(chosen))


def _moments(images: ImageSet, indices: Tensor, encoder: LatentEncoder) -> Tensor:
    """Index of each image, means and mean squares of the channels of its latents: (b, 1 + 2C), float64, on the CPU."""
    mean, std = image_posterior(images, indices, encoder.stage, encoder.device)
    mean = mean.double()
    square = mean.square() if std is None or encoder.mode else mean.square() + std.double().square()
    return torch.cat([indices[:, None].double(), mean.mean((2, 3)).cpu(), square.mean((2, 3)).cpu()], dim=1)


def scaled_stage(stage: FirstStage, options: LatentOptions, statistics: LatentStatistics) -> FirstStage:
    """The first stage with the scale that the options request; the saved copy has it in its configuration.

    Raises:
        ConfigError: the scale is out of range, or the latents that it is measured on are all alike.
    """
    factor = options.scale_factor
    measured = statistics.variance if options.latent_stats else torch.tensor([statistics.std**2])
    if is_measured(options) and not bool((measured > SMALLEST_VARIANCE).all()):
        which = "a channel of the latents has" if options.latent_stats else "the latents have"
        option = "--latent_stats" if options.latent_stats else "--scale_factor data"
        raise ConfigError(
            f"{option}: {which} one value in all training images: use another --vae, or a --scale_factor"
        )
    with as_config_error("--scale_factor"):
        if options.latent_stats:
            std = statistics.variance.sqrt()
            return stage.with_scale(None if isinstance(factor, str) else factor, statistics.mean, std)
        if factor == "vae":
            return stage.with_scale(None)
        return stage.with_scale(1 / statistics.std if factor == "data" else float(factor))


def is_measured(options: LatentOptions) -> bool:
    """Whether the scale follows from the images."""
    return options.latent_stats or options.scale_factor == "data"


def scale_settings(stage: FirstStage) -> dict[str, Any]:
    """The scale in a first stage's configuration, as JSON; what a checkpoint stores."""
    config = stage.autoencoder.config
    return {
        key: list(value) if isinstance(value := config[key], tuple) else value for key in SCALE_KEYS if key in config
    }


def restored_stage(stage: FirstStage, settings: Mapping[str, Any]) -> FirstStage:
    """A first stage with the scale of a checkpoint.

    Raises:
        ValueError: no run writes such a scale.
    """
    if not settings or not settings.keys() <= {*SCALE_KEYS}:
        raise ValueError(f"its scale of latents has the keys {sorted(settings)}, and must have some of {SCALE_KEYS}")
    autoencoder = copy.copy(stage.autoencoder)
    autoencoder.register_to_config(**settings)
    return FirstStage(autoencoder)


def scale_warning(std: float) -> str | None:
    """Warn of latents whose standard deviation is far from 1, which noise schedules are made for."""
    low, high = GOOD_STD
    if low <= std <= high:
        return None
    return (
        f"the scaled latents have a standard deviation of {std:.3g}, and noise schedules are made for about 1: use"
        " --scale_factor data, or --latent_stats"
    )

"""Metrics of samples at the validations of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.metrics.features import FeatureExtractor, load_feature_extractor
from diffusers_ddpm_ext.metrics.manifolds import NEAREST
from diffusers_ddpm_ext.metrics.scores import compute_scores
from diffusers_ddpm_ext.training.config.options import ValidationOptions
from diffusers_ddpm_ext.training.data.dataset import DIGITS_LEVELS, ImageData
from diffusers_ddpm_ext.training.data.image_set import ImageSet
from diffusers_ddpm_ext.training.evaluation.channel_features import of_chosen_channels
from diffusers_ddpm_ext.training.evaluation.processes import Processes
from diffusers_ddpm_ext.training.evaluation.samples import SampleDraws, draw_images, extract_features
from diffusers_ddpm_ext.training.evaluation.validation_loss import evenly_spaced
from diffusers_ddpm_ext.utils.pixel_format import PixelFormat
from diffusers_ddpm_ext.utils.vocabulary import SCORES


@dataclass(frozen=True)
class SampleScores:
    """Measures samples against the validation images, in one process.

    Attributes:
        names: of the metrics.
        extractor: of features.
        images: the validation images.
        indices: which of them are used.
        count: number of samples.
        batch_size: samples per forward pass.
    """

    names: tuple[str, ...]
    extractor: FeatureExtractor
    images: ImageSet
    indices: Tensor
    count: int
    batch_size: int

    @cached_property
    def reference(self) -> Tensor:
        """Features of the validation images, (M, D)."""
        return extract_features(self.images, self.indices.tolist(), self.extractor, self._alone)

    @property
    def _alone(self) -> Processes:
        return Processes(0, 1, self.extractor.device, lambda tensor: tensor)

    def measure(self, draws: SampleDraws) -> dict[str, float]:
        """Each metric with the ends of its interval (``kid``, ``kid_low``, ``kid_high``).

        Raises:
            ValueError: the samples or their features are not finite.
        """
        images = draw_images(draws, self.count, self.images.shape, self.images.levels, self.batch_size, self._alone)
        features = extract_features(images, range(self.count), self.extractor, self._alone)
        scores = compute_scores(self.names, features, self.reference)
        return {
            f"{name}{end}": value
            for name, each in scores.items()
            for end, value in (("", each.value), ("_low", each.low), ("_high", each.high))
        }

    def missing(self) -> dict[str, float]:
        """NaN by the names of `measure`."""
        names = [score for metric in self.names for score in SCORES[metric]]
        return {f"{name}{end}": math.nan for name in names for end in ("", "_low", "_high")}


def build_sample_scores(
    options: ValidationOptions, data: ImageData, pixels: PixelFormat, device: torch.device
) -> SampleScores | None:
    """What measures the samples of a run; None without ``validation_metrics``. No random state changes.

    Args:
        options: of validation.
        data: the images.
        pixels: of the images; a vision model gets the chosen channels.
        device: of the features.

    Raises:
        ConfigError: the extractor cannot be loaded or cannot take the images, or there are too few of these.
    """
    names = options.validation_metrics
    if names is None or data.validation is None:
        return None
    indices = evenly_spaced(len(data.validation), options.validation_max_images)
    least = 2 * NEAREST + 2 if "prdc" in names else 4
    if len(indices) < least:
        raise ConfigError(
            f"--validation_metrics {' '.join(names)} needs at least {least} validation images, and there are "
            f"{len(indices)}: hold out more"
        )
    name = options.feature_extractor
    if name is None:
        name = "digits" if data.train.levels == DIGITS_LEVELS else "pixels"
    with torch.random.fork_rng():
        extractor = load_feature_extractor(name, device, options.trust_feature_extractor)
    extractor = of_chosen_channels(extractor, data.channels, pixels)
    try:
        extractor(data.validation.pixels(indices[:1]))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return SampleScores(
        names, extractor, data.validation, indices, options.validation_samples, options.eval_batch_size
    )

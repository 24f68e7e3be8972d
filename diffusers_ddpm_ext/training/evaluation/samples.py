"""Samples whose quality is measured: drawn in batches over processes, and the features of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from diffusers_ddpm_ext.metrics.features import FeatureExtractor
from diffusers_ddpm_ext.training.data.captions import CaptionTable
from diffusers_ddpm_ext.training.data.image_set import levels_to_pixels
from diffusers_ddpm_ext.training.data.latents import SampleSet
from diffusers_ddpm_ext.training.evaluation.processes import Processes
from diffusers_ddpm_ext.utils.random_keys import METRICS, generator

FEATURE_BATCH = 64
"""Images that a process reads at a time to extract their features one by one."""


class Images(Protocol):
    """Images by number."""

    def __len__(self) -> int: ...

    def pixels(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Images, (b, C, H, W), float32 in [-1, 1]."""


@dataclass(frozen=True)
class LevelImages:
    """Images in memory, as levels.

    Attributes:
        values: levels, (N, C, H, W), int32; without levels float32 in [-1, 1].
        levels: number of values that a pixel can have; None for floats.
    """

    values: Tensor
    levels: int | None

    def __len__(self) -> int:
        return len(self.values)

    def pixels(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Images, (b, C, H, W), float32 in [-1, 1]."""
        values = self.values[torch.as_tensor(indices)]
        return values if self.levels is None else levels_to_pixels(values, self.levels)


def to_levels(pixels: Tensor, levels: int | None) -> Tensor:
    """The nearest levels of pixels in [-1, 1], int32: what a file of the images would hold; without levels clipped."""
    if levels is None:
        return pixels.float().clamp(-1, 1)
    return ((pixels.float() + 1) * ((levels - 1) / 2)).round().clamp(0, levels - 1).to(torch.int32)


@dataclass(frozen=True)
class SampleDraws:
    """Draws samples of a pipeline; image i depends on seed and i alone.

    Attributes:
        pipeline: that samples.
        seed: of the samples; image i has the noise that `ddpm-ext sample` gives image i.
        conditions: whose conditions the samples get, in an order that is random once and for all; None without.
        captions: of the conditions.
        arguments: of the pipeline's call.
        on_step: called after each step of each batch; may raise to stop.
    """

    pipeline: Any
    seed: int
    conditions: SampleSet | None
    captions: CaptionTable | None
    arguments: dict[str, Any]
    on_step: Callable[[], Any] = lambda: None

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """Samples, (b, C, H, W), float32 in about [-1, 1], on the CPU."""

        def on_step_end(*_: Any) -> dict[str, Any]:
            self.on_step()
            return {}

        images = self.pipeline(
            batch_size=len(indices),
            generator=[generator("sample", self.seed, index) for index in indices],
            output_type="pt",
            callback_on_step_end=on_step_end,
            **self.arguments,
            **self._conditions(indices),
        ).images
        return (images.float() * 2 - 1).cpu()

    def _conditions(self, indices: Sequence[int]) -> dict[str, Any]:
        """Arguments of the call: the conditions of held-out images, in turn."""
        if self.conditions is None:
            return {}
        count = len(self.conditions)
        order = torch.randperm(count, generator=generator(METRICS, "conditions"))
        chosen = self.conditions.conditions(order[[index % count for index in indices]])
        arguments: dict[str, Any] = chosen.to(self.pipeline.device).as_dict()
        numbers = arguments.pop("captions", None)
        if numbers is not None:
            assert self.captions is not None
            arguments["prompt"] = self.captions.texts(numbers.tolist())
        return arguments


def draw_images(
    draws: SampleDraws,
    count: int,
    shape: tuple[int, int, int],
    levels: int | None,
    batch_size: int,
    processes: Processes,
) -> LevelImages:
    """Draw samples, rounded to the levels of the data. Collective call: every process must make it.

    Args:
        draws: of single batches.
        count: number of samples.
        shape: channels, height and width.
        levels: of the data.
        batch_size: samples per forward pass; they are the same on any number of processes.
        processes: that share the batches.

    Raises:
        ValueError: the pipeline refuses the arguments, or its samples have another shape or are not finite.
    """
    values = to_levels(torch.zeros((count, *shape)), levels)
    values.zero_()
    for batch, counts in processes.batches(-(-count // batch_size)):
        indices = range(batch * batch_size, min(count, (batch + 1) * batch_size))
        pixels = draws.pixels(indices)
        if tuple(pixels.shape[1:]) != shape:
            made, expected = ("x".join(map(str, sides)) for sides in (pixels.shape[1:], shape))
            raise ValueError(
                f"samples of {made} (channels, height, width) cannot be compared with images of {expected}"
            )
        if not bool(torch.isfinite(pixels).all()):
            raise ValueError("the samples are not finite")
        if counts:
            values[indices.start : indices.stop] = to_levels(pixels, levels)
    return LevelImages(_over_processes(values, processes), levels)


def extract_features(
    images: Images, indices: Sequence[int], extractor: FeatureExtractor, processes: Processes
) -> Tensor:
    """Features of images, (n, D), float32 on the CPU. Collective call: every process must make it."""
    features: Tensor | None = None
    for batch, _ in processes.batches(-(-len(indices) // FEATURE_BATCH)):
        part = indices[batch * FEATURE_BATCH : (batch + 1) * FEATURE_BATCH]
        rows = extractor(images.pixels(part))
        if features is None:
            features = torch.zeros(len(indices), rows.shape[1])
        features[batch * FEATURE_BATCH : batch * FEATURE_BATCH + len(part)] = rows
    if features is None:  # more processes than batches
        features = torch.zeros(len(indices), extractor(images.pixels(indices[:1])).shape[1])
    return _over_processes(features, processes)


def _over_processes(values: Tensor, processes: Processes) -> Tensor:
    """The rows of all processes; each has zeros in place of those of others."""
    if processes.world_size == 1:
        return values
    return processes.sum_over_ranks(values.to(processes.device)).cpu()

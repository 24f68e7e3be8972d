"""`ddpm-ext evaluate --metrics`: the quality of samples, by features of them and of held-out images."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_ddpm_ext.cli.arguments import lock_output_folder
from diffusers_ddpm_ext.cli.measuring import IS_STREAM, image_options, images_of_split, join_processes, load_images
from diffusers_ddpm_ext.cli.pipeline_facts import facts_of_pipeline, read_pipeline_facts
from diffusers_ddpm_ext.cli.sample_metrics_options import DEFAULT_SAMPLES, OTHER_SCHEDULER_STEPS, SampleMetricsOptions
from diffusers_ddpm_ext.errors import ConfigError, as_config_error, as_run_error, warn
from diffusers_ddpm_ext.pipelines.acceleration import accelerate_network
from diffusers_ddpm_ext.pipelines.loading import load_pipeline
from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.utils.files import SAMPLE_METRICS_FILE, write_text_atomically

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffusers_ddpm_ext.cli.evaluate import EvaluateOptions
    from diffusers_ddpm_ext.metrics.features import FeatureExtractor
    from diffusers_ddpm_ext.metrics.intervals import Estimate
    from diffusers_ddpm_ext.training.data.dataset import ImageData
    from diffusers_ddpm_ext.training.data.image_set import ImageSet
    from diffusers_ddpm_ext.training.evaluation.processes import Processes
    from diffusers_ddpm_ext.training.evaluation.samples import Images, LevelImages
    from diffusers_ddpm_ext.utils.pixel_format import PixelFormat

NO_COLUMNS: dict[str, Any] = dict.fromkeys(("class_column", "concat_column", "context_column", "caption_column"))
"""Data options of images that only their features are taken of."""
LABELS = {"fd": "Frechet distance", "fd_extrapolated": "  extrapolated to N = infinity", "kid": "kernel distance"}


@dataclass(frozen=True)
class Measurement:
    """What samples are compared with, and by what.

    Attributes:
        options: of the command.
        samples_options: those about samples.
        pipeline: that draws; None for samples made elsewhere.
        data: the images.
        processes: that share the work.
        data_options: what the images are and how they are prepared.
    """

    options: EvaluateOptions
    samples_options: SampleMetricsOptions
    pipeline: Any
    data: ImageData
    processes: Processes
    data_options: DataOptions

    @cached_property
    def extractor(self) -> FeatureExtractor:
        """What makes features.

        Raises:
            ConfigError: it cannot be loaded.
        """
        from diffusers_ddpm_ext.metrics.features import load_feature_extractor
        from diffusers_ddpm_ext.training.data.dataset import DIGITS_LEVELS
        from diffusers_ddpm_ext.training.evaluation.channel_features import of_chosen_channels

        name = self.samples_options.feature_extractor
        if name is None:
            name = "digits" if self.data.train.levels == DIGITS_LEVELS else "pixels"
        device = self.processes.device
        extractor = load_feature_extractor(name, device, self.samples_options.trust_feature_extractor)
        return of_chosen_channels(extractor, self.data.channels, self.pixels)

    @cached_property
    def pixels(self) -> PixelFormat:
        """Dtype and range of the data, and the channels that are shown."""
        from diffusers_ddpm_ext.training.data.preview_format import with_preview

        return with_preview(self.data, self.data_options.preview_channels)

    @cached_property
    def samples(self) -> LevelImages:
        """The samples: drawn, or read. Collective call."""
        train = self.data.train
        if self.samples_options.samples is not None:
            from diffusers_ddpm_ext.training.data.geometry import preprocessing_of
            from diffusers_ddpm_ext.training.evaluation.given_samples import read_samples

            file, is_main = self.samples_options.samples, self.processes.rank == 0
            resizing = preprocessing_of(self.data_options).resizing
            return read_samples(file, train.shape, train.levels, self.data.pixel_format, is_main, resizing)
        return self._draw()

    def _draw(self) -> LevelImages:
        from tqdm import tqdm

        from diffusers_ddpm_ext.cli.measured_latents import as_samples
        from diffusers_ddpm_ext.training.evaluation.samples import SampleDraws, draw_images

        options, train = self.options, self.data.train
        count = self.samples_options.num_samples or DEFAULT_SAMPLES
        steps = drawing_steps(options, self.samples_options)
        arguments: dict[str, Any] = {
            "num_inference_steps": steps,
            "guidance_scale": self.samples_options.guidance_scale,
            "eta": self.samples_options.eta,
            "optimal_timesteps": options.optimal_timesteps,
            "timesteps": self.samples_options.timesteps,
        }
        reference = images_of_split(self.data, options.split)
        conditions = None
        if reference.columns is not None:
            conditions = as_samples(self.pipeline, reference, options.seed, options.folder)
        batches = math.ceil(math.ceil(count / options.batch_size) / self.processes.world_size)
        total = batches * (steps or self.pipeline.scheduler.config.num_train_timesteps)
        with tqdm(total=total, desc="sampling", unit="step", leave=False, disable=self.processes.rank > 0) as bar:
            draws = SampleDraws(self.pipeline, options.seed, conditions, self.data.captions, arguments, bar.update)
            try:
                return draw_images(draws, count, train.shape, train.levels, options.batch_size, self.processes)
            except ValueError as error:
                raise ConfigError(f"{options.folder}: {error}") from None

    def features(self, images: Images, indices: Tensor | None = None, what: str = "samples") -> Tensor:
        """Features of images, (n, D), float32. Collective call."""
        from diffusers_ddpm_ext.training.evaluation.samples import extract_features

        chosen = range(len(images)) if indices is None else indices.tolist()
        with as_config_error(f"--feature_extractor, {what}"):
            return extract_features(images, chosen, self.extractor, self.processes)

    def reference_features(self, images: ImageSet, name: str) -> Tensor:
        """Features of at most --max_images images of the data, from the cache where it has them. Collective call.

        Args:
            images: of the data.
            name: which of its sets they are.
        """
        from diffusers_ddpm_ext.metrics.feature_cache import cache_features, cached_features
        from diffusers_ddpm_ext.training.evaluation.validation_loss import evenly_spaced

        indices = evenly_spaced(len(images), self.options.max_images)
        parts = [self.data.fingerprint, name, str(indices.tolist()), self.extractor.fingerprint, str(images.levels)]
        key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        folder = self.samples_options.feature_cache or self.options.output_folder / "features"
        found = cached_features(folder, key, len(indices))
        hits = self.processes.sum_over_ranks(_flag(found is not None, self.processes.device))
        if int(hits) == self.processes.world_size and found is not None:
            return found
        features = self.features(images, indices, name)
        if self.processes.rank == 0:
            with as_run_error(folder):
                cache_features(folder, key, features)
        return features


def drawing_steps(options: EvaluateOptions, samples_options: SampleMetricsOptions) -> int | None:
    """Sampling steps; None for all of the chain."""
    if options.num_inference_steps is None and samples_options.scheduler is not None:
        return OTHER_SCHEDULER_STEPS
    return options.num_inference_steps


def evaluate_samples(options: EvaluateOptions, samples_options: SampleMetricsOptions) -> str:
    """Measure samples, write the result, and return the lines to print, none except on the main process.

    Raises:
        ConfigError: pipeline, images, samples or extractor cannot be loaded, or do not fit each other.
        RunError: the result cannot be written.
    """
    measurement = _prepare(options, samples_options)
    processes, folder = measurement.processes, options.output_folder
    is_main = processes.rank == 0
    with lock_output_folder("--out", folder) if is_main else nullcontext():
        result = _describe(measurement)
        measurement.extractor  # noqa: B018  before samples are drawn, which takes longer
        measurement.samples  # noqa: B018  before features of the images are kept: these may be refused
        lines: list[str] = []
        for measure in _measures(samples_options):
            found, printed = measure(measurement)
            result |= found
            lines += printed
        _leave(processes)
        if not is_main:
            return ""
        result["num_samples"] = len(measurement.samples)
        text = json.dumps(result, indent=1) + "\n"
        with as_run_error(folder):
            for path in (folder / Path(SAMPLE_METRICS_FILE).name, options.json):
                if path is not None:
                    write_text_atomically(path, text)
    return "\n".join([*lines, _summary(result), f"written to {folder}"])


def _measures(options: SampleMetricsOptions) -> list[Callable[[Measurement], tuple[dict[str, Any], list[str]]]]:
    from diffusers_ddpm_ext.cli.memorization import measure_memorization

    chosen = {_scores: options.metrics is not None, measure_memorization: options.memorization}
    return [measure for measure, is_chosen in chosen.items() if is_chosen]


def _scores(measurement: Measurement) -> tuple[dict[str, Any], list[str]]:
    """The metrics, for the JSON file and as lines to print."""
    from diffusers_ddpm_ext.metrics.scores import compute_scores

    options, chosen = measurement.options, measurement.samples_options
    reference = measurement.reference_features(images_of_split(measurement.data, options.split), options.split)
    samples = measurement.features(measurement.samples)
    if measurement.processes.rank > 0:
        return {}, []
    with as_config_error("--metrics"):
        scores = compute_scores(chosen.metrics or (), samples, reference, options.confidence, chosen.nearest)
    if "fd" in scores and min(len(samples), len(reference)) <= samples.shape[1]:
        warn(
            f"the Frechet distance of {len(samples):,} samples and {len(reference):,} images by {samples.shape[1]:,} "
            "features is mostly bias, also the extrapolated one: use kid, or more images than features"
        )
    result = {
        "metrics": {name: dict(vars(estimate)) for name, estimate in scores.items()},
        "num_reference": len(reference),
        "nearest": chosen.nearest if "prdc" in (chosen.metrics or ()) else None,
    }
    return result, score_lines(scores, len(samples), len(reference), options.confidence)


def score_lines(scores: Mapping[str, Estimate], samples: int, reference: int, confidence: float) -> list[str]:
    """A line for each metric: its value, interval and numbers of images."""
    width = max(len(LABELS.get(name, name)) for name in scores)
    return [
        f"{LABELS.get(name, name):<{width}}  {each.value:10.5g}   {100 * confidence:g} % interval {each.low:.5g} to "
        f"{each.high:.5g}   N = {samples:,} samples, {reference:,} images"
        for name, each in scores.items()
    ]


def _prepare(options: EvaluateOptions, samples_options: SampleMetricsOptions) -> Measurement:
    from diffusers_ddpm_ext.cli.evaluate import weights_variant
    from diffusers_ddpm_ext.cli.sample import set_scheduler
    from diffusers_ddpm_ext.training.data.dataset import load_data

    label = f"--weights {options.weights}"
    facts = read_pipeline_facts(options.folder, weights_variant(options), label)
    data_options = None if facts is None else _data_options(facts, options.data)
    processes = join_processes(options.device)
    is_main = processes.rank == 0
    pipeline = None
    if samples_options.samples is None or facts is None:
        pipeline = load_pipeline(options.folder, weights_variant(options), processes.device, options.dtype, label)
        accelerate_network(pipeline, None, compiled=False)
        pipeline.set_progress_bar_config(disable=True)
    if facts is None or data_options is None:
        data_options = _data_options(facts_of_pipeline(options.folder, pipeline), options.data)
    if samples_options.memorization and data_options.streaming:
        raise ConfigError(f"--memorization: {IS_STREAM}")
    if samples_options.samples is not None:
        data = load_data(replace(data_options, **NO_COLUMNS), progress=is_main)
        return Measurement(options, samples_options, None, data, processes, data_options)
    set_scheduler(pipeline, samples_options.scheduler, samples_options.scheduler_args)
    data = load_images(options.folder, pipeline, data_options, is_main)
    return Measurement(options, samples_options, pipeline, data, processes, data_options)


def _data_options(facts: Any, typed: Mapping[str, Any]) -> DataOptions:
    """The images of the measurement, cropped at their centers."""
    if facts.lacks_first_stage:
        raise ConfigError(f"{facts.source} generates latents of an autoencoder that is not in its folder, not images")
    whole: dict[str, Any] = {"center_crop": True, "random_crop": None}
    return replace(image_options(facts, typed), **whole, random_flip=False, vertical_flip=False, rotate90=False)


def _describe(measurement: Measurement) -> dict[str, Any]:
    """What the numbers depend on, for the JSON file."""
    from diffusers_ddpm_ext.metrics.intervals import NUM_GROUPS, NUM_SPLITS

    options, chosen, pipeline = measurement.options, measurement.samples_options, measurement.pipeline
    drawn: dict[str, Any] = {"source": str(chosen.samples)}
    if pipeline is not None:
        steps = drawing_steps(options, chosen)
        drawn = {
            "source": "drawn",
            "scheduler": type(pipeline.scheduler).__name__,
            "scheduler_args": chosen.scheduler_args,
            "num_inference_steps": steps or int(pipeline.scheduler.config.num_train_timesteps),
            "guidance_scale": chosen.guidance_scale,
            "eta": chosen.eta,
            "seed": options.seed,
            "weights": options.weights,
        }
        if chosen.timesteps not in (None, "even"):
            drawn["timesteps"] = chosen.timesteps
    extractor = measurement.extractor
    return {
        "format": 1,
        "samples": drawn,
        "split": options.split,
        "data": measurement.data.description,
        "confidence": options.confidence,
        "intervals": {
            "fd, kid": f"jackknife of {NUM_GROUPS} groups of samples and images",
            "prdc": f"{NUM_SPLITS} divisions of samples and images into halves",
        },
        "features": {
            "name": extractor.name,
            "preparation": extractor.preparation,
            "fingerprint": extractor.fingerprint,
        },
    }


def _summary(result: Mapping[str, Any]) -> str:
    features, drawn = result["features"], result["samples"]
    how = f"samples of {drawn['source']}"
    if "scheduler" in drawn:  # a folder of samples may be called "drawn", too
        steps = f"{drawn['num_inference_steps']:,} steps" + (
            f" ({drawn['timesteps']})" if "timesteps" in drawn else ""
        )
        how = f"{drawn['scheduler']}, {steps}, guidance {drawn['guidance_scale']:g}"
    return f"features: {features['name']} ({features['preparation']}); {how}; {result['split']} images"


def _flag(value: bool, device: torch.device) -> Tensor:
    import torch

    return torch.tensor(int(value), device=device)


def _leave(processes: Processes) -> None:
    from diffusers_ddpm_ext.training.distributed import leave_process_group

    leave_process_group()

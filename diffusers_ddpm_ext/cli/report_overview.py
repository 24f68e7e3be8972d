"""The facts at the top of a report: state, metrics, speed, size, images and origin of a run or a pipeline."""

from __future__ import annotations

import os
import re
from pathlib import Path

from diffusers_ddpm_ext.compvis.schema import REPORT_FILE
from diffusers_ddpm_ext.hub.card_facts import BITS_PER_LATENT, METRIC_NAMES, FolderFacts
from diffusers_ddpm_ext.hub.sample_scores import SampleScores
from diffusers_ddpm_ext.plotting.channels import channel_view
from diffusers_ddpm_ext.utils.folder_scan import list_names
from diffusers_ddpm_ext.utils.pixel_format import PixelFormat
from diffusers_ddpm_ext.utils.run_metrics import RunMetrics
from diffusers_ddpm_ext.utils.run_timing import TIMING, RunTiming, format_duration, read_timing
from diffusers_ddpm_ext.utils.tensor_files import read_tensor_headers

LARGE_IS_GOOD = ("psnr", "precision", "recall", "density", "coverage")
FAMILIES = {"compvis": "CompVis' code", "openai": "OpenAI's code"}


def overview(facts: FolderFacts, metrics: RunMetrics) -> list[tuple[str, str]]:
    """Names and values, of what the folder states; what cannot be read becomes a problem of ``facts``."""
    last = metrics.last
    pairs = [("state", "finished" if facts.file("finished.json") else "not finished")] if last else []
    if "step" in last:
        pairs.append(("optimizer steps", f"{int(last['step']):,}"))
    pairs += _speed(facts)
    pairs += [(key, _metric(key, metrics)) for key in METRIC_NAMES if key in last]
    parameters = facts.attempt(lambda: count_parameters(facts), 0)
    if parameters:
        pairs.append(("parameters", f"{parameters:,}"))
    images = facts.images()
    if images is not None:
        train = "streamed" if images.train is None else f"{images.train:,}"
        pairs.append(("images", f"{images.name}: {train} for training, {images.validation:,} held out"))
    _, pixels = pixels_of(facts)
    if not pixels.is_8_bit:
        pairs.append(("values", f"{pixels.dtype} from {pixels.low:g} to {pixels.high:g}"))
    stage = facts.attempt(lambda: facts.first_stage(facts.pipeline_file("model_index.json")), None)
    if stage is not None:
        pairs.append(("first stage", facts.attempt(stage.describe, stage.class_name)))
    encoder = facts.attempt(lambda: facts.text_encoder(facts.pipeline_file("model_index.json")), None)
    if encoder is not None:
        pairs.append(("text encoder", facts.attempt(encoder.describe, encoder.class_name)))
    origin = facts.attempt(lambda: _origin(facts), "")
    if origin:
        pairs.append(("converted from", origin))
    checkpoints = numbered(facts.folder, r"checkpoint-([0-9]+)")
    if checkpoints:
        pairs.append(("checkpoints", list_names([path.name for _, path in checkpoints], limit=40)))
    return pairs


def measured(facts: FolderFacts) -> list[tuple[str, str]]:
    """Names and values of what was evaluated after the training: the bound, and metrics of samples."""
    pairs = []
    bound = facts.bound()
    if bound is not None:
        interval = "" if bound.low is None or bound.high is None else f" ({bound.low:.4f} to {bound.high:.4f})"
        pairs.append((bound.label, f"{bound.bits_per_dim:.4f}{interval}"))
    samples = facts.sample_scores()
    return pairs if samples is None else pairs + score_pairs(samples)


def score_pairs(samples: SampleScores) -> list[tuple[str, str]]:
    """Names and values of the metrics of samples, and what they are of."""
    pairs = [(score.name, score.text) for score in samples.scores]
    return [*pairs, ("of", f"{samples.conditions}; {samples.confidence:.0%} intervals")]


def best_of(key: str, metrics: RunMetrics) -> tuple[float, int] | None:
    """The best value of a validation metric and its first step; None of a training metric, which is noise."""
    best = metrics.most if any(word in key for word in LARGE_IS_GOOD) else metrics.least
    return best.get(key) if key.startswith("val/") else None


def count_parameters(facts: FolderFacts) -> int:
    """Parameters of the pipeline's network, or of an autoencoder, from the headers of its default weight files.

    Returns:
        Their number; 0 without files.

    Raises:
        ConfigError: a file is damaged.
    """
    pattern = r"diffusion_pytorch_model(-[0-9]+-of-[0-9]+)?\.safetensors"
    place = "unet" if (facts.folder / "unet").is_dir() else "."
    try:
        names = sorted(name for name in os.listdir(facts.folder / place) if re.fullmatch(pattern, name))
    except OSError:
        return 0
    files = [path for name in names if (path := facts.file(f"{place}/{name}")) is not None]
    return sum(tensor.count for path in files for tensor in read_tensor_headers(path).values())


def pixels_of(facts: FolderFacts) -> tuple[int, PixelFormat]:
    """Channels of an image of the pipeline, 0 without one; dtype and range of the data."""
    return facts.attempt(lambda: _pixels(facts), (0, PixelFormat()))


def preview_note(facts: FolderFacts) -> str:
    """Which channels pictures show, where these are not all."""
    channels, pixels = pixels_of(facts)
    caption = channel_view(channels, pixels).caption if channels else ""
    return f" Shown: {caption}." if caption else ""


def numbered(folder: Path, pattern: str) -> list[tuple[int, Path]]:
    """Entries of a folder with a number in their name, by the number; none where the folder cannot be read."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    matches = [(match, name) for name in names if (match := re.fullmatch(pattern, name)) and len(match[1]) < 20]
    return sorted((int(match[1]), folder / name) for match, name in matches)


def _speed(facts: FolderFacts) -> list[tuple[str, str]]:
    path = facts.file(TIMING)
    timing = RunTiming() if path is None else read_timing(path)
    if timing.problem:
        facts.add_problem(f"{timing.problem.rstrip('.')}; later rows are left out")
    speed = timing.steps_per_second
    if speed is None:
        return []
    time = f"{format_duration(timing.seconds)} for {timing.steps:,.0f} steps, without validation and images"
    return [("training time", time), ("speed", f"{speed:.3g} steps per second")]


def _metric(key: str, metrics: RunMetrics) -> str:
    unit = f" {BITS_PER_LATENT}" if "latent_bpd" in key else ""
    best = best_of(key, metrics)
    return f"{metrics.last[key]:.5f}{unit}" + (f" (best {best[0]:.5f} at step {best[1]:,})" if best else "")


def _pixels(facts: FolderFacts) -> tuple[int, PixelFormat]:
    unet, index = (facts.pipeline_file(name) for name in ("unet/config.json", "model_index.json"))
    stage = facts.first_stage(index)
    channels = unet.integer("out_channels", default=0) if stage is None else stage.pixel_channels
    scheduler = facts.pipeline_file("scheduler/scheduler_config.json")
    if stage is None and scheduler.content.get("variance_type") in ("learned", "learned_range"):
        channels //= 2
    if index.content.get("latent_scaling_factor") is not None:
        channels = 0
    return channels, facts.pixel_format(index, channels)


def _origin(facts: FolderFacts) -> str:
    """What a converted model came from, from ``conversion.json``; empty where there is none."""
    record = facts.record(REPORT_FILE)
    if not record.content:
        return ""
    family, weights = record.string("from"), record.string("default", "")
    left_out = record.list("left_out", ())
    parts = [f"{record.string('source')} of {FAMILIES.get(family, family)}"]
    if weights:
        parts.append(f"{weights} weights")
    if left_out:
        parts.append(f"{len(left_out):,} tensors left out (see {REPORT_FILE})")
    return ", ".join(parts)

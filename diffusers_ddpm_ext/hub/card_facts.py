"""What the files of a folder state about its model and its run, checked, for the card and the report.

Files of the pipeline must be readable, or nothing loads it. What of the run's own records is unreadable is left out
and named: a card or a page shows the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.hub.sample_scores import SampleScores, read_sample_scores
from diffusers_ddpm_ext.pipelines.class_names import read_class_names
from diffusers_ddpm_ext.utils.files import CONFIG, ENVIRONMENT, EVALUATION, METRICS, SAMPLE_METRICS_FILE
from diffusers_ddpm_ext.utils.first_stage_config import FirstStageConfig, read_first_stage_config
from diffusers_ddpm_ext.utils.folder_scan import is_below_link
from diffusers_ddpm_ext.utils.input_files import JsonObject, exists, read_json_object, read_text
from diffusers_ddpm_ext.utils.pixel_format import PixelFormat
from diffusers_ddpm_ext.utils.run_metrics import RunMetrics, read_metrics
from diffusers_ddpm_ext.utils.text_encoder_config import TextEncoderConfig, read_text_encoder_config
from diffusers_ddpm_ext.utils.vocabulary import SCORES
from diffusers_ddpm_ext.utils.yaml_io import load_options

SCORE_NAMES = tuple(
    f"val/{score}{suffix}" for scores in SCORES.values() for score in scores for suffix in ("", "_ema")
)
METRIC_NAMES = (
    "train/loss_simple", "val/loss_simple", "val/loss_simple_ema", "val/bpd", "val/bpd_ema", "val/latent_bpd",
    "val/latent_bpd_ema", "val/psnr", "val/psnr_ema", *SCORE_NAMES,
)  # fmt: skip
MAX_CONFIG_BYTES = 2**20
MAX_FACTS_BYTES = 4 * 2**20
MAX_PROMPTS, MAX_PROMPT_CHARACTERS = 64, 2000

BITS_PER_DIM, BITS_PER_LATENT = "bits per dimension", "bits per latent dimension"
"""Names of a bound: the second is of the density of latents, and comparable only for one first stage and scale."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class ImageCounts:
    """Images of a run, from ``environment.json``.

    Attributes:
        name: of the data set, for a reader.
        train: number of images for training; None for a stream of unknown length.
        validation: number of images held out.
        fingerprint: sha256 of names and pixels, or what stands in its place.
        classes: name of each class and its number of images, None where it is not known.
    """

    name: str
    train: int | None
    validation: int
    fingerprint: str
    classes: list[tuple[str, int | None]]


@dataclass(frozen=True)
class Bound:
    """Bits per dimension and how they were measured, from ``evaluation.json``."""

    bits_per_dim: float
    low: float | None
    high: float | None
    confidence: float
    num_images: int | None
    split: str
    label: str
    parts: dict[str, float]


@dataclass
class FolderFacts:
    """Reads the files of a folder; a link below the folder is never followed.

    Attributes:
        folder: of a run or of a pipeline.
        problems: what was left out and why, a sentence each.
    """

    folder: Path
    problems: list[str] = field(default_factory=list)

    def file(self, name: str) -> Path | None:
        """A file of the folder; None if it is missing, or a link or behind one, which is a problem."""
        if is_below_link(self.folder, name):
            self.add_problem(f"{name} is a link: it is left out")
            return None
        return self.folder / name if exists(self.folder / name) else None

    def add_problem(self, problem: str) -> None:
        """Record what is left out, once."""
        if problem not in self.problems:
            self.problems.append(problem)

    def attempt(self, read: Callable[[], Result], default: Result) -> Result:
        """The result of a reader; its ConfigError becomes a problem."""
        try:
            return read()
        except ConfigError as error:
            self.add_problem(str(error).rstrip("."))
            return default

    def pipeline_file(self, name: str) -> JsonObject:
        """A JSON file of the pipeline; empty where it is missing.

        Raises:
            ConfigError: it cannot be read.
        """
        path = self.file(name)
        if path is None:
            return JsonObject(name, {})
        return read_json_object(
            path, max_bytes=MAX_FACTS_BYTES, allow_infinity=True
        )  # -Infinity is in DPMSolver's config

    def record(self, name: str) -> JsonObject:
        """A JSON file of the run's records; empty where it is missing or unreadable."""
        path, empty = self.file(name), JsonObject(name, {})
        return empty if path is None else self.attempt(
            lambda: read_json_object(path, max_bytes=MAX_FACTS_BYTES), empty
        )  # fmt: skip

    def text(self, name: str) -> str:
        """A text file; empty where it is missing or unreadable."""
        path = self.file(name)
        return "" if path is None else self.attempt(lambda: read_text(path, max_bytes=MAX_CONFIG_BYTES), "")

    def metrics(self) -> RunMetrics:
        """The run's metrics."""
        path = self.file(METRICS)
        metrics = RunMetrics() if path is None else read_metrics(path, METRIC_NAMES)
        if metrics.problem:
            self.add_problem(f"{metrics.problem.rstrip('.')}; later rows are left out")
        return metrics

    def options(self) -> dict[Any, Any]:
        """The run's options by name, without their sections."""
        text = self.text(CONFIG)
        flat: dict[Any, Any] = {}
        options: dict[Any, Any] = {}
        for key, value in self.attempt(lambda: load_config_text(text), options).items():
            flat |= value if isinstance(value, dict) else {key: value}
        return flat

    def first_stage(self, index: JsonObject) -> FirstStageConfig | None:
        """The first stage of the pipeline; ConfigError where its files cannot be read, as those of the network."""
        stage = read_first_stage_config(self.folder, index)
        return None if stage is None or self.file(f"{stage.slot}/config.json") is None else stage

    def text_encoder(self, index: JsonObject) -> TextEncoderConfig | None:
        """The text encoder of the pipeline; ConfigError where its files cannot be read, as those of the network."""
        encoder = read_text_encoder_config(self.folder, index)
        return None if encoder is None or self.file(f"{encoder.slot}/config.json") is None else encoder

    def prompts(self) -> list[str]:
        """Prompts that the run draws with, to show what the model does; the empty prompt where none are recorded."""
        data = self.attempt(lambda: self.record(ENVIRONMENT).object("data", {}), JsonObject(ENVIRONMENT, {}))
        empty: Sequence[str] = ()
        texts = self.attempt(lambda: data.strings("prompts", ()), empty)
        return [text for text in texts[:MAX_PROMPTS] if len(text) <= MAX_PROMPT_CHARACTERS] or [""]

    def images(self) -> ImageCounts | None:
        """The images that the run trained on."""
        environment = self.record(ENVIRONMENT)
        if "data" not in environment:
            return None
        return self.attempt(lambda: _image_counts(environment.object("data")), None)

    def class_names(self, index: JsonObject) -> dict[int, str]:
        """The names of the pipeline's classes by number, from its ``model_index.json``."""
        return read_class_names(index.content.get("id2label"), f"{index.name}: id2label")

    def pixel_format(self, index: JsonObject, channels: int) -> PixelFormat:
        """Dtype and range of the pipeline's data, from its ``model_index.json``; 8-bit images where it has none.

        Args:
            index: of the pipeline.
            channels: of its images; 0 where that is not known.
        """
        content = index.content.get("pixel_format")
        try:
            pixels = PixelFormat() if content is None else PixelFormat.from_dict(content)
            if channels:
                pixels.check_channels(channels)
        except ValueError as error:
            raise ConfigError(f"{index.name}: {error}") from None
        return pixels

    def bound(self) -> Bound | None:
        """The last evaluation of the bound."""
        record = self.record(EVALUATION)
        return self.attempt(lambda: _bound(record), None) if record.content else None

    def sample_scores(self) -> SampleScores | None:
        """The last evaluation of samples."""
        record = self.record(SAMPLE_METRICS_FILE)
        return self.attempt(lambda: read_sample_scores(record), None) if record.content else None


def load_config_text(text: str) -> dict[Any, Any]:
    """The content of a run's ``config.yaml``; ConfigError, which names it, where that is no YAML of options."""
    try:
        return load_options(text)
    except ConfigError as error:
        raise ConfigError(f"{CONFIG}: {error}") from None


def _image_counts(data: JsonObject) -> ImageCounts:
    classes: list[tuple[str, int | None]] = []
    for number, entry in enumerate(data.list("classes", ())):
        item = JsonObject(f"{data.name}: class {number}", entry if isinstance(entry, dict) else {})
        classes.append((item.string("name"), item.integer("images", low=0) if "images" in item else None))
    return ImageCounts(
        data.string("name"), None if data.content.get("train") is None else data.integer("train", low=0),
        data.integer("validation", low=0),
        data.string("fingerprint", ""), classes,
    )  # fmt: skip


def _bound(record: JsonObject) -> Bound:
    low, high = (None if record.content.get(key) is None else record.number(key) for key in ("low", "high"))
    images = record.integer("num_images", low=0) if "num_images" in record else None
    parts = {key: record.number(key) for key in ("prior", "steps", "decoder") if key in record}
    return Bound(
        record.number("bits_per_dim"), low, high, record.number("confidence", 0, 1, 0.95), images,
        record.string("split", "validation"), bound_label(record), parts,
    )  # fmt: skip


def bound_label(record: JsonObject) -> str:
    """The name of a number of bits per dimension, with its chain and bins: only equal ones can be compared.

    Args:
        record: the JSON of `ddpm-ext evaluate`.

    Raises:
        ConfigError: a value in it is not what that command writes.
    """
    details, steps = [], record.content.get("chain_timesteps")
    last = min(record.numbers("chain_timesteps"), default=0) if isinstance(steps, list) else 0
    if "chain" in record:
        details.append(f"chain of {record.integer('chain'):,} steps{f' down to t = {last:g}' if last else ''}")
    if "first_stage" in record:
        stage = record.object("first_stage")
        details.append(f"first stage {stage.string('sha256')[:8]}, scale {_scale_text(stage.numbers('scale'))}")
    kind = record.string("decoder_kind", "")
    if kind == "continuous":
        details.append("density")
    elif record.content.get("bin_width") is not None:
        details.append(f"bins of {record.number('bin_width'):.4g}")
    if kind == "improved_diffusion":
        details.append("improved-diffusion's decoder")
    unit = BITS_PER_LATENT if "first_stage" in record else BITS_PER_DIM
    return f"{unit} ({', '.join(details)})" if details else unit


def _scale_text(scale: Sequence[float]) -> str:
    """What latents are multiplied with: one number, or the smallest and the largest of the channels."""
    factors = sorted({float(f"{1 / value:.5g}") for value in scale if value > 0})
    return " to ".join(f"{factor:g}" for factor in dict.fromkeys((factors[0], factors[-1]))) if factors else "?"

"""Metrics of samples as `ddpm-ext evaluate` wrote them, for the card and the report."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers_ddpm_ext.errors import printable
from diffusers_ddpm_ext.utils.input_files import JsonObject
from diffusers_ddpm_ext.utils.vocabulary import SCORES

NAMES = {
    "fd": "Frechet distance",
    "fd_extrapolated": "Frechet distance, extrapolated to N = infinity",
    "kid": "kernel distance",
}
TYPES = {"fd": "fid", "kid": "kid"}
"""Names that the Hub knows, for the features that are named beside them."""


@dataclass(frozen=True)
class SampleScore:
    """A number with its interval, what it is of, and how its samples were drawn."""

    name: str
    type: str
    value: float
    low: float
    high: float

    @property
    def text(self) -> str:
        """The value and its interval."""
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"


@dataclass(frozen=True)
class SampleScores:
    """All numbers of one evaluation of samples.

    Attributes:
        scores: the numbers.
        conditions: numbers of images, features and sampler: only equal ones can be compared.
        split: of the reference images.
        confidence: of the intervals.
    """

    scores: list[SampleScore]
    conditions: str
    split: str
    confidence: float


def read_sample_scores(record: JsonObject) -> SampleScores:
    """The numbers of a ``sample_metrics.json``.

    Raises:
        ConfigError: a value in it is not what the command writes.
    """
    metrics, drawn = record.object("metrics", {}), record.object("samples")
    scores = []
    for name in (name for names in SCORES.values() for name in names if name in metrics):
        item = metrics.object(name)
        values = (item.number(key) for key in ("value", "low", "high"))
        scores.append(SampleScore(NAMES.get(name, name), TYPES.get(name, name), *values))
    if "memorization" in record:
        rate = record.object("memorization").object("rate")
        values = (rate.number(key) for key in ("value", "low", "high"))
        scores.append(SampleScore("share of copies of training images", "copies", *values))
    parts = [f"{record.integer('num_samples', low=1):,} samples"]
    if "num_reference" in record:
        parts.append(f"{record.integer('num_reference', low=1):,} images of {record.string('split')}")
    parts.append(f"features: {printable(record.object('features').string('name'), 100)}")
    if "scheduler" in drawn:
        guidance = drawn.number("guidance_scale")
        parts.append(f"{printable(drawn.string('scheduler'), 60)}, {drawn.integer('num_inference_steps'):,} steps")
        if "timesteps" in drawn:
            parts[-1] += f" ({printable(drawn.string('timesteps'), 60)})"
        parts += [f"guidance {guidance:g}"] if guidance != 1 else []
    else:
        parts.append("samples made elsewhere")
    return SampleScores(scores, ", ".join(parts), record.string("split"), record.number("confidence", 0, 1))

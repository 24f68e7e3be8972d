"""The result of an inspection, and the JSON object of it ("format": 1), whose keys docs/file-formats.md lists."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffusers_ddpm_ext.training.data.image_scan import ImageSource
from diffusers_ddpm_ext.training.data.inspection.classes import ClassColumn
from diffusers_ddpm_ext.training.data.inspection.duplicates import Duplicates, Place
from diffusers_ddpm_ext.training.data.inspection.histogram import Histogram, coarsen
from diffusers_ddpm_ext.training.data.inspection.image_facts import Kind
from diffusers_ddpm_ext.training.data.inspection.suggestion import Suggestion, command_line
from diffusers_ddpm_ext.training.data.inspection.summary import Named, PixelSummary, SetSummary
from diffusers_ddpm_ext.training.data.inspection.symmetry import MOVES

SET_NAMES = ("train", "validation")
JSON_BINS = 256
MOST_FREQUENT = 5


@dataclass(frozen=True)
class Inspection:
    """What one or two sets of images hold.

    Attributes:
        sources: the training images, and the validation images if there are any.
        summaries: of each.
        not_read: of each, files that are not read: their number by extension.
        duplicates: within and between them.
        classes: columns that can be classes.
        class_faults: why other columns cannot.
        suggestions: flags for `ddpm-ext train`.
        advice: what no flag mends, one sentence each.
    """

    sources: Sequence[ImageSource]
    summaries: Sequence[SetSummary]
    not_read: Sequence[Mapping[str, int]]
    duplicates: Duplicates
    classes: Sequence[ClassColumn] = ()
    class_faults: Sequence[str] = ()
    suggestions: Sequence[Suggestion] = ()
    advice: Sequence[str] = ()

    def name(self, place: Place) -> str:
        """The name of an image."""
        return self.sources[place.set].names[place.row]

    def to_dict(self) -> dict[str, Any]:
        """The inspection for JSON: numbers, texts, lists and objects; NaN and infinity are null."""
        sets = {
            SET_NAMES[number]: _set_dict(summary, self.not_read[number])
            for number, summary in enumerate(self.summaries)
        }
        return {
            "format": 1,
            "train": sets["train"],
            "validation": sets.get("validation"),
            "duplicates": self._duplicates_dict(),
            "classes": [_class_dict(column) for column in self.classes],
            "suggestions": [
                {"flag": each.flag, "values": list(each.values), "reason": each.reason} for each in self.suggestions
            ],
            "advice": list(self.advice),
            "command": command_line(self.suggestions) if self.suggestions else None,
        }

    def _duplicates_dict(self) -> dict[str, Any]:
        found = self.duplicates
        return {
            "copies": dict(zip(SET_NAMES, found.num_copies, strict=True)),
            "groups": [[self._place_dict(place) for place in group] for group in found.groups],
            "overlap": found.num_leaked,
            "overlap_pairs": [
                {"validation": self.name(held_out), "train": self.name(trained)} for held_out, trained in found.leaked
            ],
            "near": [
                {
                    "first": self._place_dict(pair.first),
                    "second": self._place_dict(pair.second),
                    "bits": pair.bits,
                    "difference": pair.difference,
                    "mirrored": pair.is_mirrored,
                }
                for pair in found.near
            ],
            "near_complete": found.near_complete,
        }

    def _place_dict(self, place: Place) -> dict[str, str]:
        return {"set": SET_NAMES[place.set], "name": self.name(place)}


def quantiles(values: np.ndarray) -> tuple[float, float, float]:
    """Smallest value, median and largest value."""
    low, middle, high = np.quantile(values, [0, 0.5, 1]).tolist()
    return low, middle, high


def frequent_sizes(summary: SetSummary, count: int = MOST_FREQUENT) -> list[tuple[int, int, int]]:
    """The most frequent sizes: height, width, number of images."""
    sizes, counts = np.unique(summary.sizes, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:count]
    return [(int(sizes[k, 0]), int(sizes[k, 1]), int(counts[k])) for k in order]


def _set_dict(summary: SetSummary, not_read: Mapping[str, int]) -> dict[str, Any]:
    return {
        "source": summary.option,
        "images": summary.total,
        "read": summary.num_read,
        "readable": summary.num_readable,
        "unreadable": _named_dict(summary.unreadable),
        "not_finite": _named_dict(summary.not_finite),
        "not_read": dict(not_read),
        "sizes": _sizes_dict(summary) if summary.num_readable else None,
        **_pixels_dict(summary.pixels),
    }


def _sizes_dict(summary: SetSummary) -> dict[str, Any]:
    sizes = summary.sizes
    measures = {"height": sizes[:, 0], "width": sizes[:, 1], "aspect_ratio": sizes[:, 1] / sizes[:, 0]}
    result: dict[str, Any] = {
        name: dict(zip(("min", "median", "max"), quantiles(values), strict=True)) for name, values in measures.items()
    }
    result["most_frequent"] = [
        {"height": height, "width": width, "count": count} for height, width, count in frequent_sizes(summary)
    ]
    return result


def _pixels_dict(pixels: PixelSummary) -> dict[str, Any]:
    return {
        "modes": dict(pixels.modes.most_common()),
        "extensions": dict(pixels.extensions.most_common()),
        "kinds": [_kind_dict(pixels, kind) for kind, _ in pixels.kinds.most_common()],
        "traits": {trait: _named_dict(named) for trait, named in sorted(pixels.traits.items())},
        "symmetry": {
            flag: {"asymmetry": pixels.symmetry.asymmetry(flag), "fits": pixels.symmetry.fits(flag)} for flag in MOVES
        },
    }


def _kind_dict(pixels: PixelSummary, kind: Kind) -> dict[str, Any]:
    statistics = pixels.statistics[kind]
    return {
        "channels": kind.channels,
        "dtype": kind.dtype,
        "count": pixels.kinds[kind],
        "low": statistics.low,
        "high": statistics.high,
        "mean": [_finite(value) for value in statistics.moments.mean.tolist()],
        "std": [_finite(value) for value in statistics.moments.std.tolist()],
        "histogram": _histogram_dict(statistics.histogram),
    }


def _histogram_dict(histogram: Histogram) -> dict[str, Any]:
    shown = coarsen(histogram, JSON_BINS)
    return {"start": float(shown.edges[0]), "bin_width": shown.width, "counts": shown.counts.tolist()}


def _class_dict(column: ClassColumn) -> dict[str, Any]:
    return {
        "column": column.name,
        "names": list(column.names),
        "train": list(column.train),
        "validation": None if column.validation is None else list(column.validation),
    }


def _named_dict(named: Named) -> dict[str, Any]:
    return {"count": named.count, "files": [_file_dict(name, reason) for name, reason in named.names]}


def _file_dict(name: str, reason: str) -> dict[str, str]:
    return {"name": name, "reason": reason} if reason else {"name": name}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

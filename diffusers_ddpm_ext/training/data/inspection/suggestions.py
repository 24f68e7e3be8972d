"""The command of `ddpm-ext train` that fits a set of images, with a reason for each of its flags."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from diffusers_ddpm_ext.training.data.inspection.classes import ClassColumn
from diffusers_ddpm_ext.training.data.inspection.image_facts import COLORLESS, TRANSPARENT
from diffusers_ddpm_ext.training.data.inspection.reading import ALPHA
from diffusers_ddpm_ext.training.data.inspection.summary import SetSummary

LARGEST_SIDE = 128
"""Pixels of the longer side that are suggested: larger ones take very long without latents."""
DEFAULT_HALVINGS = 5
"""How often the default network halves an image."""
SMALLEST_LEVEL = 4
"""Pixels of the shorter side at the lowest level of a suggested network."""
WIDTHS = (128, 256, 256, 512)
SAME_ASPECT = 1.1
"""Aspect ratios that differ by up to this factor are one."""
SHARE_NOT_ENLARGED = 0.9
"""Share of the images that the suggested size does not enlarge."""
IMBALANCE = 3.0
REASONS = {
    "train_data_dir": "the images",
    "dataset_name": "the images",
    "validation_data_dir": "the images to validate on",
    "validation_split": "the images to validate on",
}


@dataclass(frozen=True)
class Suggestion:
    """A flag of `ddpm-ext train`, its values, and one sentence why."""

    flag: str
    values: tuple[str, ...]
    reason: str

    @property
    def words(self) -> list[str]:
        """The flag as the words of a command line."""
        return [f"--{self.flag}", *self.values]


@dataclass(frozen=True)
class Origin:
    """Where the images come from: the flags that select them.

    Attributes:
        name: of the folder or dataset.
        flags: that select the images, and their values.
    """

    name: str
    flags: Sequence[tuple[str, str]]


def command_line(suggestions: Sequence[Suggestion]) -> str:
    """The suggested command, for a POSIX shell."""
    return shlex.join(["ddpm-ext", "train", *(word for each in suggestions for word in each.words)])


def suggest(origin: Origin, summary: SetSummary, classes: ClassColumn | None) -> list[Suggestion]:
    """Suggest the flags of a run on these images; a set without a readable image gets none."""
    if not summary.num_readable:
        return []
    flags = [Suggestion(name, (value,), REASONS.get(name, "as given")) for name, value in origin.flags]
    flags += _sizes(summary)
    flags += _channels(summary)
    flags += _flips(summary)
    flags += _classes(classes)
    if summary.unreadable.count:
        count = summary.unreadable.count
        flags.append(Suggestion("skip_bad_images", (), f"{count:,} cannot be read; or repair or remove them"))
    name = re.sub(r"[^\w.-]+", "-", origin.name).strip("-.") or "images"
    return [*flags, Suggestion("output_dir", (f"runs/{name}",), "where the run is saved")]


def _sizes(summary: SetSummary) -> Iterator[Suggestion]:
    """Resolution, and the network's levels where the default ones do not fit it."""
    sizes = summary.sizes
    height, width, reason = _resolution(sizes)
    values = (str(height),) if height == width else (str(height), str(width))
    yield Suggestion("resolution", values, reason)
    halvings = _halvings(height, width)
    if halvings < DEFAULT_HALVINGS:
        levels = [WIDTHS[min(level, len(WIDTHS) - 1)] for level in range(halvings + 1)]
        size = f"{height}" if height == width else f"{height} x {width}"
        times = {0: "not be halved", 1: "be halved once", 2: "be halved twice"}.get(
            halvings, f"be halved {halvings} times"
        )
        yield Suggestion(
            "block_out_channels",
            tuple(map(str, levels)),
            f"{size} can {times} down to {min(height, width) >> halvings} pixels; the default network halves"
            f" {DEFAULT_HALVINGS} times",
        )


def _resolution(sizes: np.ndarray) -> tuple[int, int, str]:
    """Height, width, and why."""
    if (sizes == sizes[0]).all() and sizes.max() <= LARGEST_SIDE:
        height, width = int(sizes[0, 0]), int(sizes[0, 1])
        fitted = (_rounded(height), _rounded(width))
        same = (
            "all images have this size" if fitted == (height, width) else f"all images have {height} x {width} pixels"
        )
        return *fitted, same
    short = int(np.quantile(sizes.min(axis=1), 1 - SHARE_NOT_ENLARGED))
    ratios = sizes[:, 1] / sizes[:, 0]
    low, high = np.quantile(ratios, [0.05, 0.95])
    ratio = float(np.median(ratios)) if high <= SAME_ASPECT * low and not 1 / SAME_ASPECT < low < SAME_ASPECT else 1.0
    scale = min(short, LARGEST_SIDE / max(ratio, 1 / ratio))
    height, width = _rounded(scale * max(1.0, 1 / ratio)), _rounded(scale * max(1.0, ratio))
    shape = "" if ratio == 1 else f", in their aspect ratio of {ratio:.2f}"
    if short > 2 * LARGEST_SIDE:
        return (
            height,
            width,
            (
                f"short sides have {short:,} pixels or more{shape}; {LARGEST_SIDE} are slow in pixels already:"
                " see --vae for latents"
            ),
        )
    return (
        height,
        width,
        f"{SHARE_NOT_ENLARGED:.0%} of the images have a short side of {short:,} pixels or more{shape}",
    )


def _rounded(pixels: float) -> int:
    """A side that a network can halve: the next smaller multiple of 32, or of a lower power of two."""
    whole = int(pixels)
    step = 32 if whole >= 32 else 4 if whole >= 8 else 1
    exact = whole % 4 == 0 and whole < 64
    return whole if exact else max(step, whole // step * step)


def _halvings(height: int, width: int) -> int:
    """How often both sides can be halved, down to `SMALLEST_LEVEL` pixels unless the default network does."""
    common = math.gcd(height, width)
    factors = (common & -common).bit_length() - 1
    if factors >= DEFAULT_HALVINGS:
        return DEFAULT_HALVINGS
    room = max(0, int(math.log2(max(1, min(height, width) / SMALLEST_LEVEL))))
    return min(factors, room, len(WIDTHS) - 1)


def _channels(summary: SetSummary) -> Iterator[Suggestion]:
    """Channels, where the images differ or have some that say nothing."""
    pixels, count = summary.pixels, summary.num_readable
    channels = {kind.channels for kind in pixels.kinds}
    if not channels <= {1, 3, 4}:
        return
    gray = sum(number for kind, number in pixels.kinds.items() if kind.channels == 1)
    if max(channels) > 1 and pixels.count_of(COLORLESS) + gray == count and not pixels.count_of(TRANSPARENT):
        yield Suggestion("channels", ("1",), "the three colors of every pixel are equal")
    elif ALPHA in pixels.traits and not pixels.count_of(TRANSPARENT):
        yield Suggestion("channels", ("3",), "images with an alpha channel are opaque in every pixel")
    elif len(channels) > 1:
        shares = ", ".join(
            f"{sum(n for kind, n in pixels.kinds.items() if kind.channels == each):,} have {each}"
            for each in sorted(channels)
        )
        yield Suggestion("channels", ("3",), f"the images differ in channels ({shares})")


def _flips(summary: SetSummary) -> Iterator[Suggestion]:
    if summary.pixels.mirror.mirrors_belong:
        effect = max(summary.pixels.mirror.effects)
        yield Suggestion(
            "random_flip", (), f"mirrored images do not differ from the others (asymmetry {effect:.2f}); not for text"
        )


def _classes(classes: ClassColumn | None) -> Iterator[Suggestion]:
    if classes is None:
        return
    number = sum(count > 0 for count in classes.train)
    if number < 2:
        return
    yield Suggestion("conditioning_key", ("adm",), f"draws the class that is asked for, one of {number:,}")
    yield Suggestion("class_column", (classes.name,), "where the classes are")

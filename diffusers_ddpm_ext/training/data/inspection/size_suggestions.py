"""The size of the images that a run is suggested to have, and the network's levels for it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import numpy as np

from diffusers_ddpm_ext.training.data.inspection.suggestion import Suggestion
from diffusers_ddpm_ext.training.data.inspection.summary import SetSummary
from diffusers_ddpm_ext.training.data.resizing import resized_size

LARGEST_SIDE = 128
"""Pixels of the longer side that are suggested: larger ones take very long without latents."""
DEFAULT_HALVINGS = 5
"""How often the default network halves an image."""
SMALLEST_LEVEL = 4
"""Pixels of the shorter side at the lowest level of a suggested network."""
WIDTHS = (128, 256, 256, 512)
LEAST_KEPT = 0.6
"""Share of the median image below which a crop loses too much."""
SAME_ASPECT = 1.1
"""Aspect ratios that differ by up to this factor are one."""
SHARE_NOT_ENLARGED = 0.9
"""Share of the images that the suggested size does not enlarge."""


def suggest_size(summary: SetSummary) -> Iterator[Suggestion]:
    """Resolution, and the network's levels where the default ones do not fit it."""
    sizes = summary.sizes
    height, width, reason = _resolution(sizes)
    ratios = sizes[:, 1] / sizes[:, 0] * height / width
    kept = float(np.median(np.minimum(ratios, 1 / ratios)))
    values = (str(height),) if height == width else (str(height), str(width))
    yield Suggestion("resolution", values, reason)
    if kept < LEAST_KEPT:
        yield Suggestion(
            "resize", ("pad",), f"a crop keeps {kept:.0%} of half of the images or less; or stretch, which distorts"
        )
    halvings = _halvings(height, width)
    if halvings < DEFAULT_HALVINGS:
        levels = [WIDTHS[min(level, len(WIDTHS) - 1)] for level in range(halvings + 1)]
        size = f"{height}" if height == width else f"{height} x {width}"
        how = ("cannot be halved", "can be halved once", "can be halved twice")[halvings : halvings + 1]
        yield Suggestion(
            "block_out_channels",
            tuple(map(str, levels)),
            f"{size} {how[0] if how else f'can be halved {halvings} times'}, down to {min(height, width) >> halvings}"
            f" pixels; the default network halves {DEFAULT_HALVINGS} times",
        )


def count_strips(summary: SetSummary, height: int, width: int) -> int:
    """Number of images that are too long to be resized to a size."""
    count = 0
    for own, number in Counter(map(tuple, summary.sizes.tolist())).items():
        try:
            resized_size((own[0], own[1]), (height, width), "crop")
        except ValueError:
            count += number
    return count


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

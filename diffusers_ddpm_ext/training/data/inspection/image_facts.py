"""What is kept of an image after it was read: numbers of a few kilobytes, whatever its size."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffusers_ddpm_ext.training.data.image_files import Payload
from diffusers_ddpm_ext.training.data.inspection.histogram import (
    Histogram,
    Moments,
    histogram_of,
    moments_of,
    moments_of_histogram,
)
from diffusers_ddpm_ext.training.data.inspection.perceptual_hash import SIDE, perceptual_hash
from diffusers_ddpm_ext.training.data.inspection.reading import ALPHA, read_image

TRANSPARENT, COLORLESS = "transparent pixels", "color that is gray"
MAX_CHANNELS = 16
"""Channels with a histogram of their own; of more, the first ones."""
DIGEST_BYTES = 16
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's gray


@dataclass(frozen=True, order=True)
class Kind:
    """What all images of a training set agree in."""

    channels: int
    dtype: str


@dataclass(frozen=True)
class PixelStatistics:
    """Values of pixels, over one or many images of a kind.

    Attributes:
        low: smallest finite value.
        high: largest finite value.
        nan: number of values that are NaN.
        infinite: number of values that are infinite.
        histogram: of the first `MAX_CHANNELS` channels, where all of a pixel's are finite; None without such pixels.
        moments: of the same values.
    """

    low: float
    high: float
    nan: int
    infinite: int
    histogram: Histogram | None
    moments: Moments | None

    def merge(self, other: PixelStatistics) -> PixelStatistics:
        """The statistics of the images of both."""
        result = other if self.histogram is None else self
        if self.histogram is not None and other.histogram is not None:
            assert self.moments is not None
            assert other.moments is not None
            result = replace(
                result, histogram=self.histogram.merge(other.histogram), moments=self.moments.merge(other.moments)
            )
        return replace(
            result,
            low=min(self.low, other.low),
            high=max(self.high, other.high),
            nan=self.nan + other.nan,
            infinite=self.infinite + other.infinite,
        )


@dataclass(frozen=True)
class ImageFacts:
    """What is kept of an image.

    Attributes:
        size: height and width, upright.
        kind: channels and dtype.
        mode: as `RawImage` has it.
        format: as `RawImage` has it.
        traits: those of `RawImage`, `TRANSPARENT` and `COLORLESS`.
        statistics: of its pixels.
        digest: hash of shape, dtype and pixels.
        hash: the perceptual hash.
        gray: of 32 x 32 pixels, float32, (32, 32); 0 for pixels that are not finite.
    """

    size: tuple[int, int]
    kind: Kind
    mode: str
    format: str
    traits: frozenset[str]
    statistics: PixelStatistics
    digest: bytes
    hash: int
    gray: NDArray[np.float32]


def image_facts(payload: Payload) -> ImageFacts:
    """Read an image and keep what `ImageFacts` has.

    Raises:
        UnreadableImage: as `read_image`.
        ConfigError: as `read_image`.
    """
    raw = read_image(payload)
    values = raw.values
    height, width, channels = values.shape
    traits = set(raw.traits)
    if ALPHA in traits and int(values[..., 3].min()) < 256**values.itemsize - 1:
        traits.add(TRANSPARENT)
    if channels in (3, 4) and _is_gray(values):
        traits.add(COLORLESS)
    gray = small_gray(values)
    digest = hashlib.blake2b(f"{values.shape} {values.dtype.str}".encode(), digest_size=DIGEST_BYTES)
    digest.update(np.ascontiguousarray(values).data)
    return ImageFacts(
        (height, width),
        Kind(channels, values.dtype.name),
        raw.mode,
        raw.format,
        frozenset(traits),
        _statistics(values),
        digest.digest(),
        perceptual_hash(gray),
        gray,
    )


def _is_gray(values: NDArray[np.generic]) -> bool:
    """Whether the three colors of every pixel are equal; most pictures show in their first row that they are not."""
    return all(
        bool((part[..., 0] == part[..., 1]).all() and (part[..., 1] == part[..., 2]).all())
        for part in (values[:1], values)
    )


def _statistics(values: NDArray[np.generic]) -> PixelStatistics:
    """Statistics of one image, (H, W, C)."""
    shown = values[..., :MAX_CHANNELS]
    if values.dtype == np.uint8:
        histogram = _histogram_of_bytes(shown)
        present = np.flatnonzero(histogram.counts.any(axis=0))
        low, high = (int(present[0]), int(present[-1])) if shown is values else (int(values.min()), int(values.max()))
        return PixelStatistics(low, high, 0, 0, histogram, moments_of_histogram(histogram))
    nan = infinite = 0
    columns = shown.reshape(-1, shown.shape[2]).T
    finite = values
    if values.dtype.kind == "f":
        is_finite = np.isfinite(values)
        if not is_finite.all():
            nan = int(np.isnan(values).sum())
            infinite = int(np.isinf(values).sum())
            finite = values[is_finite]
            columns = columns[:, is_finite[..., :MAX_CHANNELS].all(axis=2).ravel()]
    if not columns.size:
        empty = not finite.size
        return PixelStatistics(
            np.inf if empty else float(finite.min()),
            -np.inf if empty else float(finite.max()),
            nan,
            infinite,
            None,
            None,
        )
    return PixelStatistics(
        finite.min().item(), finite.max().item(), nan, infinite, histogram_of(columns), moments_of(columns)
    )


def _histogram_of_bytes(values: NDArray[np.generic]) -> Histogram:
    """Histogram of 8 bits, (H, W, C); Pillow's is several times as fast as NumPy's."""
    channels = values.shape[2]
    if channels in (1, 3, 4):
        counts = Image.fromarray(np.squeeze(values, 2) if channels == 1 else values).histogram()
        return Histogram(np.array(counts, dtype=np.int64).reshape(channels, 256), 0, 0)
    counts = np.stack([np.bincount(values[..., channel].ravel(), minlength=256) for channel in range(channels)])
    return Histogram(counts.astype(np.int64), 0, 0)


def small_gray(values: NDArray[np.generic]) -> NDArray[np.float32]:
    """An image, (H, W, C), in gray at 32 x 32 pixels, (32, 32), float32; transparency over white."""
    return np.asarray(
        _gray_image(values).resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0), dtype=np.float32
    )


def _gray_image(values: NDArray[np.generic]) -> Image.Image:
    channels = values.shape[2]
    if values.dtype == np.uint8 and channels in (1, 3, 4):
        image = Image.fromarray(np.squeeze(values, 2) if channels == 1 else values)
        if channels == 4:
            background = Image.new("RGBA", image.size, "white")
            background.alpha_composite(image)
            image = background.convert("RGB")
        return image.convert("L")
    floats = np.where(np.isfinite(values), values, 0).astype(np.float32)
    weights = np.array(LUMA if channels in (3, 4) else [1 / channels] * channels, dtype=np.float32)
    return Image.fromarray(floats[..., : len(weights)] @ weights)

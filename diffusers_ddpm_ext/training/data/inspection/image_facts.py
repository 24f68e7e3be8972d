"""What is kept of an image after it was read: numbers of a few kilobytes, whatever its size."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffusers_ddpm_ext.training.data.array_images import ArrayReading, UnsupportedImage, outside_range
from diffusers_ddpm_ext.training.data.image_files import Payload
from diffusers_ddpm_ext.training.data.inspection.histogram import (
    Histogram,
    Moments,
    histogram_of,
    moments_of,
    moments_of_histogram,
)
from diffusers_ddpm_ext.training.data.inspection.perceptual_hash import SIDE, perceptual_hash
from diffusers_ddpm_ext.training.data.raw_image import RawImage, read_image

TURNED, ANIMATED, ALPHA = "turned by EXIF", "animated", "alpha channel"
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
        low: smallest value.
        high: largest value.
        histogram: of the first `MAX_CHANNELS` channels.
        moments: of the same channels.
    """

    low: float
    high: float
    histogram: Histogram
    moments: Moments

    def merge(self, other: PixelStatistics) -> PixelStatistics:
        """The statistics of the images of both."""
        return PixelStatistics(
            min(self.low, other.low),
            max(self.high, other.high),
            self.histogram.merge(other.histogram),
            self.moments.merge(other.moments),
        )


@dataclass(frozen=True)
class ImageFacts:
    """What is kept of an image.

    Attributes:
        size: height and width, upright.
        kind: channels and dtype.
        mode: as `RawImage` has it.
        traits: `TURNED`, `ANIMATED`, `ALPHA`, `TRANSPARENT`, `COLORLESS`, those that it has.
        statistics: of its pixels.
        digest: hash of shape, dtype and pixels.
        hash: the perceptual hash.
        mirrored_hash: that of the mirror image.
        gray: of 32 x 32 pixels, float32, (32, 32).
    """

    size: tuple[int, int]
    kind: Kind
    mode: str
    traits: frozenset[str]
    statistics: PixelStatistics
    digest: bytes
    hash: int
    mirrored_hash: int
    gray: NDArray[np.float32]


def image_facts(payload: Payload, reading: ArrayReading) -> ImageFacts:
    """Read an image and keep what `ImageFacts` has.

    Raises:
        UnreadableImage: as `read_image`.
        UnsupportedImage: as `read_image`, or its values are outside the range.
    """
    raw = read_image(payload, reading)
    values = np.ascontiguousarray(raw.values)
    height, width, channels = values.shape
    statistics = _statistics(raw.picture, values)
    if reading.data_range is not None:
        low, high = reading.data_range
        if statistics.low < low or statistics.high > high:
            raise UnsupportedImage(outside_range(statistics.low, statistics.high, reading.data_range))
    gray = small_gray(raw)
    digest = hashlib.blake2b(f"{values.shape} {values.dtype.str}".encode(), digest_size=DIGEST_BYTES)
    digest.update(values.data)
    return ImageFacts(
        (height, width),
        Kind(channels, values.dtype.name),
        raw.mode,
        frozenset(_traits(raw, values)),
        statistics,
        digest.digest(),
        perceptual_hash(gray),
        perceptual_hash(gray[:, ::-1]),
        gray,
    )


def _traits(raw: RawImage, values: NDArray[np.generic]) -> set[str]:
    traits = {TURNED} if raw.is_turned else set()
    traits |= {ANIMATED} if raw.is_animated else set()
    if raw.has_alpha:
        opaque = 1.0 if values.dtype.kind == "f" else np.iinfo(values.dtype.name).max
        traits |= {ALPHA, TRANSPARENT} if values[..., 3].min() < opaque else {ALPHA}
    is_color = values.shape[2] == 3 or raw.has_alpha
    # Most pictures show in their first row that they have colors.
    return traits | {COLORLESS} if is_color and _is_gray(values[:1]) and _is_gray(values) else traits


def _is_gray(values: NDArray[np.generic]) -> bool:
    red, green, blue = values[..., 0], values[..., 1], values[..., 2]
    return bool((red == green).all() and (green == blue).all())


def _statistics(picture: Image.Image | np.ndarray, values: NDArray[np.generic]) -> PixelStatistics:
    """Statistics of one image, (H, W, C), which is also passed as Pillow's if it has 8 bits."""
    if isinstance(picture, Image.Image):  # Pillow's histograms are several times as fast as NumPy's
        counts = np.array(picture.histogram(), dtype=np.int64).reshape(-1, 256)
        present = np.flatnonzero(counts.any(axis=0))
        histogram = Histogram(counts, 0, 0)
        return PixelStatistics(int(present[0]), int(present[-1]), histogram, moments_of_histogram(histogram))
    columns = values.reshape(-1, values.shape[2])[:, :MAX_CHANNELS].T
    return PixelStatistics(values.min().item(), values.max().item(), histogram_of(columns), moments_of(columns))


def small_gray(raw: RawImage) -> NDArray[np.float32]:
    """An image in gray at 32 x 32 pixels: (32, 32); transparency over white."""
    if isinstance(raw.picture, Image.Image):
        image = raw.picture
        if raw.has_alpha:
            background = Image.new("RGBA", image.size, "white")
            background.alpha_composite(image)
            image = background.convert("RGB")
        image = image.convert("L")
    else:
        values = raw.values
        channels = values.shape[2]
        weights = LUMA if channels == 3 or raw.has_alpha else [1 / channels] * channels
        with np.errstate(over="ignore"):
            gray = values[..., : len(weights)].astype(np.float32) @ np.array(weights, dtype=np.float32)
        image = Image.fromarray(np.nan_to_num(gray, posinf=0, neginf=0))  # float64 may be beyond float32
    small = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return np.asarray(small, dtype=np.float32)

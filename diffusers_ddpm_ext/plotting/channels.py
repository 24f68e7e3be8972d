"""Which channels of images are drawn, and as what colors: images of any number of channels as gray or color."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffusers_ddpm_ext.utils.pixel_format import PixelFormat

SPREAD = 2.5
"""Standard deviations of a principal component that fill [-1, 1]."""
COLORS = "as red, green and blue"


@dataclass(frozen=True)
class ChannelView:
    """Colors of images as weighted sums of their channels.

    Attributes:
        channels: C of the images.
        rows: (1 or 3, C + 1), the weights of the channels and an offset, in [-1, 1]; None draws them as they are.
        caption: what is drawn, for the reader; empty for images as they are.
    """

    channels: int
    rows: NDArray[np.float64] | None = None
    caption: str = ""

    @property
    def depth(self) -> int:
        """Channels of what is drawn: 1, 3 or 4."""
        return self.channels if self.rows is None else len(self.rows)

    def __call__(self, images: ArrayLike) -> NDArray[np.float32]:
        """Return images (N, C, H, W) as they are drawn, (N, depth, H, W), of the same units."""
        values = np.asarray(images, dtype=np.float32)
        if self.rows is None:
            return values
        colors = np.einsum("kc,nchw->nkhw", self.rows[:, :-1], values.astype(np.float64))
        return (colors + self.rows[:, -1, None, None]).astype(np.float32)


def is_picture(channels: int, pixels: PixelFormat) -> bool:
    """Whether all channels are drawn: gray, color, or color with transparency; the fourth of an array is none."""
    return channels in (1, 3) or (channels == 4 and pixels.suffix == ".png")


def channel_view(channels: int, pixels: PixelFormat | None = None) -> ChannelView:
    """How images are drawn.

    Args:
        channels: C of the images.
        pixels: its ``preview_channels`` or ``preview_components`` decide. Without any, gray, color and color with
            transparency are drawn as they are, and of other images the first channel.

    Raises:
        ValueError: it names a channel that the images do not have.
    """
    pixels = PixelFormat() if pixels is None else pixels
    pixels.check_channels(channels)
    picked, rows = pixels.preview_channels, pixels.preview_components
    if picked is None and rows is not None:
        return ChannelView(channels, np.array(rows), f"principal components 1, 2, 3 of {channels} channels {COLORS}")
    if picked is None and is_picture(channels, pixels):
        return ChannelView(channels)
    picked = (0,) if picked is None else picked
    if picked == tuple(range(channels)):
        return ChannelView(channels)
    weights = np.zeros((len(picked), channels + 1))
    weights[range(len(picked)), picked] = 1
    names = ", ".join(map(str, picked))
    caption = f"channel {names} of {channels}" if len(picked) == 1 else f"channels {names} of {channels} {COLORS}"
    return ChannelView(channels, weights, f"{caption} (0 is the first)")


def principal_components(images: ArrayLike) -> tuple[tuple[float, ...], ...]:
    """The colors that show most of what differs between pixels: ``preview_components`` of a `PixelFormat`.

    Args:
        images: (N, C, H, W), C three or more, in the model's units.

    Returns:
        Three rows of C weights and an offset, for red, green and blue: the principal components of the pixels, in the
        order of their variance, centered and scaled to 2.5 standard deviations on either side; the largest weight of
        each is positive. A component without variance is gray everywhere. Numbers have six digits.
    """
    values = np.asarray(images, dtype=np.float64)
    flat = np.moveaxis(values, 1, 0).reshape(values.shape[1], -1)
    mean = flat.mean(axis=1)
    variances, vectors = np.linalg.eigh(np.cov(flat, bias=True))
    rows = []
    for index in (-1, -2, -3):
        deviation, vector = np.sqrt(max(variances[index], 0)), vectors[:, index]
        is_flat = deviation < 1e-6 * max(1e-3, np.sqrt(max(variances[-1], 0)))
        weights = np.zeros_like(vector) if is_flat else vector / (SPREAD * deviation)
        weights = weights * (-1 if weights[np.abs(weights).argmax()] < 0 else 1)
        rows.append(tuple(float(f"{value:.6g}") for value in (*weights, -weights @ mean)))
    return tuple(rows)

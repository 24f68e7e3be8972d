"""Resizing of images to the size of a run, antialiased: cropped, stretched or padded.

Images of 8 bits are resized by Pillow as they are. Any other array is resized by Pillow channel by channel in
float32, which holds uint16, int16, float16 and float32 exactly; uint32 and float64 are first scaled to the range of
their channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from PIL import Image

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.training.config.pixel_checks import parse_color
from diffusers_ddpm_ext.training.config.pixel_options import ResizeFilter, ResizeMode

Size = tuple[int, int]
"""Height and width in pixels."""
Box = tuple[float, float, float, float]
"""Left, top, right and bottom of a part of an image, in pixels."""
Picture: TypeAlias = Image.Image | np.ndarray
"""An image of 8 bits (L, RGB, RGBA), or an array (h, w, C) of any dtype."""
OVERSHOOTING = ("bicubic", "lanczos")
MAX_STRIP, MIN_STRIP_PIXELS = 100, 2**20
"""A resized image covers the size; a long strip may have so many times its pixels before it is cropped."""


@dataclass(frozen=True)
class Resizing:
    """How images of any size become images of one size.

    Attributes:
        mode: crop: cover the size, to be cropped; stretch: change the proportions; pad: fit inside, with a border.
        filter: Pillow's name of the resampling filter, in lower case.
        background: color behind transparency and of the border; None is white behind transparency, the same around an
            image that had some, and black around others.
    """

    mode: ResizeMode = "crop"
    filter: ResizeFilter = "bilinear"
    background: str | None = None

    @property
    def flat_color(self) -> tuple[int, int, int]:
        """Red, green and blue of what is behind transparency, 0 to 255."""
        return parse_color("white" if self.background is None else self.background)


COVERING = Resizing()
"""The default: images cover the size and are cropped."""


@dataclass(frozen=True)
class Surface:
    """What the values of an image mean, where resizing depends on it.

    Attributes:
        limits: the lowest and the highest value, black and white; None: those of the dtype, 0 and 1 for floats.
        has_alpha: whether the last of four channels is transparency.
        was_transparent: whether the image had transparency before it was put on the background.
    """

    limits: tuple[float, float] | None = None
    has_alpha: bool = False
    was_transparent: bool = False


def fit(picture: Picture, size: Size, resizing: Resizing, center_crop: bool, surface: Surface) -> np.ndarray:
    """Resize an image to a size.

    Args:
        picture: of any size.
        size: height and width of the result, which with ``crop`` and without ``center_crop`` is larger in one of them.
        resizing: how.
        center_crop: cut the center of the size out of an image that covers it.
        surface: what its values mean.

    Returns:
        (h, w, C), of the picture's dtype; integers are rounded.

    Raises:
        ValueError: it is a strip, which would become very large to cover the size.
        ConfigError: the background is a color, and the channels are no colors.
    """
    own = size_of(picture)
    target = resized_size(own, size, resizing.mode)
    pixels = resample(picture, target, resizing.filter, surface)
    if resizing.mode == "pad" and target != size:
        return _pad(pixels, size, resizing, surface)
    if center_crop and target != size:
        top, left = (target[0] - size[0]) // 2, (target[1] - size[1]) // 2
        return pixels[top : top + size[0], left : left + size[1]]
    return pixels


def size_of(picture: Picture) -> Size:
    """Height and width of an image."""
    return (picture.height, picture.width) if isinstance(picture, Image.Image) else picture.shape[:2]


def resized_size(own: Size, size: Size, mode: ResizeMode) -> Size:
    """Height and width to which an image is resized, before it is cropped or padded.

    Raises:
        ValueError: the image is a strip, and would become very large to cover the size.
    """
    (own_height, own_width), (height, width) = own, size
    if mode == "stretch":
        return size
    is_taller = height * own_width < width * own_height
    if mode == "pad":
        if is_taller:
            return height, min(width, max(1, round(own_width / own_height * height)))
        return min(height, max(1, round(own_height / own_width * width))), width
    if is_taller:
        height = max(height, own_height * width // own_width)
    else:
        width = max(width, own_width * height // own_height)
    if height * width > max(MAX_STRIP * size[0] * size[1], MIN_STRIP_PIXELS):
        raise ValueError(
            f"{own_width:,} x {own_height:,} pixels are a strip, which would be resized to {width:,} x {height:,}:"
            " crop it, or use --resize pad or stretch"
        )
    return height, width


def resample(
    picture: Picture, size: Size, resize_filter: ResizeFilter, surface: Surface, box: Box | None = None
) -> np.ndarray:
    """Resize an image, or a part of it, to a size, changing its proportions as needed.

    Args:
        picture: of any size.
        size: height and width of the result.
        resize_filter: Pillow's name in lower case; all but ``nearest`` are antialiased.
        surface: what the values mean.
        box: of the part; None for all of it. Pixels around it count at its edges, as if the whole were resized.

    Returns:
        (height, width, C), of the picture's dtype.
    """
    if box is None and size_of(picture) == size:
        return np.atleast_3d(np.asarray(picture))
    resized = _resample(picture, size, resize_filter, surface, box)
    low, high = limits_of(resized.dtype, surface.limits)
    is_full_range = resized.dtype.kind in "iu" and (low, high) == limits_of(resized.dtype, None)
    if resize_filter not in OVERSHOOTING or is_full_range:
        return resized
    values = np.asarray(picture)
    return resized.clip(min(low, float(values.min())), max(high, float(values.max()))).astype(resized.dtype)


def _resample(
    picture: Picture, size: Size, resize_filter: ResizeFilter, surface: Surface, box: Box | None
) -> np.ndarray:
    """As `resample`; what overshoots is clipped to what the dtype holds."""
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8:
        channels = picture.shape[2]
        if channels == 1 or channels == 3 or (channels == 4 and surface.has_alpha):
            picture = Image.fromarray(picture[..., 0] if channels == 1 else picture)
        else:
            planes = np.split(picture, channels, axis=2)
            return np.dstack([_resample(plane, size, resize_filter, surface, box) for plane in planes])
    if isinstance(picture, Image.Image):
        return np.atleast_3d(np.asarray(_resize(picture, size, resize_filter, box)))
    if resize_filter == "nearest":
        rows, columns = _nearest(picture.shape[:2], size, box)
        return picture[rows[:, None], columns]
    return _resample_floats(picture, size, resize_filter, surface, box)


def _resize(image: Image.Image, size: Size, resize_filter: str, box: Box | None) -> Image.Image:
    return image.resize(size[::-1], Image.Resampling[resize_filter.upper()], box)


def _nearest(own: Size, size: Size, box: Box | None) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns that Pillow's filter of this name selects: exact for any dtype."""
    left, top, right, bottom = box or (0, 0, own[1], own[0])
    places = []
    for count, new, low, high in ((own[0], size[0], top, bottom), (own[1], size[1], left, right)):
        numbers = Image.fromarray(np.arange(count, dtype=np.int32)[None])
        places.append(np.asarray(_resize(numbers, (1, new), "nearest", (low, 0, high, 1)))[0])
    return places[0], places[1]


def _resample_floats(
    values: np.ndarray, size: Size, resize_filter: ResizeFilter, surface: Surface, box: Box | None
) -> np.ndarray:
    """Resize an array channel by channel in float32."""
    low, _ = limits_of(values.dtype, surface.limits)
    source = values
    if surface.has_alpha:  # a transparent pixel has no color to contribute
        source = values.astype(np.float64) - low
        source[..., :3] *= source[..., 3:]
    channels = [_resize_plane(source[..., c], size, resize_filter, box) for c in range(source.shape[2])]
    result = np.stack(channels, axis=-1)
    if surface.has_alpha:
        opacity = np.repeat(result[..., 3:], 3, axis=2)
        result[..., :3] = np.divide(result[..., :3], opacity, out=np.zeros_like(opacity), where=opacity > 0)
        result += low
    if values.dtype.kind in "iu":
        limits = np.iinfo(values.dtype)
        result = result.round().clip(limits.min, limits.max)
    return result.astype(values.dtype)


def _resize_plane(plane: np.ndarray, size: Size, resize_filter: ResizeFilter, box: Box | None) -> np.ndarray:
    """Resize one channel (h, w), in float32 or, of a dtype that float32 does not hold, in the range of its values."""
    if plane.dtype not in (np.uint32, np.float64):
        return np.asarray(_resize(Image.fromarray(plane.astype(np.float32)), size, resize_filter, box))
    offset, scale = float(plane.min()), float(np.ptp(plane)) or 1.0
    resized = _resize(Image.fromarray(((plane - offset) / scale).astype(np.float32)), size, resize_filter, box)
    return np.asarray(resized).astype(np.float64) * scale + offset


def limits_of(dtype: np.dtype, limits: tuple[float, float] | None) -> tuple[float, float]:
    """The values that are black and white: those that are known, or else those of the dtype, for floats 0 and 1."""
    if limits is not None:
        return limits
    if dtype.kind == "f":
        return 0.0, 1.0
    return float(np.iinfo(dtype).min), float(np.iinfo(dtype).max)


def _pad(pixels: np.ndarray, size: Size, resizing: Resizing, surface: Surface) -> np.ndarray:
    """Put an image (h, w, C) into the middle of one of the size."""
    height, width, channels = pixels.shape
    result = np.empty((*size, channels), pixels.dtype)
    result[:] = border_values(pixels.dtype, channels, resizing, surface)
    top, left = round((size[0] - height) / 2), round((size[1] - width) / 2)
    result[top : top + height, left : left + width] = pixels
    return result


def border_values(dtype: np.dtype, channels: int, resizing: Resizing, surface: Surface) -> np.ndarray:
    """The value of each channel around a padded image, (C,), of its dtype.

    Raises:
        ConfigError: the background is a color, and the channels are others.
    """
    low, high = limits_of(dtype, surface.limits)
    if resizing.background is None and not surface.was_transparent:
        color: tuple[int, ...] = (0,) * channels
    else:
        red, green, blue = resizing.flat_color
        if channels == 1:
            color = (Image.new("RGB", (1, 1), (red, green, blue)).convert("L").getpixel((0, 0)),)
        elif channels == 3 or surface.has_alpha:
            color = (red, green, blue, 255)[:channels]
        elif red == green == blue:
            color = (red,) * channels
        else:
            raise ConfigError(
                f"--background {printable(str(resizing.background), 60)}: images of {channels} channels have no"
                " colors: name black, white or a gray"
            )
    values = low + np.array(color) / 255 * (high - low)
    return (values.round() if dtype.kind in "iu" else values).astype(dtype)

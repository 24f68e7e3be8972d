"""Format of a data set's pixels: their dtype, the range that becomes [-1, 1], and the files that they are kept in.

A model computes in [-1, 1]. What is read is mapped there by `PixelFormat.to_model`, what is sampled is mapped back by
`PixelFormat.from_model`, into the dtype and range of the data. Neither torch nor NumPy is imported with this module.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from diffusers_ddpm_ext.utils.checks import check_one_of, checked_integer, checked_number, describe

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike

INTEGER_DTYPES = ("uint8", "uint16", "int16", "uint32")
FLOAT_DTYPES = ("float16", "float32", "float64")
SUFFIXES = (".png", ".npy", ".npz", ".tif")
PNG_DTYPES = ("uint8", "uint16")


@dataclass(frozen=True)
class PixelFormat:
    """How the pixels of a data set are stored.

    Attributes:
        dtype: NumPy's name of it: ``uint8``, ``uint16``, ``int16``, ``uint32``, ``float16``, ``float32``, ``float64``.
        low: the value that becomes -1 in the model, in the data's units, rounded to the dtype.
        high: the value that becomes 1, larger than ``low``.
        suffix: of the files that samples are written to by default: ``.png``, ``.npy``, ``.npz`` or ``.tif``.
        preview_channels: numbers of the channels that previews show, one in gray or three in color. None: all of them
            where they are gray, color or color with transparency, else ``preview_components`` or the first.
        preview_components: three rows (w_1, ..., w_C, b), of which previews make red, green and blue as the sums
            w_c x_c + b of a pixel's channels x in the model's units; None without.

    Raises:
        ValueError: a value is not allowed, or the file type cannot hold the dtype.
    """

    dtype: str = "uint8"
    low: float = 0
    high: float = 255
    suffix: str = ".png"
    preview_channels: tuple[int, ...] | None = None
    preview_components: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        """Check every field and store numbers as Python's own."""
        check_one_of("dtype", self.dtype, (*INTEGER_DTYPES, *FLOAT_DTYPES))
        check_one_of("suffix", self.suffix, SUFFIXES)
        if self.suffix == ".png" and self.dtype not in PNG_DTYPES:
            raise ValueError(f"suffix='.png' cannot hold {self.dtype}: choose .npy, .npz or .tif.")
        for name in ("low", "high"):
            object.__setattr__(self, name, _checked_end(name, getattr(self, name), self.dtype))
        if not self.low < self.high:
            raise ValueError(f"low={self.low} must be smaller than high={self.high}, as values of {self.dtype}.")
        if self.preview_channels is not None:
            object.__setattr__(self, "preview_channels", checked_preview_channels(self.preview_channels))
        if self.preview_components is not None:
            object.__setattr__(self, "preview_components", _checked_components(self.preview_components))

    @property
    def is_integer(self) -> bool:
        """Whether pixels are whole numbers, which the decoder's bins are for."""
        return self.dtype in INTEGER_DTYPES

    @property
    def is_8_bit(self) -> bool:
        """Whether pixels are those of ordinary images: uint8, 0 to 255."""
        return (self.dtype, self.low, self.high) == ("uint8", 0, 255)

    @property
    def num_levels(self) -> int | None:
        """Number of values that a pixel can have, for integers; None for floats."""
        return int(self.high - self.low) + 1 if self.is_integer else None

    def check_channels(self, channels: int) -> None:
        """Raise ValueError unless the preview is one of images with so many channels."""
        picked = self.preview_channels
        if picked is not None and max(picked) >= channels:
            raise ValueError(f"preview_channels={list(picked)} must be below {channels}, the images' channels.")
        if self.preview_components is not None and len(self.preview_components[0]) != channels + 1:
            count = len(self.preview_components[0]) - 1
            raise ValueError(f"preview_components are of {count} channels, and the images have {channels}.")

    def to_model(self, values: ArrayLike) -> np.ndarray:
        """Map values of the data to the model's.

        Args:
            values: any shape, in the data's units.

        Returns:
            float32 of the same shape: ``low`` is -1, ``high`` is 1, both exactly; computed in float64. Values outside
            the range stay outside of [-1, 1].
        """
        import numpy as np

        half = self.high / 2 - self.low / 2
        return ((np.asarray(values, np.float64) / 2 - (self.high / 4 + self.low / 4)) / (half / 2)).astype(np.float32)

    def from_model(self, values: ArrayLike) -> np.ndarray:
        """Map values of the model back to the data's, the inverse of `to_model`.

        Args:
            values: any shape, in the model's units; clipped to [-1, 1].

        Returns:
            An array of the data's dtype and the same shape, from ``low`` to ``high``; integers rounded half to even.

        Raises:
            ValueError: a value is NaN.
        """
        import numpy as np

        values = np.asarray(values, np.float64).clip(-1, 1)
        if np.isnan(values).any():
            raise ValueError(
                f"values has {int(np.isnan(values).sum())} NaN, which {self.dtype} pixels cannot come of."
            )
        scaled = self.low * (0.5 - values / 2) + self.high * (0.5 + values / 2)
        return (np.rint(scaled) if self.is_integer else scaled).astype(self.dtype)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON holds them, without those of previews where they are None."""
        content: dict[str, Any] = {"dtype": self.dtype, "low": self.low, "high": self.high, "suffix": self.suffix}
        if self.preview_channels is not None:
            content["preview_channels"] = list(self.preview_channels)
        if self.preview_components is not None:
            content["preview_components"] = [list(row) for row in self.preview_components]
        return content

    @classmethod
    def from_dict(cls, content: Any) -> PixelFormat:
        """The format that `to_dict` described.

        Args:
            content: from a JSON file.

        Raises:
            ValueError: it is no such description: a key is missing or unknown, or a value is not allowed.
        """
        required, optional = ("dtype", "low", "high", "suffix"), ("preview_channels", "preview_components")
        if not isinstance(content, Mapping):
            raise ValueError(f"pixel_format={describe(content)} must be an object with {', '.join(required)}.")
        missing = [name for name in required if name not in content]
        unknown = [name for name in content if name not in (*required, *optional)]
        if missing or unknown:
            what = f"has no {missing[0]}" if missing else f"has an unknown key {describe(unknown[0])}"
            raise ValueError(f"pixel_format {what}; its keys are {', '.join((*required, *optional))}.")
        try:
            return cls(**content)
        except ValueError as error:
            raise ValueError(f"pixel_format: {error}") from None


def checked_preview_channels(channels: Any) -> tuple[int, ...]:
    """Numbers of one or three channels, which may repeat (two channels as magenta and green are 0 1 0)."""
    allowed = "one or three channel numbers, 0 or more"
    if isinstance(channels, str) or not isinstance(channels, Sequence) or len(channels) not in (1, 3):
        raise ValueError(f"preview_channels={describe(channels)} must be {allowed}.")
    return tuple(checked_integer("preview_channels", channel, allowed, low=0) for channel in channels)


def _checked_components(rows: Any) -> tuple[tuple[float, ...], ...]:
    """Three rows of as many finite numbers, two or more."""
    allowed = "three rows of as many numbers"
    if not isinstance(rows, Sequence) or len(rows) != 3 or not all(isinstance(row, (list, tuple)) for row in rows):
        raise ValueError(f"preview_components={describe(rows)} must be {allowed}.")
    if len({len(row) for row in rows}) != 1 or len(rows[0]) < 2:
        raise ValueError(
            f"preview_components has rows of {', '.join(str(len(row)) for row in rows)} numbers; {allowed}."
        )
    name = "a number of preview_components"
    return tuple(tuple(checked_number(name, value, "a finite number") for value in row) for row in rows)


def _checked_end(name: Literal["low", "high"], value: Any, dtype: str) -> float:
    """An end of the range as the dtype holds it."""
    import numpy as np

    if dtype in INTEGER_DTYPES:
        limits = np.iinfo(dtype)
        allowed = f"an integer from {limits.min} to {limits.max}, the values of {dtype}"
        number = checked_number(name, value, allowed)
        if number != math.floor(number):
            raise ValueError(f"{name}={describe(value)} must be {allowed}.")
        return checked_integer(name, int(number), allowed, int(limits.min), int(limits.max))
    largest = float(np.finfo(dtype).max)
    number = checked_number(
        name, value, f"a number from {-largest:g} to {largest:g}, as {dtype} holds", lambda each: abs(each) <= largest
    )
    return float(np.dtype(dtype).type(number))

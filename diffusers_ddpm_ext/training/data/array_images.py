"""Images in arrays: their layout and dtypes, NumPy's files, columns of a dataset. Loads no torch."""

from __future__ import annotations

import io
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.data.image_files import open_image_file, turn_of
from diffusers_ddpm_ext.utils.array_files import NoSuchArray, read_open_array
from diffusers_ddpm_ext.utils.pixel_format import FLOAT_DTYPES, INTEGER_DTYPES

ArrayLayout = Literal["channels_last", "channels_first"]
Range = tuple[float, float]

NPY_MAGIC, ZIP_MAGIC = b"\x93NUMPY", b"PK\x03\x04"
MAX_CHANNELS = 4096


@dataclass(frozen=True)
class ArrayReading:
    """How arrays are read.

    Attributes:
        key: name of the array in a ``.npz`` file with several.
        layout: where the channels are, for arrays that do not say it.
        data_range: of the values; also for integers without a range of their own, which become the smallest dtype that
            holds it.
        range_hint: what messages say where the range is missing.
    """

    key: str | None = None
    layout: ArrayLayout | None = None
    data_range: Range | None = None
    range_hint: str = "give their range by --data_range LOW HIGH"


AS_WRITTEN = ArrayReading()


class UnreadableImage(Exception):
    """An image that cannot be decoded. The text is the reason, without the image's name."""


class NonFiniteImage(UnreadableImage):
    """An image with NaN or infinity; the text says where the first one is."""


class UnsupportedImage(ConfigError):
    """An image that needs an option, a package or a conversion, so that it must not be skipped as damaged."""


def is_array_file(start: bytes) -> bool:
    """Whether a file that begins with these bytes is in NumPy's format, npy or npz."""
    return start.startswith((NPY_MAGIC, ZIP_MAGIC))


def read_array_image(payload: bytes | Path, key: str | None) -> np.ndarray:
    """Read the array of an image in NumPy's format, passed as its file or the file's content.

    Raises:
        UnsupportedImage: it holds several arrays, or none that is called ``key``.
        ConfigError: it is damaged, or holds something else than real numbers.
    """
    with ExitStack() as stack:
        file = io.BytesIO(payload) if isinstance(payload, bytes) else stack.enter_context(open_image_file(payload))
        size = len(payload) if isinstance(payload, bytes) else os.fstat(file.fileno()).st_size
        stack.enter_context(turn_of(size))
        try:
            return read_open_array(file, size, "it", key, "name one of them by --array_key")
        except NoSuchArray as error:
            raise UnsupportedImage(str(error).rstrip(".")) from None


def as_image(array: np.ndarray, reading: ArrayReading = AS_WRITTEN) -> np.ndarray:
    """Return an array as an image (H, W, C), in the byte order of this machine.

    Args:
        array: (H, W) or (H, W, C), or (C, H, W) if the layout says so.
        reading: without a layout the channels are the last axis, which must be the shortest then: otherwise the array
            may as well be (C, H, W).

    Raises:
        UnsupportedImage: it has another number of axes, its layout must be said, or its dtype is not read.
        UnreadableImage: an axis has the length 0.
    """
    layout = reading.layout
    shape = tuple(int(length) for length in array.shape)
    if len(shape) not in (2, 3):
        raise UnsupportedImage(
            f"its shape {shape} is not that of one image, (height, width) or (height, width, channels)"
        )
    if 0 in shape:
        raise UnreadableImage(f"its shape {shape} has no pixels")
    if len(shape) == 2:
        array = array[..., None]
    elif layout == "channels_first":
        array = np.moveaxis(array, 0, -1)
    elif layout is None and shape[2] >= min(shape[:2]):
        raise UnsupportedImage(
            f"its shape {shape} may be (height, width, channels) or (channels, height, width): say which by"
            " --array_layout channels_last or channels_first"
        )
    if array.shape[2] > MAX_CHANNELS:
        raise UnsupportedImage(f"its shape {shape} has {array.shape[2]:,} channels, more than {MAX_CHANNELS:,}")
    return _supported_dtype(array, reading)


def _supported_dtype(array: np.ndarray, reading: ArrayReading) -> np.ndarray:
    """The array in one of the dtypes that are trained on."""
    native = array.dtype.newbyteorder("=")
    if native.name in (*INTEGER_DTYPES, *FLOAT_DTYPES):
        return array.astype(native, copy=False)
    allowed = ", ".join((*INTEGER_DTYPES, *FLOAT_DTYPES))
    if native.kind not in "biu":
        raise UnsupportedImage(f"its values are {native.name}: save them as one of {allowed}")
    low, high, data_range = int(array.min()), int(array.max()), reading.data_range
    if data_range is None:
        raise UnsupportedImage(
            f"its values are {native.name}, from {low} to {high}: {reading.range_hint}, or save them as one of"
            f" {allowed}"
        )
    for name in INTEGER_DTYPES:
        limits = np.iinfo(name)
        if limits.min <= data_range[0] and data_range[1] <= limits.max:
            if low < limits.min or high > limits.max:
                raise UnsupportedImage(outside_range(low, high, data_range))
            return array.astype(name)
    raise UnsupportedImage(
        f"its values are {native.name}, in a range that no smaller dtype holds: save them as float64"
    )


def range_of(dtype: np.dtype, data_range: Range) -> Range:
    """``--data_range`` as the dtype holds it: 0.1 is a little more in float32, and so are its pixels."""
    if dtype.kind != "f":
        return data_range
    with np.errstate(over="ignore"):  # of a range beyond the dtype, which is refused later
        low, high = (float(dtype.type(end)) for end in data_range)
    return low, high


def outside_range(low: float, high: float, data_range: Range) -> str:
    """The fault of values, from ``low`` to ``high``, that are outside ``--data_range``."""
    return (
        f"its values, from {low:g} to {high:g}, are not all in --data_range {data_range[0]:g} {data_range[1]:g}: give"
        " a range that holds them, or clip the files"
    )


def check_finite(pixels: np.ndarray) -> None:
    """Raise NonFiniteImage if a pixel (H, W, C) is NaN or infinite; the first one is named."""
    if pixels.dtype.kind != "f":
        return
    finite = np.isfinite(pixels)
    if not finite.all():
        row, column, channel = (int(place) for place in np.argwhere(~finite)[0])
        value = {True: "NaN", False: "infinity"}[bool(np.isnan(pixels[row, column, channel]))]
        count = int((~finite).sum())
        others = f"; {count:,} values are NaN or infinite" if count > 1 else ""
        raise NonFiniteImage(f"it has {value} in row {row}, column {column}, channel {channel}{others}")


def array_of_lists(values: Any) -> np.ndarray:
    """The array in nested lists: Python's, or one row of an Arrow column as in `array_of_arrow`."""
    if not isinstance(values, list):
        return array_of_arrow(values)
    try:
        return np.asarray(values)
    except ValueError as error:  # lists of different lengths
        raise UnreadableImage(" ".join(str(error).split())) from None


def array_of_arrow(column: Any) -> np.ndarray:
    """The array in one row of an Arrow column of nested lists, `Array2D` or `Array3D`, in the dtype of its values.

    Args:
        column: a `pyarrow.ChunkedArray` or `pyarrow.Array` of one row.

    Raises:
        UnreadableImage: it is empty, or lists of one axis have different lengths.
        UnsupportedImage: its values are no numbers.
    """
    import pyarrow as pa

    values = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(values, pa.ChunkedArray):  # of a chunked array of an extension type
        values = values.chunk(0)
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    shape: list[int] = []
    while (
        pa.types.is_list(values.type)
        or pa.types.is_large_list(values.type)
        or pa.types.is_fixed_size_list(values.type)
    ):
        if values.null_count:
            raise UnreadableImage("it has a missing value")
        lengths = set(values.value_lengths().to_pylist())
        if len(lengths) != 1:
            raise UnreadableImage(f"its lists of axis {len(shape)} have {len(lengths)} different lengths")
        shape.append(lengths.pop())
        values = values.flatten()
    if values.null_count:
        raise UnreadableImage("it has a missing value")
    if not (pa.types.is_floating(values.type) or pa.types.is_integer(values.type) or pa.types.is_boolean(values.type)):
        raise UnsupportedImage(f"its values are {values.type}, not numbers")
    return np.asarray(values.to_numpy(zero_copy_only=False)).reshape(shape)

"""Samples that were made elsewhere: a folder of images, or an array file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusers_ddpm_ext.errors import ConfigError, as_config_error, printable
from diffusers_ddpm_ext.training.data.array_images import ArrayReading, UnreadableImage
from diffusers_ddpm_ext.training.data.dataset import MEMORY_LIMIT
from diffusers_ddpm_ext.training.data.decoding import Preprocessing, decode_image
from diffusers_ddpm_ext.training.data.image_scan import ImageSource
from diffusers_ddpm_ext.training.data.image_store import decode_source
from diffusers_ddpm_ext.training.data.pixel_values import full_range, to_pixels
from diffusers_ddpm_ext.training.data.resizing import COVERING, Resizing
from diffusers_ddpm_ext.training.data.sources import scan_folder
from diffusers_ddpm_ext.training.evaluation.samples import LevelImages, to_levels
from diffusers_ddpm_ext.utils.array_files import read_array
from diffusers_ddpm_ext.utils.pixel_format import PixelFormat

OPTION = "--samples"
PICTURES = ("uint8", "uint16", "float16", "float32", "float64")
"""Dtypes of pictures of the data: all integers, or floats from 0 to 1, stand for its range."""


def read_samples(
    path: Path,
    shape: tuple[int, int, int],
    levels: int | None,
    pixels: PixelFormat,
    progress: bool = False,
    resizing: Resizing = COVERING,
) -> LevelImages:
    """Samples as levels of the data.

    Values of the data's dtype, or floats for data of floats, are in its range. Other unsigned integers, and floats in
    [0, 1], are pictures of it, as ``ddpm-ext sample --bit_depth`` writes them.

    Args:
        path: a folder of images, which are resized and cropped as the data's are, or ``.npy`` or ``.npz`` with (N,
            height, width, C) or, of one channel, (N, height, width), which must have the data's size.
        shape: channels, height and width of the data.
        levels: of the data.
        pixels: dtype and range of the data.
        progress: show a progress bar.
        resizing: of the data.

    Raises:
        ConfigError: the file or an image cannot be read, or the images are of another shape or range.
    """
    if path.is_dir():
        return LevelImages(_read_folder(path, shape, levels, pixels, progress, resizing), levels)
    array = read_array(path, OPTION)
    name = f"{OPTION} {printable(str(path))}"
    if array.ndim == 3:
        array = array[..., None]
    expected = (shape[1], shape[2], shape[0])
    if array.ndim != 4 or len(array) == 0 or array.shape[1:] != expected:
        raise ConfigError(
            f"{name} has an array of shape {array.shape}: (N, {', '.join(map(str, expected))}) is expected, images of "
            "the data's height, width and channels"
        )
    stored = _format_of(array.dtype, pixels, name)
    if not np.isfinite(array).all() or array.min() < stored.low or array.max() > stored.high:
        raise ConfigError(
            f"{name} has values outside [{stored.low:g}, {stored.high:g}] (or NaN): {array.dtype} must be in it"
        )
    values = torch.from_numpy(stored.to_model(array).transpose(0, 3, 1, 2).copy())
    return LevelImages(to_levels(values, levels), levels)


def _read_folder(
    path: Path,
    shape: tuple[int, int, int],
    levels: int | None,
    pixels: PixelFormat,
    progress: bool,
    resizing: Resizing,
) -> Tensor:
    source = scan_folder(OPTION, str(path))
    channels, size = shape[0], (shape[1], shape[2])
    preprocessing = Preprocessing(size, channels, True, resizing, reading=ArrayReading(layout="channels_last"))
    stored = _format_of(_first_dtype(source, preprocessing), pixels, f"{OPTION} {printable(str(path))}")
    if not stored.is_8_bit:
        reading = replace(preprocessing.reading, data_range=(stored.low, stored.high))
        preprocessing = replace(preprocessing, reading=reading)
    loaded = decode_source(source, preprocessing, skip_bad=False, memory_limit=MEMORY_LIMIT, progress=progress)
    images, own = loaded.images, loaded.images.pixel_format
    return torch.stack([to_levels(to_pixels(images.image(index), own), levels) for index in range(len(images))])


def _first_dtype(source: ImageSource, preprocessing: Preprocessing) -> np.dtype:
    """Dtype of the first image of a folder that can be read."""
    for row in range(len(source.names)):
        try:
            return decode_image(source.payload(row), preprocessing).pixels.dtype
        except UnreadableImage:  # named when all are read
            continue
    return np.dtype("uint8")


def _format_of(dtype: np.dtype, pixels: PixelFormat, name: str) -> PixelFormat:
    """What values of a dtype stand for.

    Raises:
        ConfigError: nothing, since the data are of another dtype and it is none of pictures.
    """
    is_float = dtype.kind == "f"
    if dtype.name == pixels.dtype:
        return pixels
    if is_float and not pixels.is_integer:
        with as_config_error(OPTION):
            return replace(pixels, dtype=dtype.name, suffix=".npy")
    if dtype.name not in PICTURES:
        names = ", ".join(dict.fromkeys((pixels.dtype, "uint8", "uint16")))
        raise ConfigError(f"{name} holds {dtype}: {names} or floats in [0, 1] are expected")
    return full_range(dtype.name)

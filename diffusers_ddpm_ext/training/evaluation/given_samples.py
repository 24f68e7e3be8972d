"""Samples that were made elsewhere: a folder of images, or an array file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.training.data.dataset import MEMORY_LIMIT
from diffusers_ddpm_ext.training.data.decoding import Preprocessing
from diffusers_ddpm_ext.training.data.image_store import decode_source
from diffusers_ddpm_ext.training.data.pixel_values import to_pixels
from diffusers_ddpm_ext.training.data.sources import scan_folder
from diffusers_ddpm_ext.training.evaluation.samples import LevelImages, to_levels
from diffusers_ddpm_ext.utils.array_files import read_array

OPTION = "--samples"
INTEGER_LEVELS = {np.dtype("uint8"): 256, np.dtype("uint16"): 65536}


def read_samples(path: Path, shape: tuple[int, int, int], levels: int | None, progress: bool = False) -> LevelImages:
    """Samples as levels of the data.

    Images of a folder are resized and cropped as the data's are; an array must have their size.

    Args:
        path: a folder of images, or ``.npy`` or ``.npz`` with (N, height, width, C) or, of one channel, (N, height,
            width): uint8, uint16, or floating in [0, 1].
        shape: channels, height and width of the data.
        levels: of the data.
        progress: show a progress bar.

    Raises:
        ConfigError: the file or an image cannot be read, or the images are of another shape or range.
    """
    if path.is_dir():
        source = scan_folder(OPTION, str(path))
        preprocessing = Preprocessing((shape[1], shape[2]), shape[0], center_crop=True)
        loaded = decode_source(source, preprocessing, skip_bad=False, memory_limit=MEMORY_LIMIT, progress=progress)
        images = [loaded.images.image(index) for index in range(len(loaded.images))]
        own = loaded.images.pixel_format
        return LevelImages(torch.stack([to_levels(to_pixels(image, own), levels) for image in images]), levels)
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
    if array.dtype in INTEGER_LEVELS:
        pixels = array.astype(np.float32) / (INTEGER_LEVELS[array.dtype] - 1)
    elif array.dtype.kind == "f":
        pixels = array.astype(np.float32)
        if not np.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() > 1:
            raise ConfigError(f"{name} has values outside [0, 1] (or NaN): floats must be in [0, 1]")
    else:
        raise ConfigError(f"{name} holds {array.dtype}: uint8, uint16 or floats in [0, 1] are expected")
    return LevelImages(to_levels(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()) * 2 - 1, levels), levels)

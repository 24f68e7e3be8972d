"""How the arrays of a set are read, where their files leave a choice that the first image decides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.data.array_images import ArrayReading, UnreadableImage, UnsupportedImage
from diffusers_ddpm_ext.training.data.image_files import Payload
from diffusers_ddpm_ext.training.data.image_scan import ImageSource
from diffusers_ddpm_ext.training.data.raw_image import read_image
from diffusers_ddpm_ext.utils.array_files import read_arrays

FIRST_IMAGES = 5
WIDEST = ((0.0, 2.0**32 - 1), (-(2.0**15), 2.0**15 - 1))
"""Ranges of integers that training has no dtype for."""


def choose_reading(source: ImageSource, requested: ArrayReading) -> ArrayReading:
    """Return how arrays are read: as requested, with the choices that make the first image readable.

    An array is chosen by name if it is the only one of a file that is an image; the channels are first if that axis
    is the shortest. Where nothing is to be chosen, or the choice is not clear, the result is the request.
    """
    for row in range(min(FIRST_IMAGES, len(source.names))):
        payload = source.payload(row)
        try:
            read_image(payload, requested)
            return requested
        except (UnreadableImage, ConfigError) as error:
            keys: list[str | None] = [*_keys(payload)] if requested.key is None else []
            if not keys and not isinstance(error, UnsupportedImage):
                continue
            by_key = [_readable(payload, replace(requested, key=key)) for key in keys or [requested.key]]
            readings = [reading for reading in by_key if reading is not None]
            return readings[0] if len(readings) == 1 else requested
    return requested


def _keys(payload: Payload) -> list[str]:
    """Names of the arrays in a file, if it is a .npz file."""
    if not isinstance(payload, Path) or payload.suffix.lower() != ".npz":
        return []
    try:
        return list(read_arrays(payload))
    except ConfigError:
        return []


def _readable(payload: Payload, reading: ArrayReading) -> ArrayReading | None:
    """The first reading with the same key that reads an image."""
    for each in _choices(reading):
        try:
            raw = read_image(payload, each)
        except (UnreadableImage, ConfigError):
            continue
        height, width, channels = raw.values.shape
        if each.layout == reading.layout or channels < min(height, width):
            return each
    return None


def _choices(reading: ArrayReading) -> Iterator[ArrayReading]:
    for data_range in (reading.data_range, *WIDEST) if reading.data_range is None else (reading.data_range,):
        for layout in (None, "channels_first") if reading.layout is None else (reading.layout,):
            yield replace(reading, layout=layout, data_range=data_range)

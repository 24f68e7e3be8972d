"""One pass over the images of a source: each is decoded once, in order, and what a run must know of them is noted.

A broken image is so reported before the run, and not hours later.
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from array import array
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.data.array_images import ArrayReading, UnreadableImage
from diffusers_ddpm_ext.training.data.decoding import CHANNEL_NAMES, DecodedImage, Preprocessing, decode_image
from diffusers_ddpm_ext.training.data.image_files import Payload
from diffusers_ddpm_ext.training.data.pixel_values import full_range
from diffusers_ddpm_ext.training.data.resizing import Size
from diffusers_ddpm_ext.utils.pixel_format import PixelFormat

IMAGES_PER_BLOCK = 256  # submitted to the decoding threads at a time
FOUND = ("kind", "enlarged", "num_animated", "lowest", "highest", "suffix", "num_bytes", "num_bad", "first_bad")
Kind = tuple[int, str]  # channels of an image, and dtype of its pixels


class ImageSource(Protocol):
    """Undecoded images in a fixed order, and the option that selected them, for messages."""

    @property
    def option(self) -> str: ...
    @property
    def names(self) -> Sequence[str]: ...
    def payload(self, index: int) -> Payload:
        """Return the file of an image, or its content; None if it has none."""


class ImageScan:
    """What a pass over the images of a source has found so far.

    Attributes:
        source: of the images.
        readable: rows of the source whose images can be decoded, ascending.
        kind: channels and dtype of all of them; None before the first one.
        enlarged: number of images smaller than the requested size.
        num_animated: number of images that are the first of several frames.
        lowest: the smallest value of a pixel, and the row of its image; 0 for images of 8 bits.
        highest: the largest one; 255 for images of 8 bits.
        suffix: of files that hold such pixels.
        num_bytes: of all pixels.
        sizes: heights and widths of the images.
        num_bad: number of images that cannot be decoded.
        first_bad: row of the first of them, and the reason; None without any.
    """

    def __init__(self, source: ImageSource) -> None:
        self.source = source
        self.readable: Sequence[int] = array("q")
        self.kind: Kind | None = None
        self.enlarged, self.num_animated, self.num_bytes = 0, 0, 0
        self.lowest, self.highest = (math.inf, 0), (-math.inf, 0)
        self.suffix = ".png"
        self.sizes: set[Size] = set()
        self.num_bad = 0
        self.first_bad: tuple[int, str] | None = None
        self._digest, self._fingerprint = hashlib.sha256(), ""

    def add(self, row: int, decoded: DecodedImage | UnreadableImage) -> np.ndarray | None:
        """Note an image; return its pixels, None if it has none.

        Raises:
            ConfigError: it has other channels or another depth than those before.
        """
        if isinstance(decoded, UnreadableImage):
            self.num_bad += 1
            self.first_bad = self.first_bad or (row, str(decoded))
            return None
        name, pixels = self.source.names[row], decoded.pixels
        if self.kind is not None and self.kind != decoded.kind:
            raise mixed_kinds(self.source.names[self.readable[0]], self.kind, name, decoded.kind)
        if self.kind is None:
            self.kind, self.suffix = decoded.kind, decoded.suffix
        assert isinstance(self.readable, array)
        self.readable.append(row)
        if decoded.low < self.lowest[0]:
            self.lowest = (decoded.low, row)
        if decoded.high > self.highest[0]:
            self.highest = (decoded.high, row)
        self.num_animated += decoded.is_animated
        self.enlarged += decoded.enlarged
        self.num_bytes += pixels.nbytes
        self.sizes.add((pixels.shape[1], pixels.shape[2]))
        dtype = "" if decoded.kind[1] in ("uint8", "uint16") else decoded.kind[1]
        self._digest.update(os.fsencode(name) + b"\0" + f"{pixels.shape}{dtype}".encode() + pixels.tobytes())
        return pixels

    @property
    def fingerprint(self) -> str:
        """Sha256 over names and pixels, in hexadecimal."""
        return self._fingerprint or self._digest.hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """What was found, without the rows, and without the sizes if there are several, as JSON."""
        found = {name: getattr(self, name) for name in FOUND} | {"fingerprint": self.fingerprint}
        return found | {"sizes": list(self.sizes) if len(self.sizes) == 1 else []}

    @classmethod
    def restored(cls, source: ImageSource, content: Mapping[str, Any], readable: Sequence[int]) -> ImageScan:
        """A pass that was finished before.

        Args:
            source: of the images.
            content: from `to_dict`.
            readable: rows that can be decoded.

        Raises:
            KeyError: the content lacks something.
        """
        scan = cls(source)
        for name in FOUND:
            value = content[name]
            setattr(scan, name, tuple(value) if isinstance(value, list) else value)
        scan.readable, scan._fingerprint = readable, content["fingerprint"]
        scan.sizes = {(height, width) for height, width in content["sizes"]}
        return scan

    def check(self, skip_bad: bool) -> None:
        """Refuse a source without images, or with unreadable ones unless they are to be left out; a ConfigError."""
        if self.kind is None or (self.num_bad and not skip_bad):
            raise _unreadable(self, skip_bad)

    def pixel_format(self, reading: ArrayReading) -> PixelFormat:
        """The format of the pixels: of the given range, or of all integers of the dtype, or of floats in [0, 1].

        Raises:
            ConfigError: floats are outside [0, 1] and no range is given, or the range does not fit the dtype.
        """
        assert self.kind is not None
        default, data_range = full_range(self.kind[1], self.suffix), reading.data_range
        if data_range is not None:
            try:
                return replace(default, low=data_range[0], high=data_range[1])
            except ValueError as error:
                raise ConfigError(
                    f"--data_range {data_range[0]:g} {data_range[1]:g}: the images of {self.source.option} are"
                    f" {default.dtype}: {error}"
                ) from None
        (low, first), (high, last) = self.lowest, self.highest
        if low < default.low or high > default.high:
            names = self.source.names
            raise ConfigError(
                f"the images of {self.source.option} have values from {low:g} ({names[first]!r}) to {high:g}"
                f" ({names[last]!r}), and {default.dtype} must be from 0 to 1: {reading.range_hint}"
            )
        return default


def read_images(
    source: ImageSource, preprocessing: Preprocessing, *, start: int = 0, progress: bool = False
) -> Iterator[tuple[int, DecodedImage | UnreadableImage]]:
    """Yield the images in order, each with its row, decoded by several threads (Pillow's decoders release the GIL).

    Args:
        source: the images.
        preprocessing: of each image.
        start: the first row.
        progress: show a progress bar if it takes longer than a second.

    Raises:
        ConfigError: an image has unsupported values.
    """

    def decode(row: int, payload: Payload) -> DecodedImage | UnreadableImage:
        try:
            return decode_image(payload, preprocessing)
        except UnreadableImage as error:
            return error
        except ConfigError as error:
            raise ConfigError(f"{source.names[row]!r} of {source.option}: {error}") from None

    count = len(source.names)
    threads = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    bar = tqdm(
        total=count, initial=start, desc="reading images", unit="image", delay=1, leave=False, disable=not progress
    )
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool, bar:
        warnings.simplefilter("ignore")  # Pillow warns about large images and unusual metadata
        for first in range(start, count, IMAGES_PER_BLOCK):
            block = range(first, min(first + IMAGES_PER_BLOCK, count))
            for row, decoded in zip(block, pool.map(decode, block, map(source.payload, block)), strict=True):
                bar.update()
                yield row, decoded


def describe_kind(channels: int, dtype: str) -> str:
    """Channels of an image, and its dtype if that is not uint8."""
    depth = "" if dtype == "uint8" else f", {dtype}"
    return (
        f"{CHANNEL_NAMES[channels]} ({channels}{depth})"
        if channels in CHANNEL_NAMES
        else f"{channels} channels{depth}"
    )


def mixed_kinds(first: str, first_kind: Kind, second: str, second_kind: Kind) -> ConfigError:
    """The error for two images, by name, whose channels or depths differ."""
    if first_kind[1] != second_kind[1]:
        return ConfigError(
            f"the images differ in depth: {first!r} is {first_kind[1]}, {second!r} is {second_kind[1]}; convert them"
            " all to one of the two."
        )
    is_convertible = {first_kind[0], second_kind[0]} <= {*CHANNEL_NAMES}
    way_out = "--channels 1, 3 or 4 converts them all" if is_convertible else "give all of them the same channels"
    return ConfigError(
        f"the images differ in channels: {first!r} is {describe_kind(*first_kind)}, {second!r} is"
        f" {describe_kind(*second_kind)}; {way_out}."
    )


def _unreadable(scan: ImageScan, skip_bad: bool) -> ConfigError:
    """The error for unreadable images: their number and the first one's name."""
    assert scan.first_bad is not None
    row, reason = scan.first_bad
    source, name = scan.source, scan.source.names[row]
    count = f"{scan.num_bad} of {len(source.names)} images cannot be read"
    if skip_bad:
        return ConfigError(f"{source.option}: no image is left, {count}: {name!r} ({reason}).")
    first = "the first is " if scan.num_bad > 1 else ""
    return ConfigError(
        f"{source.option}: {count}: {first}{name!r} ({reason}); repair or remove such files, or leave them out by"
        " --skip_bad_images."
    )

"""Storage of a run's decoded images: packed in memory, or decoded again for each use.

Every image is decoded once before the run, so that a broken one is reported there and not hours later. The decoded and
resized images stay in memory, in the bit depth of their files (`PackedImages`); if they exceed the limit, they are
decoded again for each use (`LazyImages`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from diffusers_ddpm_ext.errors import ConfigError, RunError
from diffusers_ddpm_ext.training.data.array_images import UnreadableImage
from diffusers_ddpm_ext.training.data.decoding import Preprocessing, decode_image
from diffusers_ddpm_ext.training.data.image_scan import (
    ImageScan,
    ImageSource,
    Kind,
    describe_kind,
    mixed_kinds,
    read_images,
)
from diffusers_ddpm_ext.training.data.pixel_values import full_range
from diffusers_ddpm_ext.training.data.resizing import Size
from diffusers_ddpm_ext.training.data.row_names import ChosenNames
from diffusers_ddpm_ext.utils.pixel_format import PixelFormat


class Stack(Protocol):
    """What a tensor of images (N, C, h, w) is used for."""

    @property
    def shape(self) -> Sequence[int]: ...
    def __getitem__(self, rows: Tensor) -> Tensor:
        """Return a copy of images, (b, C, h, w), by their numbers, (b,), int64."""


class ImageStore(Protocol):
    """Decoded images, resized and perhaps not yet cropped, in the dtype of their files."""

    @property
    def channels(self) -> int: ...
    @property
    def pixel_format(self) -> PixelFormat: ...
    @property
    def fingerprint(self) -> str:
        """Hash of names and pixels, in hexadecimal."""

    @property
    def sizes(self) -> Set[Size]:
        """Heights and widths that the images have, each at least the requested size."""

    def __len__(self) -> int: ...
    def image(self, index: int) -> Tensor:
        """Return an image, (C, h, w), of the format's dtype."""

    @property
    def stack(self) -> Stack | None:
        """All images as one tensor, (N, C, h, w), if they are of one size and need not be decoded."""


class PackedImages:
    """Images in memory, (C, h, w) each, in one buffer, which is cheap to share with any number of workers."""

    def __init__(
        self, images: Sequence[Tensor], fingerprint: str = "", pixel_format: PixelFormat | None = None
    ) -> None:
        self.fingerprint = fingerprint
        self.channels = int(images[0].shape[0])
        self.pixel_format = pixel_format or full_range(str(images[0].dtype).removeprefix("torch."))
        self.shapes = [tuple(image.shape) for image in images]
        self.same_size = len(set(self.shapes)) == 1
        sizes = [image.numel() for image in images]
        self.starts = [0, *np.cumsum(sizes).tolist()]
        self.buffer = torch.empty(self.starts[-1], dtype=images[0].dtype)
        for image, start, size in zip(images, self.starts, sizes, strict=False):
            self.buffer[start : start + size] = image.reshape(-1)

    def __len__(self) -> int:
        return len(self.shapes)

    def image(self, index: int) -> Tensor:
        """Return a view of an image, (C, h, w), of the format's dtype."""
        return self.buffer[self.starts[index] : self.starts[index + 1]].view(self.shapes[index])

    @property
    def sizes(self) -> set[Size]:
        """Heights and widths that the images have."""
        return {(height, width) for _, height, width in self.shapes}

    @property
    def stack(self) -> Tensor | None:
        """A view of all images, (N, C, h, w), if they are of one size."""
        return self.buffer.view(-1, *self.shapes[0]) if self.same_size else None


@dataclass(frozen=True)
class LazyImages:
    """Images that are decoded for each use, because they do not fit into memory."""

    source: ImageSource
    readable: Sequence[int]
    preprocessing: Preprocessing
    channels: int
    pixel_format: PixelFormat
    fingerprint: str
    sizes: Set[Size]
    stack: None = None

    def __len__(self) -> int:
        return len(self.readable)

    def image(self, index: int) -> Tensor:
        """Decode an image, (C, h, w), of the format's dtype.

        Raises:
            RunError: it was readable before the run and no longer is, or now has other channels, dtype or range.
        """
        row = self.readable[index]
        label = f"{self.source.names[row]!r} of {self.source.option}"
        try:
            decoded = decode_image(self.source.payload(row), self.preprocessing)
        except (UnreadableImage, ConfigError) as reason:
            raise RunError(f"{label} became unreadable: {reason}") from None
        if decoded.kind != kind_of(self):
            expected = describe_kind(*kind_of(self))
            raise RunError(
                f"{label} became another kind of image: it is {describe_kind(*decoded.kind)}, not {expected}"
            )
        low, high = self.pixel_format.low, self.pixel_format.high
        if decoded.low < low or decoded.high > high:
            raise RunError(
                f"{label} became another image: its values are from {decoded.low:g} to {decoded.high:g}, not from"
                f" {low:g} to {high:g}"
            )
        return torch.from_numpy(decoded.pixels)


@dataclass(frozen=True)
class LoadedImages:
    """The readable images of a source.

    Attributes:
        images: their pixels.
        names: their names.
        skipped: number of unreadable images.
        enlarged: number of images smaller than the requested size.
        fingerprint: sha256 over names, pixels and their range, in hexadecimal.
        highest: the largest value of a pixel, before images are resized.
        num_animated: number of files with several frames, of which the first is used.
    """

    images: ImageStore
    names: Sequence[str]
    skipped: int
    enlarged: int
    fingerprint: str
    highest: float
    num_animated: int = 0


def decode_source(
    source: ImageSource, preprocessing: Preprocessing, *, skip_bad: bool, memory_limit: int, progress: bool = False
) -> LoadedImages:
    """Decode every image of a source once.

    Args:
        source: the images.
        preprocessing: of each image.
        skip_bad: leave out images that cannot be decoded.
        memory_limit: bytes of pixels to hold in memory; a larger set is decoded again for each use.
        progress: show a progress bar if it takes longer than a second.

    Raises:
        ConfigError: an image cannot be decoded, has unsupported values, or has other channels or another depth than
            the first one; or no image is left.
    """
    return decode_and_scan(source, preprocessing, skip_bad=skip_bad, memory_limit=memory_limit, progress=progress)[0]


def decode_and_scan(
    source: ImageSource, preprocessing: Preprocessing, *, skip_bad: bool, memory_limit: int, progress: bool = False
) -> tuple[LoadedImages, ImageScan]:
    """`decode_source`, with what the pass has found; the same arguments and errors."""
    scan = ImageScan(source)
    pixels: list[Tensor] | None = []
    for row, decoded in read_images(source, preprocessing, progress=progress):
        values = scan.add(row, decoded)
        if scan.num_bytes > memory_limit:
            pixels = None
        elif values is not None and pixels is not None:
            pixels.append(torch.from_numpy(values))
    scan.check(skip_bad)
    images = lazy_images(scan, preprocessing)
    packed = PackedImages(pixels, images.fingerprint, images.pixel_format) if pixels else None
    return loaded_images(scan, packed or images), scan


def lazy_images(scan: ImageScan, preprocessing: Preprocessing) -> LazyImages:
    """The images that a pass has found, to be decoded for each use."""
    assert scan.kind is not None
    pixel_format = scan.pixel_format(preprocessing.reading)
    fingerprint = ranged_fingerprint(scan.fingerprint, pixel_format)
    return LazyImages(scan.source, scan.readable, preprocessing, scan.kind[0], pixel_format, fingerprint, scan.sizes)


def loaded_images(scan: ImageScan, images: ImageStore) -> LoadedImages:
    """The images that a pass has found, in a store."""
    source = scan.source
    names = ChosenNames(source.names, scan.readable) if scan.num_bad else source.names
    found = (scan.num_bad, scan.enlarged, images.fingerprint, scan.highest[0], scan.num_animated)
    return LoadedImages(images, names, *found)


def ranged_fingerprint(fingerprint: str, pixel_format: PixelFormat) -> str:
    """The fingerprint of pixels together with their range, which is left out if it is that of the dtype."""
    full = full_range(pixel_format.dtype)
    if (pixel_format.low, pixel_format.high) == (full.low, full.high):
        return fingerprint
    return hashlib.sha256(f"{fingerprint} {pixel_format.low!r} {pixel_format.high!r}".encode()).hexdigest()


def kind_of(images: ImageStore) -> Kind:
    """Channels and dtype of stored images."""
    return images.channels, images.pixel_format.dtype


def check_same_kind(first: LoadedImages, second: LoadedImages) -> None:
    """Raise a ConfigError, with the name of an image of each, if the channels or dtypes of two sets differ."""
    kinds = [kind_of(loaded.images) for loaded in (first, second)]
    if kinds[0] != kinds[1]:
        raise mixed_kinds(first.names[0], kinds[0], second.names[0], kinds[1])

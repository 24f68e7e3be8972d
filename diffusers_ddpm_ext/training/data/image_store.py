"""Storage of a run's decoded images: packed in memory, or decoded again for each use.

Every image is decoded once before the run, so that a broken one is reported there and not hours later. The decoded and
resized images stay in memory, in the bit depth of their files (`PackedImages`); if they exceed the limit, they are
decoded again for each use (`LazyImages`).
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from diffusers_ddpm_ext.errors import ConfigError, RunError
from diffusers_ddpm_ext.training.data.decoding import Preprocessing, UnreadableImage, decode_image, levels_of
from diffusers_ddpm_ext.training.data.image_scan import ImageScan, ImageSource, describe_kind, mixed_kinds, read_images
from diffusers_ddpm_ext.training.data.resizing import Size


class ImageStore(Protocol):
    """Decoded images, resized and perhaps not yet cropped: uint8 with 256 levels, or uint16 with 65536."""

    @property
    def channels(self) -> int: ...
    @property
    def levels(self) -> int: ...
    @property
    def fingerprint(self) -> str:
        """Hash of names and pixels, in hexadecimal."""

    @property
    def sizes(self) -> Set[Size]:
        """Heights and widths that the images have, each at least the requested size."""

    def __len__(self) -> int: ...
    def image(self, index: int) -> Tensor:
        """Return an image, (C, h, w), uint8 or uint16."""

    @property
    def stack(self) -> Tensor | None:
        """All images in one tensor, (N, C, h, w), if they are in memory and of one size."""


class PackedImages:
    """Images in memory, (C, h, w) each, in one buffer, which is cheap to share with any number of workers."""

    def __init__(self, images: Sequence[Tensor], fingerprint: str = "") -> None:
        self.fingerprint = fingerprint
        self.channels = int(images[0].shape[0])
        self.levels = levels_of(images[0])
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
        """Return a view of an image, (C, h, w), uint8 or uint16."""
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
    levels: int
    fingerprint: str
    sizes: Set[Size]
    stack: None = None

    def __len__(self) -> int:
        return len(self.readable)

    def image(self, index: int) -> Tensor:
        """Decode an image, (C, h, w), uint8 or uint16.

        Raises:
            RunError: it was readable before the run and no longer is, or now has other channels or another depth.
        """
        row = self.readable[index]
        label = f"{self.source.names[row]!r} of {self.source.option}"
        try:
            decoded = decode_image(self.source.payload(row), self.preprocessing)
        except (UnreadableImage, ConfigError) as reason:
            raise RunError(f"{label} became unreadable: {reason}") from None
        if decoded.kind != (self.channels, self.levels):
            expected = describe_kind(self.channels, self.levels)
            raise RunError(
                f"{label} became another kind of image: it is {describe_kind(*decoded.kind)}, not {expected}"
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
        fingerprint: sha256 over names and pixels, in hexadecimal.
        max_level: the largest value of a pixel.
    """

    images: ImageStore
    names: Sequence[str]
    skipped: int
    enlarged: int
    fingerprint: str
    max_level: int


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
    scan = ImageScan(source)
    pixels: list[Tensor] | None = []
    for row, decoded in read_images(source, preprocessing, progress=progress):
        values = scan.add(row, decoded)
        if scan.num_bytes > memory_limit:
            pixels = None
        elif values is not None and pixels is not None:
            pixels.append(torch.from_numpy(values))
    scan.check(skip_bad)
    return loaded_images(scan, PackedImages(pixels, scan.fingerprint) if pixels else lazy_images(scan, preprocessing))


def lazy_images(scan: ImageScan, preprocessing: Preprocessing) -> LazyImages:
    """The images that a pass has found, to be decoded for each use."""
    assert scan.kind is not None
    return LazyImages(scan.source, scan.readable, preprocessing, *scan.kind, scan.fingerprint, scan.sizes)


def loaded_images(scan: ImageScan, images: ImageStore) -> LoadedImages:
    """The images that a pass has found, in a store."""
    source = scan.source
    names = [source.names[row] for row in scan.readable] if scan.num_bad else source.names
    return LoadedImages(images, names, scan.num_bad, scan.enlarged, scan.fingerprint, scan.max_level)


def check_same_kind(first: LoadedImages, second: LoadedImages) -> None:
    """Raise a ConfigError, with the name of an image of each, if the channels or depths of two sets differ."""
    kinds = [(loaded.images.channels, loaded.images.levels) for loaded in (first, second)]
    if kinds[0] != kinds[1]:
        raise mixed_kinds(first.names[0], kinds[0], second.names[0], kinds[1])

"""Storage of a run's decoded images: packed in memory, or decoded again for each use.

Every image is decoded once before the run, so that a broken one is reported there and not hours later. The decoded and
resized images stay in memory, in the bit depth of their files (`PackedImages`); if they exceed the limit, they are
decoded again for each use (`LazyImages`).
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffusers_ddpm_ext.errors import ConfigError, RunError
from diffusers_ddpm_ext.training.data.bit_depth import LEVELS_8_BIT, LEVELS_16_BIT
from diffusers_ddpm_ext.training.data.decoding import (
    CHANNEL_NAMES,
    DecodedImage,
    Preprocessing,
    Size,
    UnreadableImage,
    decode_image,
    levels_of,
)
from diffusers_ddpm_ext.training.data.image_files import Payload

IMAGES_PER_BLOCK = 256  # submitted to the decoding threads at a time


class ImageSource(Protocol):
    """Undecoded images in a fixed order, and the option that selected them, for messages."""

    @property
    def option(self) -> str: ...
    @property
    def names(self) -> Sequence[str]: ...
    def payload(self, index: int) -> Payload:
        """Return the file of an image, or its content; None if it has none."""


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
            expected = _describe_kind(self.channels, self.levels)
            raise RunError(
                f"{label} became another kind of image: it is {_describe_kind(*decoded.kind)}, not {expected}"
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
    bad: list[tuple[str, UnreadableImage]] = []
    readable: list[int] = []
    pixels: list[Tensor] | None = []
    total = enlarged = max_level = 0
    sizes: set[Size] = set()
    kind: tuple[int, int] | None = None
    digest = hashlib.sha256()
    count = len(source.names)
    with tqdm(total=count, desc="reading images", unit="image", delay=1, leave=False, disable=not progress) as bar:
        for index, decoded in enumerate(_decode_all(source, preprocessing)):
            bar.update()
            name = source.names[index]
            if isinstance(decoded, UnreadableImage):
                bad.append((name, decoded))
                continue
            if kind is not None and kind != decoded.kind:
                raise _mixed_kinds(source.names[readable[0]], kind, name, decoded.kind)
            kind = decoded.kind
            readable.append(index)
            max_level = max(max_level, int(decoded.pixels.max()))
            enlarged += decoded.enlarged
            total += decoded.pixels.nbytes
            sizes.add((decoded.pixels.shape[1], decoded.pixels.shape[2]))
            digest.update(os.fsencode(name) + b"\0" + str(decoded.pixels.shape).encode() + decoded.pixels.tobytes())
            if total > memory_limit:
                pixels = None
            elif pixels is not None:
                pixels.append(torch.from_numpy(decoded.pixels))
    if kind is None or (bad and not skip_bad):
        raise _unreadable(source, bad, skip_bad)
    fingerprint, names = digest.hexdigest(), [source.names[i] for i in readable]
    images: ImageStore
    if pixels:
        images = PackedImages(pixels, fingerprint)
    else:
        images = LazyImages(source, readable, preprocessing, *kind, fingerprint, sizes)
    return LoadedImages(images, names, len(bad), enlarged, fingerprint, max_level)


def _decode_all(source: ImageSource, preprocessing: Preprocessing) -> Iterator[DecodedImage | UnreadableImage]:
    """Yield the images in order, decoded by several threads (Pillow's decoders release the GIL)."""

    def decode(job: tuple[str, Payload]) -> DecodedImage | UnreadableImage:
        name, payload = job
        try:
            return decode_image(payload, preprocessing)
        except UnreadableImage as error:
            return error
        except ConfigError as error:
            raise ConfigError(f"{name!r} of {source.option}: {error}") from None

    threads = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore")  # Pillow warns about large images and unusual metadata
        for start in range(0, len(source.names), IMAGES_PER_BLOCK):
            block = range(start, min(start + IMAGES_PER_BLOCK, len(source.names)))
            yield from pool.map(decode, [(source.names[index], source.payload(index)) for index in block])


def check_same_kind(first: LoadedImages, second: LoadedImages) -> None:
    """Raise a ConfigError, with the name of an image of each, if the channels or depths of two sets differ."""
    kinds = [(loaded.images.channels, loaded.images.levels) for loaded in (first, second)]
    if kinds[0] != kinds[1]:
        raise _mixed_kinds(first.names[0], kinds[0], second.names[0], kinds[1])


def _describe_kind(channels: int, levels: int) -> str:
    """Channels of an image, and its depth if that is not 8 bits."""
    return f"{CHANNEL_NAMES[channels]} ({channels}{' channel of 16 bits' if levels == LEVELS_16_BIT else ''})"


def _mixed_kinds(first: str, first_kind: tuple[int, int], second: str, second_kind: tuple[int, int]) -> ConfigError:
    """The error for two images whose channels or depths differ."""
    if first_kind[1] != second_kind[1]:
        bits = {LEVELS_8_BIT: 8, LEVELS_16_BIT: 16}
        return ConfigError(
            f"the images differ in depth: {first!r} has {bits[first_kind[1]]} bits per channel, {second!r} has"
            f" {bits[second_kind[1]]}; convert them all to one of the two."
        )
    return ConfigError(
        f"the images differ in channels: {first!r} is {_describe_kind(*first_kind)}, {second!r} is"
        f" {_describe_kind(*second_kind)}; --channels 1, 3 or 4 converts them all."
    )


def _unreadable(source: ImageSource, bad: Sequence[tuple[str, UnreadableImage]], skip_bad: bool) -> ConfigError:
    """The error for unreadable images: their number and the first one's name."""
    name, reason = bad[0]
    count = f"{len(bad)} of {len(source.names)} images cannot be read"
    if skip_bad:
        return ConfigError(f"{source.option}: no image is left, {count}: {name!r} ({reason}).")
    first = "the first is " if len(bad) > 1 else ""
    return ConfigError(
        f"{source.option}: {count}: {first}{name!r} ({reason}); repair or remove such files, or leave them out by"
        " --skip_bad_images."
    )

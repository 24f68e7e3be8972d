"""How a file becomes pixels: decoded once before the run, then kept in memory or decoded again.

Every image is decoded at the start, so that a broken one is named there and not in the middle of a night. What was
decoded stays in memory, resized, with the depth of its files (``PackedImages``); where there is too much of it, it is
decoded again whenever it is asked for (``LazyImages``).
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffusers_ddpm_ext.errors import ConfigError, RunError
from diffusers_ddpm_ext.training.data.bit_depth import DEEP, SHALLOW
from diffusers_ddpm_ext.training.data.decoding import (
    CHANNEL_NAMES,
    BadImage,
    Picture,
    Preparation,
    levels_of,
    read_picture,
)

BLOCK = 256  # images that are handed to the decoding threads at a time


class Source(Protocol):
    """Undecoded images in a fixed order."""

    @property
    def option(self) -> str:
        """The option and value that named it, for messages."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the images."""

    def payload(self, index: int) -> bytes | Path | None:
        """Return the file of an image, or its bytes; None where there is none."""


class Images(Protocol):
    """Decoded images of one number of channels, resized and perhaps not yet cropped."""

    @property
    def channels(self) -> int:
        """Number of channels."""

    @property
    def levels(self) -> int:
        """Values that a pixel can take: 256 where they are uint8, 65536 where they are uint16."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Tensor:
        """Return an image, (C, h, w), uint8 or uint16."""

    @property
    def stack(self) -> Tensor | None:
        """All images in one tensor, (N, C, h, w), where they lie in memory and are of one size."""


class PackedImages:
    """Images in memory, one after the other in one buffer: cheap to share with workers, however many there are."""

    def __init__(self, pictures: Sequence[Tensor]) -> None:
        self.channels = int(pictures[0].shape[0])
        self.levels = levels_of(pictures[0])
        self.shapes = [tuple(picture.shape) for picture in pictures]
        self.alike = len(set(self.shapes)) == 1
        sizes = [picture.numel() for picture in pictures]
        self.starts = [0, *np.cumsum(sizes).tolist()]
        self.buffer = torch.empty(self.starts[-1], dtype=pictures[0].dtype)
        for picture, start, size in zip(pictures, self.starts, sizes, strict=False):
            self.buffer[start : start + size] = picture.reshape(-1)

    def __len__(self) -> int:
        return len(self.shapes)

    def image(self, index: int) -> Tensor:
        """Return a view of an image, (C, h, w), uint8 or uint16."""
        return self.buffer[self.starts[index] : self.starts[index + 1]].view(self.shapes[index])

    @property
    def stack(self) -> Tensor | None:
        """A view of all images, (N, C, h, w), where they are of one size."""
        return self.buffer.view(-1, *self.shapes[0]) if self.alike else None


@dataclass(frozen=True)
class LazyImages:
    """Images that are decoded each time, because memory does not hold them."""

    source: Source
    kept: Sequence[int]
    preparation: Preparation
    channels: int
    levels: int = SHALLOW
    stack: None = None

    def __len__(self) -> int:
        return len(self.kept)

    def image(self, index: int) -> Tensor:
        """Decode an image, (C, h, w), uint8 or uint16.

        Raises:
            RunError: it could be read before the run and cannot any more, or has become another kind of image.
        """
        place = self.kept[index]
        try:
            picture = read_picture(self.source.payload(place), self.preparation)
        except (BadImage, ConfigError) as reason:
            name = self.source.names[place]
            raise RunError(f"{name!r} of {self.source.option} became unreadable: {reason}") from None
        if (picture.channels, picture.levels) != (self.channels, self.levels):
            raise RunError(
                f"{self.source.names[place]!r} of {self.source.option} became another kind of image: it is"
                f" {_kind(picture.channels, picture.levels)}, not {_kind(self.channels, self.levels)}"
            )
        return torch.from_numpy(picture.pixels)


@dataclass(frozen=True)
class Reading:
    """What was read from a source.

    Attributes:
        images: the images that could be decoded.
        names: their names.
        skipped: how many were left out.
        enlarged: how many are smaller than the size asked for.
        fingerprint: sha256 over names and pixels, in hexadecimal.
        highest: the largest value of a pixel.
    """

    images: Images
    names: Sequence[str]
    skipped: int
    enlarged: int
    fingerprint: str
    highest: int


def read(
    source: Source, preparation: Preparation, *, skip_bad: bool, memory_limit: int, progress: bool = False
) -> Reading:
    """Decode every image of a source once.

    Args:
        source: the images.
        preparation: what is done to each.
        skip_bad: leave out what cannot be decoded.
        memory_limit: bytes of pixels that are kept in memory; more are decoded again when asked for.
        progress: show a bar where it takes longer than a second.

    Raises:
        ConfigError: an image cannot be decoded, has values that cannot be read whole, or other channels or another
            depth than the first one; or no image is left.
    """
    bad: list[tuple[str, BadImage]] = []
    kept: list[int] = []
    pictures: list[Tensor] | None = []
    total = enlarged = highest = 0
    first: tuple[int, int] | None = None
    digest = hashlib.sha256()
    count = len(source.names)
    with tqdm(total=count, desc="reading images", unit="image", delay=1, leave=False, disable=not progress) as bar:
        for index, picture in enumerate(_decode_all(source, preparation)):
            bar.update()
            name = source.names[index]
            if isinstance(picture, BadImage):
                bad.append((name, picture))
                continue
            kind = (picture.channels, picture.levels)
            if first is not None and kind != first:
                raise _mixed(source.names[kept[0]], first, name, kind)
            kept.append(index)
            first = kind
            highest = max(highest, int(picture.pixels.max()))
            enlarged += picture.enlarged
            total += picture.pixels.nbytes
            digest.update(os.fsencode(name) + b"\0" + str(picture.pixels.shape).encode() + picture.pixels.tobytes())
            if pictures is not None:
                pictures.append(torch.from_numpy(picture.pixels))
            if total > memory_limit:
                pictures = None
    if bad and not (skip_bad and kept):
        raise _unreadable(source, bad, skip_bad)
    images = PackedImages(pictures) if pictures else LazyImages(source, kept, preparation, *(first or (0, SHALLOW)))
    return Reading(images, [source.names[i] for i in kept], len(bad), enlarged, digest.hexdigest(), highest)


def _decode_all(source: Source, preparation: Preparation) -> Iterator[Picture | BadImage]:
    """Yield the images in order, decoded by several threads (Pillow's decoders leave the interpreter alone)."""

    def decode(job: tuple[str, bytes | Path | None]) -> Picture | BadImage:
        name, payload = job
        try:
            return read_picture(payload, preparation)
        except BadImage as error:
            return error
        except ConfigError as error:
            raise ConfigError(f"{name!r} of {source.option}: {error}") from None

    threads = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        # Large photographs and odd metadata are no reason to speak, or under -W error to stop.
        warnings.simplefilter("ignore")
        for start in range(0, len(source.names), BLOCK):
            block = range(start, min(start + BLOCK, len(source.names)))
            yield from pool.map(decode, [(source.names[index], source.payload(index)) for index in block])


def check_alike(reading: Reading, other: Reading) -> None:
    """Refuse two readings whose channels or depths differ, by naming an image of each.

    Raises:
        ConfigError: they differ.
    """
    kinds = [(one.images.channels, one.images.levels) for one in (reading, other)]
    if kinds[0] != kinds[1]:
        raise _mixed(reading.names[0], kinds[0], other.names[0], kinds[1])


def _kind(channels: int, levels: int) -> str:
    """What an image is, in words: its channels, and its depth where that is not 8 bits."""
    return f"{CHANNEL_NAMES[channels]} ({channels}{' channel of 16 bits' if levels == DEEP else ''})"


def _mixed(first: str, kind: tuple[int, int], other: str, others: tuple[int, int]) -> ConfigError:
    """Name two images whose channels or depths differ."""
    if kind[1] != others[1]:
        bits = {SHALLOW: 8, DEEP: 16}
        return ConfigError(
            f"the images differ in depth: {first!r} has {bits[kind[1]]} bits a channel, {other!r} has"
            f" {bits[others[1]]}; convert them all to one of the two."
        )
    return ConfigError(
        f"the images differ in channels: {first!r} is {_kind(*kind)}, {other!r} is {_kind(*others)};"
        " --channels 1, 3 or 4 converts them all."
    )


def _unreadable(source: Source, bad: Sequence[tuple[str, BadImage]], skip_bad: bool) -> ConfigError:
    """Name the first image that cannot be read, and count them."""
    name, reason = bad[0]
    count = f"{len(bad)} of {len(source.names)} images cannot be read"
    if skip_bad:
        return ConfigError(f"{source.option}: no image is left, {count}: {name!r} ({reason}).")
    first = "the first is " if len(bad) > 1 else ""
    return ConfigError(
        f"{source.option}: {count}: {first}{name!r} ({reason}); mend or remove such files, or leave them out by"
        " --skip_bad_images."
    )

"""Images of a complete cache, mapped into memory: what is used is read from the disk, or from the system's memory."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_ddpm_ext.errors import warn
from diffusers_ddpm_ext.training.data.cache_manifest import MANIFEST, read_manifest
from diffusers_ddpm_ext.training.data.decoding import Preprocessing
from diffusers_ddpm_ext.training.data.image_records import ENTRY, INDEX, PIXELS, checksum, map_file, read_pixels
from diffusers_ddpm_ext.training.data.image_scan import ImageScan, ImageSource
from diffusers_ddpm_ext.training.data.image_store import LazyImages, LoadedImages, lazy_images, loaded_images
from diffusers_ddpm_ext.training.data.resizing import Size


@dataclass
class CachedImages:
    """Images in the files of a complete cache, an `ImageStore`.

    Each is compared with its checksum when it is read; a damaged one is decoded again. Processes share the memory.

    Attributes:
        folder: of the cache.
        source: the same images, to be decoded.
        num_bytes: of all pixels.
    """

    folder: Path
    source: LazyImages
    num_bytes: int
    _files: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    _verified: np.ndarray | None = field(default=None, repr=False)
    _is_damaged: bool = False

    def __post_init__(self) -> None:
        self.channels, self.pixel_format = self.source.channels, self.source.pixel_format
        self.fingerprint = self.source.fingerprint

    def __len__(self) -> int:
        return len(self.source)

    @property
    def stack(self) -> CachedStack | None:
        """All images as one tensor, (N, C, h, w), if they are of one size."""
        return CachedStack(self) if len(self.source.sizes) == 1 else None

    @cached_property
    def sizes(self) -> Set[Size]:
        """Heights and widths that the images have."""
        if self.source.sizes:
            return self.source.sizes
        index = self._file(INDEX)
        pairs = index[["height", "width"]][index["channels"] > 0]
        return {(int(height), int(width)) for height, width in np.unique(pairs)}

    @cached_property
    def split_keys(self) -> np.ndarray:
        """Keys of the images' names, (n,), uint32, by which images are held out for validation."""
        index = self._file(INDEX)
        keys: np.ndarray = index["split"][index["channels"] > 0]
        return keys

    def image(self, index: int) -> Tensor:
        """Return an image, (C, h, w), in the dtype of its file.

        Raises:
            RunError: it is damaged in the cache, and cannot be decoded again either.
        """
        row = self.source.readable[index]
        try:
            entry = self._file(INDEX)[row]
            pixels = read_pixels(self._file(PIXELS), entry).copy()  # torch warns about arrays that cannot be written
            if checksum(self.folder.name, row, pixels) == entry["checksum"]:
                return torch.from_numpy(pixels)
        except (OSError, ValueError, TypeError, IndexError):
            pass
        return self._decoded_again(index)

    def _decoded_again(self, index: int) -> Tensor:
        if not self._is_damaged:
            self._is_damaged = True
            with suppress(OSError):  # so that the next run builds it again
                (self.folder / MANIFEST).unlink(missing_ok=True)
            warn(
                f"the image cache {self.folder} is damaged: damaged images are decoded again, the next run rebuilds it"
            )
        return self.source.image(index)

    def images(self, numbers: np.ndarray) -> Tensor:
        """Return images of one size, (b, C, h, w), by their numbers, (b,); each is verified when it is first used."""
        if self._verified is None:
            self._verified = np.zeros(len(self), bool)
        height, width = next(iter(self.source.sizes))
        pixels = self._file(PIXELS).view(self.pixel_format.dtype).reshape(-1, self.channels, height, width)
        values = pixels[numbers]
        for position in np.flatnonzero(~self._verified[numbers]).tolist():
            number = int(numbers[position])
            row = self.source.readable[number]
            if checksum(self.folder.name, row, values[position]) == self._file(INDEX)["checksum"][row]:
                self._verified[number] = True
            else:
                values[position] = self._decoded_again(number).numpy()
        return torch.from_numpy(values)

    def _file(self, name: str) -> np.ndarray:
        if name not in self._files:
            self._files[name] = map_file(self.folder / name, ENTRY if name == INDEX else np.uint8)
        return self._files[name]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}  # a pickled map would be a copy of the file


@dataclass(frozen=True)
class CachedStack:
    """The images of a cache as a tensor (N, C, h, w), which they are if they have one size."""

    images: CachedImages

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of images, channels, height and width."""
        return (len(self.images), self.images.channels, *next(iter(self.images.source.sizes)))

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Return a copy of images, (b, C, h, w), by their numbers, (b,), int64."""
        return self.images.images(rows.numpy())


def open_images(
    folder: Path, key: Mapping[str, Any], source: ImageSource, preprocessing: Preprocessing, skip_bad: bool
) -> LoadedImages | None:
    """Open a cache; None if it is not complete, or damaged where that can be seen without reading its pixels.

    Args:
        folder: of the cache.
        key: of the cache.
        source: of its images.
        preprocessing: of its images.
        skip_bad: leave out images that cannot be decoded.

    Raises:
        ConfigError: some images cannot be decoded and are not to be left out, or none is left.
    """
    manifest = read_manifest(folder, key)
    if manifest is None:
        return None
    try:
        index, pixels = map_file(folder / INDEX, ENTRY), map_file(folder / PIXELS)
        sizes = [(folder / name).stat().st_size for name in (INDEX, PIXELS)]
        expected = [manifest.content["rows"] * ENTRY.itemsize, manifest.content["pixels"]]
        if sizes != expected or zlib.crc32(index.data) != manifest.content["index"]:
            return None
        content = manifest.object("images").content
        readable = np.flatnonzero(index["channels"]) if content["num_bad"] else range(len(index))
        scan = ImageScan.restored(source, content, readable)  # type: ignore[arg-type]
    except (OSError, KeyError, ValueError):  # ValueError: also a ConfigError
        return None
    scan.check(skip_bad)
    images = CachedImages(
        folder, lazy_images(scan, preprocessing), scan.num_bytes, _files={INDEX: index, PIXELS: pixels}
    )
    return loaded_images(scan, images)

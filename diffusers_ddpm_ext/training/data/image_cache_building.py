"""Building of an image cache: by one process at a time, from where an interrupted one has ended."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError, warn
from diffusers_ddpm_ext.training.data.array_images import UnreadableImage
from diffusers_ddpm_ext.training.data.cache_manifest import (
    MANIFEST,
    SECONDS_BETWEEN_ATTEMPTS,
    CacheUnavailable,
    lacks_space,
    lock_or_busy,
    name_of_key,
    write_manifest,
)
from diffusers_ddpm_ext.training.data.cached_images import open_images
from diffusers_ddpm_ext.training.data.decoding import DecodedImage, Preprocessing, decode_image
from diffusers_ddpm_ext.training.data.image_records import INDEX, ImageWriter, map_file
from diffusers_ddpm_ext.training.data.image_scan import ImageScan, ImageSource, read_images
from diffusers_ddpm_ext.training.data.image_store import LoadedImages, lazy_images
from diffusers_ddpm_ext.training.data.source_identity import SourceIdentity, identify
from diffusers_ddpm_ext.utils import random_keys as keys
from diffusers_ddpm_ext.utils.folder_lock import FolderLock


@dataclass(frozen=True)
class ImageCache:
    """A cache of the images of one source, built or not.

    Attributes:
        parent: the folder of all caches.
        key: what determines the content, as JSON.
        identity: of the source.
        source: of the images.
        preprocessing: of each image.
        progress: show a progress bar, and what is waited for.
    """

    parent: Path
    key: Mapping[str, Any]
    identity: SourceIdentity
    source: ImageSource
    preprocessing: Preprocessing
    progress: bool

    @property
    def name(self) -> str:
        """Name of the folder."""
        return name_of_key(self.key)

    @property
    def folder(self) -> Path:
        """Its own folder."""
        return self.parent / self.name

    def open(self, skip_bad: bool) -> LoadedImages | None:
        """`open_images`."""
        return open_images(self.folder, self.key, self.source, self.preprocessing, skip_bad)


def build(cache: ImageCache, skip_bad: bool, keeps_unfinished: bool) -> LoadedImages:
    """Build a cache and open it, or wait for another process that builds it.

    Args:
        cache: to be built.
        skip_bad: leave out images that cannot be decoded.
        keeps_unfinished: whether what is written of it stays when the disk is full, for a later build.

    Raises:
        CacheUnavailable: the folder cannot be written, the disk is full, or the images change meanwhile.
        ConfigError: an image cannot be used.
    """
    try:
        with _locked(cache):
            loaded = cache.open(skip_bad)
            if loaded is None:
                if os.path.lexists(cache.folder / MANIFEST):
                    warn(f"the image cache {cache.folder} is damaged: it is built again")
                    (cache.folder / MANIFEST).unlink()
                _write(cache, keeps_unfinished)
                loaded = cache.open(skip_bad)
    except OSError as error:
        raise CacheUnavailable(error.strerror or str(error)) from None
    if loaded is None:
        raise CacheUnavailable("what was written to it cannot be read")
    return loaded


@contextmanager
def _locked(cache: ImageCache) -> Iterator[None]:
    """Create the folder of a cache and lock it, or wait for the process that has locked it."""
    lock, is_waiting = FolderLock(cache.parent, cache.name), False
    while lock_or_busy(lock, cache.folder):
        if not is_waiting and cache.progress:
            warn(f"another process reads the same images into {cache.folder}: waiting for it")
        is_waiting = True
        time.sleep(SECONDS_BETWEEN_ATTEMPTS)
    try:
        yield
    finally:
        lock.release()


def _write(cache: ImageCache, keeps_unfinished: bool) -> None:
    """Write the files of a cache, and its manifest."""
    writer, scan = ImageWriter(cache.folder), ImageScan(cache.source)
    try:
        _continue(cache, writer, scan)
        for row, decoded in read_images(cache.source, cache.preprocessing, start=writer.rows, progress=cache.progress):
            pixels = scan.add(row, decoded)
            if pixels is not None and len(scan.readable) == 1:
                _check_free_space(cache, pixels.nbytes)
            split = keys.key(keys.SPLIT, cache.source.names[row])
            writer.append(cache.name, split, decoded if isinstance(decoded, DecodedImage) else None)
        scan.check(skip_bad=True)
        lazy_images(scan, cache.preprocessing)  # refuses values that no format has, before they are kept
        if identify(cache.source) != cache.identity:
            raise CacheUnavailable("the images changed while they were read")
        content = {"rows": writer.rows, "pixels": writer.finish(), "images": scan.to_dict()}
        content["index"] = zlib.crc32(map_file(cache.folder / INDEX).data)
        write_manifest(cache.folder, cache.key, content)
    except (ConfigError, CacheUnavailable):
        writer.discard()
        raise
    except OSError:
        if not keeps_unfinished:
            writer.discard()
        raise
    finally:
        writer.close()


def _continue(cache: ImageCache, writer: ImageWriter, scan: ImageScan) -> None:
    """Note the images that an interrupted build has written."""
    for row, kept in enumerate(writer.kept(cache.name)):
        decoded: DecodedImage | UnreadableImage | None = kept
        if kept is None:
            try:
                decode_image(cache.source.payload(row), cache.preprocessing)
                return  # it can be read now
            except UnreadableImage as error:
                decoded = error
        assert decoded is not None
        scan.add(row, decoded)


def _check_free_space(cache: ImageCache, bytes_per_image: int) -> None:
    """Refuse a cache that the disk has no space for, before hours are spent on it."""
    lack = lacks_space(cache.folder, bytes_per_image * len(cache.source.names))
    if lack is not None:
        raise CacheUnavailable(f"the images take about {lack}")

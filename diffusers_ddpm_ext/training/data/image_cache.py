"""Cache of images: the deterministic part of their preparation (decoded, resized) is done once, for every later run.

A cache is a folder in ``ddpm_ext_images`` of ``--cache_dir``, called after a hash of its key: which images, how they
are prepared, and by which versions of the programs that decode them. Random crops and flips are made of what it holds,
so that a run computes the same with and without it.
"""

from __future__ import annotations

import json
import os
import warnings
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext._version import __version__
from diffusers_ddpm_ext.errors import ConfigError, printable, warn
from diffusers_ddpm_ext.training.config.data_options import SourceOptions
from diffusers_ddpm_ext.training.data.array_images import UnreadableImage
from diffusers_ddpm_ext.training.data.cache_manifest import CacheUnavailable
from diffusers_ddpm_ext.training.data.decoding import Preprocessing, decode_image
from diffusers_ddpm_ext.training.data.image_cache_building import ImageCache, build
from diffusers_ddpm_ext.training.data.image_scan import ImageSource
from diffusers_ddpm_ext.training.data.image_store import (
    LazyImages,
    LoadedImages,
    decode_and_scan,
    decode_source,
    lazy_images,
    loaded_images,
)
from diffusers_ddpm_ext.training.data.remembered_check import read_check, write_check
from diffusers_ddpm_ext.training.data.source_identity import SourceIdentity, identify

OPTION = "--cache_images"
SUBFOLDER = "ddpm_ext_images"
FORMAT = 1
MANY_IMAGES = 10_000
MANY_BYTES = 2**28
"""Images, or bytes of their files, that take some ten seconds to decode, by all processes of a machine together: these
``auto`` caches, so that one process decodes and the others map what it wrote."""
DECODERS = ("pillow", "numpy", "tifffile", "imagecodecs")


def load_images(
    source: ImageSource,
    preprocessing: Preprocessing,
    options: SourceOptions,
    *,
    memory_limit: int,
    progress: bool = False,
) -> LoadedImages:
    """Load the images of a source: from a cache, or decoding each once.

    Args:
        source: the images.
        preprocessing: of each image.
        options: of the run; ``cache_images``, ``cache_dir`` and ``skip_bad_images`` are used.
        memory_limit: bytes of pixels to hold in memory without a cache.
        progress: show a progress bar if it takes longer than a second.

    Raises:
        ConfigError: an image cannot be used, as in `decode_source`; or the cache that is asked for cannot be built.
    """
    mode, skip_bad = options.cache_images, options.skip_bad_images
    parent = cache_parent(options.cache_dir)
    try:
        cache = None if mode == "never" else _find_cache(parent, source, preprocessing, progress, mode == "always")
        if cache is not None:
            loaded = cache.open(skip_bad)
            if loaded is None and (mode == "always" or is_worthwhile(cache, memory_limit)):
                loaded = build(cache, skip_bad, keeps_unfinished=mode == "always")
            if loaded is None:
                loaded = decode_source(
                    source, preprocessing, skip_bad=skip_bad, memory_limit=memory_limit, progress=progress
                )
                if isinstance(loaded.images, LazyImages):  # the other images are larger than the first one
                    loaded = build(cache, skip_bad, keeps_unfinished=False)
            return loaded
    except CacheUnavailable as reason:
        place = f"{OPTION} {mode}: {printable(str(parent), 200)} cannot be used: {reason}"
        if mode == "always":
            raise ConfigError(f"{place}; name another folder by --cache_dir, or use {OPTION} never") from None
        warn(f"{place}; the images are decoded without a cache")
    return _decode_or_remember(parent, source, preprocessing, skip_bad, memory_limit, progress)


def _decode_or_remember(
    parent: Path, source: ImageSource, preprocessing: Preprocessing, skip_bad: bool, memory_limit: int, progress: bool
) -> LoadedImages:
    """Decode every image once, or none where an earlier run has, and they do not fit into memory in any case."""
    identity = None
    with suppress(CacheUnavailable):
        identity = identify(source)
    key = None if identity is None else _key(identity, preprocessing)
    scan = None if key is None else read_check(parent, key, source)
    if scan is not None and scan.num_bytes > memory_limit:
        scan.check(skip_bad)
        return loaded_images(scan, lazy_images(scan, preprocessing))
    loaded, scan = decode_and_scan(
        source, preprocessing, skip_bad=skip_bad, memory_limit=memory_limit, progress=progress
    )
    if key is not None and isinstance(loaded.images, LazyImages) and identify(source) == identity:
        write_check(parent, key, scan)
    return loaded


def _find_cache(
    parent: Path, source: ImageSource, preprocessing: Preprocessing, progress: bool, is_required: bool
) -> ImageCache | None:
    """The cache of a source, built or not; None for images that are in memory, or whose changes nobody can see.

    Raises:
        CacheUnavailable: one is required, and changes cannot be seen.
    """
    try:
        identity = identify(source)
    except CacheUnavailable:
        if is_required:
            raise
        return None
    if identity is None:
        return None
    return ImageCache(parent, _key(identity, preprocessing), identity, source, preprocessing, progress)


def cache_parent(cache_dir: str | None) -> Path:
    """The folder of all image caches: in ``--cache_dir``, or beside the downloads of `datasets`."""
    if cache_dir is None:
        from huggingface_hub.constants import HF_HOME

        cache_dir = os.environ.get("HF_DATASETS_CACHE") or os.path.join(HF_HOME, "datasets")
    return Path(cache_dir, SUBFOLDER).expanduser()


def _key(identity: SourceIdentity, preprocessing: Preprocessing) -> dict[str, Any]:
    """What determines the content of a cache, as JSON."""
    prepared = json.loads(json.dumps(asdict(preprocessing), default=str))
    return {"format": FORMAT, "kind": "pixels", "source": identity.key, "prepared": prepared, "versions": _versions()}


def _versions() -> dict[str, str]:
    """Versions of what decodes images; those that are not installed are left out."""
    found = {"diffusers-ddpm-ext": __version__}
    for name in DECODERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def is_worthwhile(cache: ImageCache, memory_limit: int) -> bool:
    """Whether ``auto`` caches these images: they take long to decode, or do not fit into memory."""
    count, processes = len(cache.source.names), local_processes()
    if count * processes >= MANY_IMAGES or cache.identity.num_bytes * processes >= MANY_BYTES:
        return True
    with suppress(UnreadableImage, ConfigError), warnings.catch_warnings(action="ignore"):  # the pass names faults
        return count * decode_image(cache.source.payload(0), cache.preprocessing).pixels.nbytes > memory_limit
    return False


def local_processes() -> int:
    """Number of processes of this run on this machine, as the launcher says; each would decode all images."""
    count = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return int(count) if count.isdecimal() and int(count) else 1

"""Cache of latents: every image is encoded once, by all processes together, and read by every later run.

A cache is a folder in the one that the user names, called after a hash of its key: what is encoded (the first stage's
content, the images and their size, flipped and turned or not) and how it is stored. The scale of the latents is not in
the key, since posteriors are stored before they are scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.models.concat_condition import concat_condition
from diffusers_ddpm_ext.training.data.augmentation import apply_symmetries
from diffusers_ddpm_ext.training.data.cache_building import CacheJob, open_cache
from diffusers_ddpm_ext.training.data.cache_folder import CacheFolder, CacheKind
from diffusers_ddpm_ext.training.data.cache_manifest import name_of_key
from diffusers_ddpm_ext.training.data.dataset import ImageData
from diffusers_ddpm_ext.training.data.image_set import ImageSet
from diffusers_ddpm_ext.training.data.latents import LatentEncoder
from diffusers_ddpm_ext.training.data.pixel_values import to_pixels
from diffusers_ddpm_ext.training.data.posterior import Posterior, one_by_one
from diffusers_ddpm_ext.training.data.posterior_files import RecordFormat
from diffusers_ddpm_ext.training.distributed import fail_together

OPTION = "--cache_latents"
FORMAT = 1


@dataclass(frozen=True)
class ImageEncoding:
    """What the cache of latents holds.

    Attributes:
        images: all loaded images in their order, without conditions.
        encode: the posterior of one image (1, C, H, W), on the device.
        device: on which it is encoded.
        layout: of the records.
        symmetries: in which each image is encoded: a latent that is flipped or turned is not that of the image.
    """

    images: ImageSet
    encode: Callable[[Tensor], Posterior]
    device: torch.device
    layout: RecordFormat
    symmetries: tuple[int, ...]

    def records(self, numbers: np.ndarray) -> Iterator[list[np.ndarray]]:
        """Records of the posteriors with these numbers, a few at a time, in order."""
        for chunk, pixels in _load(self, numbers):
            posteriors = one_by_one(self.encode, pixels)
            yield [_record(self, number, posterior) for number, posterior in zip(chunk, posteriors, strict=True)]


def cache_latents(
    parent: str, dtype: str, data: ImageData, encoder: LatentEncoder, accelerator: Accelerator
) -> ImageData:
    """Open the caches of a run's images; encode what they lack. Collective call: every process must make it.

    Args:
        parent: ``--cache_latents``; each cache has a folder of its own in it.
        dtype: of the stored values, ``float32`` or ``float16``.
        data: the images of the run.
        encoder: the run's first stage, on this process's device; its scale does not matter.
        accelerator: of the run.

    Returns:
        The same images with stored posteriors, and stored conditions where these are the mode of pictures; their
        samples are drawn anew each time, and so encoded each time.

    Raises:
        ConfigError: the images are cropped at random, or the folder cannot be used; in one process.
        RunError: the cache cannot be completed (a full disk, an image that became unreadable); in one process.
    """
    stage = encoder.stage
    encoders: dict[str, Callable[[Tensor], Posterior]] = {"images": lambda image: Posterior(*stage.posterior(image))}
    if encoder.concat_through_vae == "mode":
        encoders["conditions"] = lambda picture: Posterior(concat_condition(stage, picture, "mode"))
    jobs: dict[int, CacheJob] = {}
    with fail_together(accelerator):
        for images in (data.train, data.validation):
            # One cache for both if they are parts of the same source.
            is_shared = images is not None and images.images is data.train.images
            symmetries = data.train.augmentation.symmetries if is_shared else (0,)
            for kind, pictures in _picture_sets(images).items():
                if kind in encoders and id(pictures.images) not in jobs:
                    key = _key(kind, pictures, symmetries, encoder.content_hash, dtype)
                    jobs[id(pictures.images)] = _job(
                        Path(parent), pictures, symmetries, key, encoders[kind], accelerator.device
                    )
    stores = {number: open_cache(job, accelerator) for number, job in jobs.items()}

    def with_stores(images: ImageSet) -> ImageSet:
        own = {kind: stores.get(id(pictures.images)) for kind, pictures in _picture_sets(images).items()}
        return replace(images, posteriors=own["images"], concat_latents=own.get("conditions"))

    validation = None if data.validation is None else with_stores(data.validation)
    return replace(data, train=with_stores(data.train), validation=validation)


def _picture_sets(images: ImageSet | None) -> dict[str, ImageSet]:
    """All loaded images of a set's source, and all pictures that are concatenated to them."""
    if images is None:
        return {}
    every = torch.arange(len(images.images))
    sets = {"images": replace(images, rows=every, columns=None, dropout=None, replace_unreadable=False)}
    if images.columns is not None and (concat := images.columns.concat) is not None:
        sets["conditions"] = replace(sets["images"], images=concat)
    return sets


def _key(kind: str, images: ImageSet, symmetries: tuple[int, ...], first_stage: str, dtype: str) -> dict[str, Any]:
    """What determines the content of a cache."""
    others = {} if symmetries in ((0,), (0, 1)) else {"symmetries": list(symmetries)}
    return {
        "format": FORMAT,
        "kind": kind,
        "first_stage": first_stage,
        "images": images.images.fingerprint,
        "count": len(images),
        "levels": images.levels,
        "size": list(images.size),
        "flips": symmetries == (0, 1),
        "dtype": dtype,
    } | others


def _job(
    parent: Path,
    images: ImageSet,
    symmetries: tuple[int, ...],
    key: dict[str, Any],
    encode: Callable[[Tensor], Posterior],
    device: torch.device,
) -> CacheJob:
    """The job of a cache. A ConfigError where its images are cropped at random."""
    if images.augmentation.random_crop is not None:
        raise ConfigError(
            f"{OPTION} stores one crop of each image, and --random_crop before cuts another one each time: leave one"
            " out"
        )
    larger = images.images.sizes - {images.size}
    if larger:
        height, width = min(larger)
        raise ConfigError(
            f"{OPTION} stores one crop of each image, and images of {height}x{width} are cropped to"
            f" {images.size[0]}x{images.size[1]} at random places: add --center_crop or --resize pad, or"
            f" leave {OPTION} out"
        )
    blank = encode(torch.zeros(1, *images.shape, device=device))
    _, channels, *size = blank.mean.shape
    name = name_of_key(key)
    layout = RecordFormat(name, 1 if blank.std is None else 2, (channels, size[0], size[1]), key["dtype"])
    smaller = "" if layout.dtype == "float16" else ", or halve it by --cache_latents_dtype float16"
    kind = CacheKind(OPTION, "image", "latent", "name another folder", f"name a folder on a larger disk{smaller}")
    folder = CacheFolder(parent, key, layout, len(images) * len(symmetries), kind)
    return CacheJob(folder, ImageEncoding(images, encode, device, layout, symmetries).records)


def _load(job: ImageEncoding, numbers: np.ndarray) -> Iterator[tuple[list[int], Tensor]]:
    """Numbers and pixels (b, C, H, W), on the device, a few at a time; the next ones are decoded meanwhile."""
    step = torch.get_num_threads() if job.device.type == "cpu" else 8
    chunks = [numbers[start : start + step].tolist() for start in range(0, len(numbers), step)]
    copies = len(job.symmetries)

    def load(chunk: list[int]) -> Tensor:
        levels = job.images.load_levels([number // copies for number in chunk]).values
        apply_symmetries(levels, torch.tensor([job.symmetries[number % copies] for number in chunk]))
        return levels

    with ThreadPoolExecutor(1) as pool:
        upcoming = None
        for index, chunk in enumerate(chunks):
            levels = load(chunk) if upcoming is None else upcoming.result()
            upcoming = pool.submit(load, chunks[index + 1]) if index + 1 < len(chunks) else None
            pixels = to_pixels(levels, job.images.images.pixel_format, job.device)
            yield chunk, pixels


def _record(job: ImageEncoding, number: int, posterior: Posterior) -> np.ndarray:
    layout = job.layout
    try:
        return layout.encode(number, posterior)
    except OverflowError as error:
        name = printable(job.images.name(number // len(job.symmetries)), 200)
        if layout.dtype == "float16" and posterior.mean.isfinite().all():
            raise ConfigError(
                f"--cache_latents_dtype float16: the latents of {name} reach {error}, more than float16 can hold: use"
                " float32"
            ) from None
        raise ConfigError(
            f"--vae: it encodes {name} as values that are not finite: its weights are damaged, or not for such images"
        ) from None

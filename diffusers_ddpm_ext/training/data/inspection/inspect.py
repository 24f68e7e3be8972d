"""Reading all images of a source once, in several threads, into a summary."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.data.array_images import AS_WRITTEN, ArrayReading, NonFiniteImage, UnreadableImage
from diffusers_ddpm_ext.training.data.image_files import Payload
from diffusers_ddpm_ext.training.data.image_scan import ImageSource
from diffusers_ddpm_ext.training.data.inspection.image_facts import ImageFacts, image_facts
from diffusers_ddpm_ext.training.data.inspection.summary import SetSummary

IMAGES_PER_BLOCK = 64
Result = TypeVar("Result")


def inspect_source(
    source: ImageSource, reading: ArrayReading = AS_WRITTEN, max_images: int | None = None, *, progress: bool = False
) -> SetSummary:
    """Read the images of a source.

    Args:
        source: the images.
        reading: how arrays are read.
        max_images: read at most so many of them, evenly spaced; None reads all.
        progress: show a progress bar if it takes longer than a second.
    """
    total = len(source.names)
    summary = SetSummary(source.option, total, reading)
    rows = evenly_spaced(total, total if max_images is None else max_images)
    with tqdm(total=len(rows), desc="reading images", unit="image", delay=1, leave=False, disable=not progress) as bar:
        for row, facts in read_in_threads(source, rows, partial(image_facts, reading=reading)):
            bar.update()
            if isinstance(facts, ImageFacts):
                summary.add(row, source.names[row], facts)
            elif isinstance(facts, NonFiniteImage):
                summary.not_finite.add(source.names[row], str(facts))
            else:
                summary.unreadable.add(source.names[row], str(facts))
    return summary


def read_in_threads(
    source: ImageSource, rows: Sequence[int], read: Callable[[Payload], Result]
) -> Iterator[tuple[int, Result | Exception]]:
    """Yield (row, result) in the order of the rows; in place of the result the reason why an image cannot be read."""

    def attempt(row: int) -> Result | Exception:
        try:
            return read(source.payload(row))
        except (UnreadableImage, ConfigError) as error:
            return error

    threads = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    pool = ThreadPoolExecutor(threads)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about large images and unusual metadata
            for start in range(0, len(rows), IMAGES_PER_BLOCK):
                block = rows[start : start + IMAGES_PER_BLOCK]
                yield from zip(block, pool.map(attempt, block), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)  # after an interrupt, what has not begun is not read


def evenly_spaced(total: int, count: int) -> Sequence[int]:
    """Numbers of at most ``count`` of ``total`` images, evenly spaced."""
    if count >= total:
        return range(total)
    places: list[int] = np.linspace(0, total - 1, count).round().astype(int).tolist()
    return places

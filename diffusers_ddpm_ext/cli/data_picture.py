"""The picture of `ddpm-ext data`: reads the images that it shows again, and draws them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffusers_ddpm_ext.errors import printable
from diffusers_ddpm_ext.plotting.data_sheet import COLUMNS, PAIRS, DataSheet, PicturePair, draw_data_sheet
from diffusers_ddpm_ext.training.data.inspection.duplicates import PictureReader, Place
from diffusers_ddpm_ext.training.data.inspection.histogram import coarsen
from diffusers_ddpm_ext.training.data.inspection.inspect import evenly_spaced, read_in_threads
from diffusers_ddpm_ext.training.data.inspection.report import Inspection

SAMPLES = 2 * COLUMNS
SIDE = 128
MAX_NAME = 18
COLORS, PICTURE_BINS, FEW_BINS = 4, 256, 64
"""Bins of a histogram of up to four channels, and of more, whose curves are many."""


def draw_inspection(name: str, inspection: Inspection, path: Path) -> None:
    """Draw an inspection with at least one readable image.

    Args:
        name: of the images.
        inspection: of them.
        path: PNG to write.
    """
    summary = inspection.summaries[0]
    statistics = summary.pixels.statistics[summary.pixels.main_kind]
    histogram = coarsen(
        statistics.histogram, PICTURE_BINS if summary.pixels.main_kind.channels <= COLORS else FEW_BINS
    )
    resolution = next((each.values for each in inspection.suggestions if each.flag == "resolution"), None)
    classes = inspection.classes[0] if inspection.classes else None
    sheet = DataSheet(
        title=f"{printable(name, 60)}: {summary.total:,} images",
        samples=list(_samples(inspection)),
        edges=histogram.edges,
        counts=histogram.counts,
        sizes=summary.sizes,
        resolution=None if resolution is None else (int(resolution[0]), int(resolution[-1])),
        classes=[]
        if classes is None
        else sorted(
            ((_short(each), count) for each, count in zip(classes.names, classes.train, strict=True)),
            key=lambda each: -each[1],
        ),
        class_title="" if classes is None else f"images per class ({printable(classes.name, 40)})",
        pairs=list(_pairs(inspection)),
    )
    draw_data_sheet(path, sheet)


def _samples(inspection: Inspection) -> Iterator[NDArray[np.float32]]:
    """Pictures of some training images, evenly spaced."""
    summary = inspection.summaries[0]
    rows = [summary.rows[place] for place in evenly_spaced(summary.num_readable, SAMPLES)]
    yield from _pictures(inspection, [Place(0, row) for row in rows]).values()


def _pairs(inspection: Inspection) -> Iterator[PicturePair]:
    """The first pairs of duplicates: those between training and validation, then near ones, then exact ones."""
    found = inspection.duplicates
    pairs = [(trained, held_out, "the same pixels") for held_out, trained in found.leaked[:PAIRS]]
    for pair in found.near[:PAIRS]:
        how = "mirrored, differ" if pair.is_mirrored else "differ"
        pairs.append((pair.first, pair.second, f"{how} by {pair.difference:.1%}"))
    in_one_set = [group for group in found.groups if group[0].set == group[1].set]
    pairs += [(group[0], group[1], "the same pixels") for group in in_one_set]
    pairs = pairs[:PAIRS]
    pictures = _pictures(inspection, [place for first, second, _ in pairs for place in (first, second)])
    for first, second, title in pairs:
        if first in pictures and second in pictures:
            names = (_short(inspection.name(first)), _short(inspection.name(second)))
            title = title if first.set == second.set else f"train, validation: {title}"
            yield PicturePair(pictures[first], pictures[second], title, names)


def _pictures(inspection: Inspection, places: list[Place]) -> dict[Place, NDArray[np.float32]]:
    """Small pictures of images; one that has become unreadable is left out."""
    pictures = {}
    for number, source in enumerate(inspection.sources):
        reader = PictureReader(inspection.summaries[number])
        rows = [place.row for place in places if place.set == number]
        for row, picture in read_in_threads(source, rows, partial(reader.picture, side=SIDE)):
            if not isinstance(picture, Exception):
                pictures[Place(number, row)] = picture
    return pictures


def _short(name: str) -> str:
    """A name that fits below a picture: its end."""
    text = printable(name, 200)
    return text if len(text) <= MAX_NAME else f"...{text[3 - MAX_NAME :]}"

"""What a set of images holds, added up image by image: some bytes per image stay, and nothing of its pixels."""

from __future__ import annotations

import os
from array import array
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from diffusers_ddpm_ext.training.data.array_images import AS_WRITTEN, ArrayReading
from diffusers_ddpm_ext.training.data.inspection.image_facts import ImageFacts, Kind, PixelStatistics
from diffusers_ddpm_ext.training.data.inspection.symmetry import SymmetryTest

MAX_NAMES = 100
"""Names that are kept of each kind of finding; all are counted."""


@dataclass
class Named:
    """How many images there are of a kind, and the names of the first ones, with a reason if there is one."""

    count: int = 0
    names: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, reason: str = "") -> None:
        """Count an image."""
        self.count += 1
        if len(self.names) < MAX_NAMES:
            self.names.append((name, reason))


@dataclass
class PixelSummary:
    """Kinds and values of the images of a set.

    Attributes:
        kinds: number of images of each kind.
        statistics: of the pixels of each kind.
        modes: number of images of each mode of Pillow.
        extensions: number of files with each extension, in lower case.
        traits: images that are animated, turned, transparent, ...
        symmetry: whether flipped and turned images belong to the set.
    """

    kinds: Counter[Kind] = field(default_factory=Counter)
    statistics: dict[Kind, PixelStatistics] = field(default_factory=dict)
    modes: Counter[str] = field(default_factory=Counter)
    extensions: Counter[str] = field(default_factory=Counter)
    traits: dict[str, Named] = field(default_factory=dict)
    symmetry: SymmetryTest = field(default_factory=SymmetryTest)

    def add(self, name: str, facts: ImageFacts) -> None:
        """Add an image."""
        kind = facts.kind
        self.kinds[kind] += 1
        self.modes[facts.mode] += 1
        self.extensions[os.path.splitext(name)[1].lower()] += 1
        before = self.statistics.get(kind)
        self.statistics[kind] = facts.statistics if before is None else before.merge(facts.statistics)
        for trait in facts.traits:
            self.traits.setdefault(trait, Named()).add(name)
        self.symmetry.add(facts.gray)

    @property
    def main_kind(self) -> Kind:
        """The most frequent kind."""
        return max(self.kinds, key=lambda kind: (self.kinds[kind], kind))

    def count_of(self, trait: str) -> int:
        """Number of images with a trait."""
        return self.traits[trait].count if trait in self.traits else 0


@dataclass
class SetSummary:
    """What a set of images holds.

    Attributes:
        option: what selected it, for messages.
        total: number of its images.
        reading: how its arrays are read.
        rows: which of them were read without a fault, (n,).
        heights: of these images, in pixels.
        widths: likewise.
        hashes: their perceptual hashes.
        mirrored_hashes: those of their mirror images.
        digests: hashes of their pixels, 16 bytes each.
        unreadable: images that cannot be read, with the reason.
        not_finite: images with NaN or infinity, and where.
        pixels: kinds and values.
    """

    option: str
    total: int
    reading: ArrayReading = AS_WRITTEN
    rows: array[int] = field(default_factory=lambda: array("q"))
    heights: array[int] = field(default_factory=lambda: array("I"))
    widths: array[int] = field(default_factory=lambda: array("I"))
    hashes: array[int] = field(default_factory=lambda: array("Q"))
    mirrored_hashes: array[int] = field(default_factory=lambda: array("Q"))
    digests: bytearray = field(default_factory=bytearray)
    unreadable: Named = field(default_factory=Named)
    not_finite: Named = field(default_factory=Named)
    pixels: PixelSummary = field(default_factory=PixelSummary)

    def add(self, row: int, name: str, facts: ImageFacts) -> None:
        """Add a readable image, which is number ``row`` of its source."""
        self.rows.append(row)
        self.heights.append(facts.size[0])
        self.widths.append(facts.size[1])
        self.hashes.append(facts.hash)
        self.mirrored_hashes.append(facts.mirrored_hash)
        self.digests += facts.digest
        self.pixels.add(name, facts)

    @property
    def num_read(self) -> int:
        """Number of images that were opened, readable or not."""
        return self.num_readable + self.unreadable.count + self.not_finite.count

    @property
    def num_readable(self) -> int:
        """Number of images that could be read."""
        return len(self.rows)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Heights and widths, (n, 2)."""
        return np.stack([np.array(self.heights, dtype=np.int64), np.array(self.widths, dtype=np.int64)], axis=1)

"""Images that a set has twice, and those that are both in the training and in the validation set.

Exact duplicates have the same pixels, in whatever file. Near duplicates are candidates by their perceptual hashes,
which are then compared as pictures of 32 x 32 pixels: flat images and simple shapes have similar hashes without being
similar.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from diffusers_ddpm_ext.training.data.image_files import Payload
from diffusers_ddpm_ext.training.data.image_scan import ImageSource
from diffusers_ddpm_ext.training.data.inspection.image_facts import DIGEST_BYTES
from diffusers_ddpm_ext.training.data.inspection.inspect import read_in_threads
from diffusers_ddpm_ext.training.data.inspection.perceptual_hash import SIDE, close_pairs
from diffusers_ddpm_ext.training.data.inspection.summary import MAX_NAMES, SetSummary
from diffusers_ddpm_ext.training.data.raw_image import RawImage, read_image

MAX_COMPARED = 2000
"""Candidates that are compared as pictures, the closest hashes first."""
MAX_DIFFERENCE, MAX_RELATIVE_DIFFERENCE = 0.05, 0.2
"""Root mean square of the difference of near duplicates: in units of the range, and of the contrast of the picture."""
FLAT = 1 / 255
"""Standard deviation of a picture, in units of the range, below which it shows nothing to compare."""


@dataclass(frozen=True)
class Place:
    """An image: the number of its set, 0 for training and 1 for validation, and its row there."""

    set: int
    row: int


@dataclass(frozen=True)
class NearPair:
    """Two images that look the same.

    Attributes:
        first: one of them.
        second: the other.
        bits: of 64 in which their hashes differ.
        difference: root mean square of the difference of their small pictures, in units of the range, 0 to 1.
        is_mirrored: whether one looks like the mirror image of the other.
    """

    first: Place
    second: Place
    bits: int
    difference: float
    is_mirrored: bool = False

    @property
    def crosses(self) -> bool:
        """Whether one is in the training set and the other in the validation set."""
        return self.first.set != self.second.set


@dataclass(frozen=True)
class Duplicates:
    """Images that occur more than once.

    Attributes:
        groups: images with the same pixels, the largest groups first; at most `MAX_NAMES` groups.
        num_copies: number of images of each set whose pixels an earlier image of that set has.
        leaked: validation images whose pixels a training image has, with that image; at most `MAX_NAMES`.
        num_leaked: number of all of these.
        near: pairs that look the same, the most similar first.
        near_complete: False if there were more candidates than were compared.
    """

    groups: Sequence[Sequence[Place]] = ()
    num_copies: Sequence[int] = (0, 0)
    leaked: Sequence[tuple[Place, Place]] = ()
    num_leaked: int = 0
    near: Sequence[NearPair] = field(default=())
    near_complete: bool = True


def find_duplicates(
    sources: Sequence[ImageSource], summaries: Sequence[SetSummary], *, progress: bool = False
) -> Duplicates:
    """Find duplicates within and between one or two sets: the training and the validation set."""
    numbers = np.concatenate([np.full(len(each.rows), which) for which, each in enumerate(summaries)])
    rows = np.concatenate([np.array(each.rows, dtype=np.int64) for each in summaries])
    digests = np.frombuffer(b"".join(bytes(each.digests) for each in summaries), dtype=f"V{DIGEST_BYTES}")
    if not len(rows):
        return Duplicates()
    places = _Places(numbers, rows)
    _, same = np.unique(digests.view(np.uint64).reshape(-1, 2), axis=0, return_inverse=True)
    same = same.ravel()
    groups, copies, leaked = _exact(places, same)
    candidates, complete = _candidates(summaries, same)
    crossing_first = np.argsort(numbers[candidates.pairs[:, 0]] == numbers[candidates.pairs[:, 1]], kind="stable")
    chosen = candidates.select(crossing_first[:MAX_COMPARED])
    near = _compare(sources, summaries, places, chosen, progress)
    complete = complete and len(candidates.pairs) <= MAX_COMPARED
    return Duplicates(groups, copies, leaked[:MAX_NAMES], len(leaked), near, complete)


@dataclass(frozen=True)
class _Candidates:
    """Pairs of images, (P, 2), bits in which their hashes differ, (P,), and whether one is mirrored, (P,)."""

    pairs: NDArray[np.int64]
    bits: NDArray[np.int64]
    mirrored: NDArray[np.bool_]

    def select(self, rows: NDArray[np.int64]) -> _Candidates:
        """Some of the pairs."""
        return _Candidates(self.pairs[rows], self.bits[rows], self.mirrored[rows])


def _candidates(summaries: Sequence[SetSummary], same: NDArray[np.int64]) -> tuple[_Candidates, bool]:
    """Pairs of images of other pixels, the closest first; and whether these are all.

    Mirror images are found as pairs of an image and another one's mirror image, each by its hash.
    """
    hashes = np.concatenate([np.array(each.hashes, dtype=np.uint64) for each in summaries])
    mirrored = np.concatenate([np.array(each.mirrored_hashes, dtype=np.uint64) for each in summaries])
    found = close_pairs(np.concatenate([hashes, mirrored]))
    count = len(hashes)
    first, second = found.pairs[:, 0], found.pairs[:, 1] - count
    is_mirrored = (first < count) & (second > first)  # the other half says the same
    is_plain = second < 0
    pairs = np.concatenate([found.pairs[is_plain], np.stack([first, second], axis=1)[is_mirrored]])
    bits = np.concatenate([found.bits[is_plain], found.bits[is_mirrored]])
    flags = np.arange(len(pairs)) >= is_plain.sum()
    _, once = np.unique(pairs, axis=0, return_index=True)  # of a symmetric image, both are found
    kept = np.sort(once)[same[pairs[np.sort(once), 0]] != same[pairs[np.sort(once), 1]]]
    kept = kept[np.argsort(bits[kept], kind="stable")]
    return _Candidates(pairs[kept], bits[kept], flags[kept]), found.complete


@dataclass(frozen=True)
class _Places:
    """Set and row of each image, (N,) each."""

    sets: NDArray[np.int64]
    rows: NDArray[np.int64]

    def __getitem__(self, number: int) -> Place:
        return Place(int(self.sets[number]), int(self.rows[number]))


def _exact(
    places: _Places, same: NDArray[np.int64]
) -> tuple[list[list[Place]], tuple[int, int], list[tuple[Place, Place]]]:
    """Groups of images with the same pixels, number of copies in each set, and validation images to train on."""
    order = np.argsort(same, kind="stable")
    _, starts, counts = np.unique(same[order], return_index=True, return_counts=True)
    groups, leaked, copies = [], [], [0, 0]
    for which in np.flatnonzero(counts > 1):
        members = order[starts[which] : starts[which] + counts[which]]
        in_set = [members[places.sets[members] == number] for number in (0, 1)]
        for number in (0, 1):
            copies[number] += max(0, len(in_set[number]) - 1)
        if len(in_set[0]):
            leaked += [(places[int(other)], places[int(in_set[0][0])]) for other in in_set[1]]
        groups.append([places[int(member)] for member in members[:MAX_NAMES]])
    groups.sort(key=len, reverse=True)
    leaked.sort(key=lambda pair: pair[0].row)
    return groups[:MAX_NAMES], (copies[0], copies[1]), leaked


def _compare(
    sources: Sequence[ImageSource],
    summaries: Sequence[SetSummary],
    places: _Places,
    candidates: _Candidates,
    progress: bool,
) -> list[NearPair]:
    """Read the candidates again and keep the pairs that look the same."""
    pictures: dict[Place, NDArray[np.float32]] = {}
    wanted = {places[int(number)] for number in candidates.pairs.ravel()}
    with tqdm(total=len(wanted), desc="comparing", unit="image", delay=1, leave=False, disable=not progress) as bar:
        for number, source in enumerate(sources):
            reader = PictureReader(summaries[number])
            rows = sorted(place.row for place in wanted if place.set == number)
            for row, picture in read_in_threads(source, rows, reader.small):
                bar.update()
                if not isinstance(picture, Exception):  # it may have become unreadable
                    pictures[Place(number, row)] = picture
    found = []
    columns = (candidates.pairs.tolist(), candidates.bits.tolist(), candidates.mirrored.tolist())
    for (one, other), bits, is_mirrored in zip(*columns, strict=True):
        first, second = places[one], places[other]
        if first in pictures and second in pictures:
            moved = pictures[second][:, ::-1] if is_mirrored else pictures[second]
            difference = _difference(pictures[first], moved)
            if difference is not None:
                found.append(NearPair(first, second, bits, difference, is_mirrored))
    return sorted(found, key=lambda pair: (not pair.crosses, pair.difference))


def _difference(one: NDArray[np.float32], other: NDArray[np.float32]) -> float | None:
    """How much two pictures differ; None if they do not look the same."""
    difference = float(np.sqrt(np.mean((one - other) ** 2)))
    contrast = float(min(one.std(), other.std()))
    if contrast < FLAT:
        return None
    return difference if difference <= min(MAX_DIFFERENCE, MAX_RELATIVE_DIFFERENCE * contrast) else None


class PictureReader:
    """Makes pictures of three colors in 0 to 1 of images of any kind, by the range of values of their set."""

    def __init__(self, summary: SetSummary) -> None:
        self._reading = summary.reading
        self._ranges = {}
        for kind, statistics in summary.pixels.statistics.items():
            is_bytes = kind.dtype == "uint8"
            self._ranges[kind.dtype] = (0.0, 255.0) if is_bytes else (statistics.low, statistics.high)

    def picture(self, payload: Payload, side: int) -> NDArray[np.float32]:
        """An image, scaled down if it is larger than ``side`` pixels high or wide, (h, w, 3), in 0 to 1.

        Raises:
            UnreadableImage: as `read_image`.
            UnsupportedImage: as `read_image`.
        """
        colors = self._colors(read_image(payload, self._reading))
        height, width = colors.shape[:2]
        scale = min(1.0, side / max(height, width))
        return _resized(colors, (max(1, round(width * scale)), max(1, round(height * scale))))

    def small(self, payload: Payload) -> NDArray[np.float32]:
        """An image at 32 x 32 pixels, to compare it."""
        return _resized(self._colors(read_image(payload, self._reading)), (SIDE, SIDE))

    def _colors(self, raw: RawImage) -> NDArray[np.float32]:
        """Three channels in 0 to 1, (H, W, 3), float32; transparency over white."""
        values = raw.values
        low, high = self._ranges.get(values.dtype.name, (0.0, 1.0))
        with np.errstate(invalid="ignore", over="ignore"):
            scaled = (values.astype(np.float32) - low) / max(high - low, 1e-30)
        scaled = np.nan_to_num(scaled, nan=0.0).clip(0, 1).astype(np.float32)
        if raw.has_alpha:
            return scaled[..., :3] * scaled[..., 3:] + (1 - scaled[..., 3:])
        return scaled[..., :3] if scaled.shape[2] >= 3 else scaled[..., :1].repeat(3, axis=2)


def _resized(colors: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """An array (H, W, 3) at another width and height, antialiased."""
    if colors.shape[1::-1] == size:
        return colors
    filter = Image.Resampling.BILINEAR
    channels = [Image.fromarray(colors[..., channel]).resize(size, filter, reducing_gap=3.0) for channel in range(3)]
    return np.stack([np.asarray(channel) for channel in channels], axis=2)

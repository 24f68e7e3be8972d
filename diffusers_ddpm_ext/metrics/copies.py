"""Copies of training images among samples, by the ratio of the distances to the two nearest training images.

    d1, d2     distances of a sample to its nearest training image, and to the next one that is another image
    ratio      d1 / d2: about 1 for a new image, which is about as far from several, and near 0 for a copy

A sample counts as a copy where its ratio is at most the threshold, which about 1 % of the held-out images are below.
These are no copies, so that this share is what chance gives: as the j-th smallest of K ratios the threshold has a
chance distributed like Beta(j, K + 1 - j), whatever the images are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from diffusers_ddpm_ext.metrics.distances import BLOCK_ENTRIES, distance_blocks
from diffusers_ddpm_ext.metrics.intervals import (
    Estimate,
    Features,
    checked_confidence,
    checked_features,
    checked_pair,
    wilson,
)

CHANCE = 0.01
"""Share of the held-out images below the threshold."""
NEIGHBORS = 8
"""Nearest training images among which the second one is found that is not the nearest one again."""
SAME = 1e-6
"""Distance of two features, relative to their norm, up to which they are of one image."""


@dataclass(frozen=True)
class Neighbors:
    """The two nearest training images of images.

    Attributes:
        nearest: number of the nearest one, (N,), int64.
        second: number of the next one that is not a duplicate of it, (N,), int64.
        ratio: of the distances to them, (N,), in [0, 1].
    """

    nearest: np.ndarray
    second: np.ndarray
    ratio: np.ndarray


@dataclass(frozen=True)
class CopyRate:
    """How many samples are copies of training images.

    Attributes:
        rate: share of the samples that count as copies, with its interval.
        chance: the same of held-out images, with the interval of what it may be for other ones.
        threshold: ratio up to which an image counts as a copy.
        samples: the samples' neighbors.
        held_out: the held-out images' neighbors.
    """

    rate: Estimate
    chance: Estimate
    threshold: float
    samples: Neighbors
    held_out: Neighbors

    @property
    def memorizes(self) -> bool:
        """Whether more samples are copies than chance gives, beyond both intervals."""
        return self.rate.low > self.chance.high


def nearest_training_images(images: Features, training: Features) -> Neighbors:
    """The two nearest training images of each image, and the ratio of the distances.

    Args:
        images: features, (N, D).
        training: features, (M, D), M at least 4.

    Raises:
        ValueError: not such features.
    """
    x, train = checked_features("images", images, at_least=1), checked_features("training", training)
    if x.shape[1] != train.shape[1]:
        raise ValueError(
            f"images has {x.shape[1]} features an image and training {train.shape[1]}: take one extractor."
        )
    center = train.mean(axis=0)
    x, train = x - center, train - center
    count = min(NEIGHBORS, len(train))
    rows: list[np.ndarray] = []
    for block, squared in distance_blocks(x, train):
        near = np.argpartition(squared, count - 1, axis=1)[:, :count]
        step = max(1, BLOCK_ENTRIES // (count * x.shape[1]))
        rows += [
            _exact_neighbors(x[block][start : start + step], train, near[start : start + step])
            for start in range(0, len(near), step)
        ]
    nearest, second, ratio = np.concatenate(rows, axis=1)
    return Neighbors(nearest.astype(np.int64), second.astype(np.int64), ratio)


def _exact_neighbors(x: np.ndarray, train: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Nearest, second and ratio of images, (3, b), by the exact distances of some of the training images.

    The distances of whole blocks are rounded, which would hide that a copy is at distance 0.
    """
    exact = np.linalg.norm(train[near] - x[:, None], axis=2)
    order = np.argsort(exact, axis=1, kind="stable")
    near, exact = np.take_along_axis(near, order, axis=1), np.take_along_axis(exact, order, axis=1)
    first = train[near[:, :1]]
    apart = np.linalg.norm(train[near] - first, axis=2) > SAME * np.linalg.norm(first, axis=2)
    other = np.where(apart.any(axis=1), apart.argmax(axis=1), near.shape[1] - 1)
    rows = np.arange(len(x))
    with np.errstate(invalid="ignore"):
        ratio = np.where(exact[:, 0] > 0, exact[:, 0] / exact[rows, other], 0.0)
    return np.stack([near[:, 0], near[rows, other], ratio])


def estimate_copies(samples: Features, training: Features, held_out: Features, confidence: float = 0.95) -> CopyRate:
    """The share of samples that are copies of training images, against what chance gives.

    Args:
        samples: features, (N, D).
        training: features of training images, (M, D), M at least 4.
        held_out: features of images that the model was not trained on, (K, D), K at least 4.
        confidence: of the intervals.

    Raises:
        ValueError: not such features, or no such confidence.
    """
    from scipy.special import betaincinv, ndtri  # not at the top: SciPy comes with the extra ``train``

    confidence = checked_confidence(confidence)
    checked_pair(samples, held_out)
    drawn, unseen = nearest_training_images(samples, training), nearest_training_images(held_out, training)
    count = len(unseen.ratio)
    rank = max(1, round(CHANCE * count))
    threshold = float(np.sort(unseen.ratio)[rank - 1])
    rate, chance = float((drawn.ratio <= threshold).mean()), float((unseen.ratio <= threshold).mean())
    rank = round(chance * count)  # of the last one of equal ratios
    low, high = (float(betaincinv(rank, count + 1 - rank, p)) for p in ((1 - confidence) / 2, (1 + confidence) / 2))
    interval = wilson(rate, len(drawn.ratio), float(ndtri((1 + confidence) / 2)))
    return CopyRate(
        Estimate(rate, *interval, math.sqrt(rate * (1 - rate) / len(drawn.ratio))),
        Estimate(chance, min(low, chance), max(high, chance), math.sqrt(chance * (1 - chance) / count)),
        threshold,
        drawn,
        unseen,
    )

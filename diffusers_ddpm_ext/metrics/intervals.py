"""Confidence intervals of sample metrics, by resampling without replacement.

A bootstrap, which draws with replacement, puts images beside copies of themselves, neighbors at distance 0: it is
wrong for every metric of this folder. Two methods take its place; in both, samples and reference images are resampled
together, so that an interval also has what the choice of reference images contributes.

Jackknife, for distances (Shao and Tu, The Jackknife and Bootstrap, 1995). ``theta`` is the metric of all images,
``theta_-g`` that without group g of the samples and group g of the reference images, one of G groups. The variance of
``theta`` is about ``(G - 1) / G * sum_g (theta_-g - mean)^2``, its bias to first order in 1/N ``(G - 1) (mean -
theta)``; Student's t has G - 1 degrees of freedom.

Halves, for metrics of nearest neighbors, whose variance the jackknife overstates. R times, both sets are divided into
random halves, with ``theta_a`` and ``theta_b``. The variance of such a metric falls as 1/N, so that of ``theta`` is
about half the mean of ``(theta_a - theta_b)^2 / 2``; Student's t has R degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from diffusers_ddpm_ext.utils.checks import checked_number, describe

NUM_GROUPS = 20
NUM_SPLITS = 20
Features = np.ndarray | Tensor
"""Features of images, (N, D)."""


@dataclass(frozen=True)
class Estimate:
    """A metric with its confidence interval.

    Attributes:
        value: the metric.
        low: lower end of the interval.
        high: upper end of the interval.
        standard_error: standard deviation of the value over other samples and reference images of these numbers.
    """

    value: float
    low: float
    high: float
    standard_error: float

    def clipped(self, low: float = -math.inf, high: float = math.inf) -> Estimate:
        """The same with its interval inside the values that the metric can have."""
        return replace(self, low=min(max(self.low, low), high), high=min(max(self.high, low), high))


def checked_features(name: str, features: Features, at_least: int = 4) -> np.ndarray:
    """Features as float64 (N, D).

    Raises:
        ValueError: they are not a finite array of real numbers of this shape, or fewer than ``at_least``.
    """
    array = np.asarray(features.detach().cpu().double() if isinstance(features, Tensor) else features)
    if array.ndim != 2 or array.dtype.kind not in "fiub" or array.shape[1] == 0:
        raise ValueError(f"{name}={describe(features)} must be features of images: (N, D), real numbers.")
    if len(array) < at_least:
        raise ValueError(f"{name} has the features of {len(array)} images: at least {at_least} are needed.")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
        raise ValueError(f"{name} must be finite: the features of image {row} are not.")
    return array


def checked_pair(samples: Features, reference: Features, at_least: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Features of samples and of reference images as float64; ValueError as `checked_features`, or of two widths."""
    x, y = checked_features("samples", samples, at_least), checked_features("reference", reference, at_least)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"samples has {x.shape[1]} features an image and reference {y.shape[1]}: take one extractor.")
    return x, y


def checked_confidence(confidence: float) -> float:
    """A confidence between 0 and 1, else ValueError."""
    return checked_number("confidence", confidence, "between 0 and 1", lambda value: 0 < value < 1)


def random_groups(count: int, num_groups: int, seed: int) -> np.ndarray:
    """The group of each image, (count,), of equal sizes up to one; at random, since images may be sorted by class."""
    return np.random.default_rng(seed).permutation(count) % num_groups


def t_quantile(confidence: float, degrees: int) -> float:
    """Half the width of a two-sided interval in standard errors, by Student's t."""
    from scipy.special import stdtrit  # not at the top: SciPy comes with the extra ``train``

    return float(stdtrit(degrees, (1 + confidence) / 2))


def jackknife(value: float, without: np.ndarray, confidence: float) -> Estimate:
    """A metric with the interval of what it is on average over other images, of the same numbers.

    Args:
        value: of all images.
        without: of all but one group, for each of the groups, (G,).
        confidence: of the interval.
    """
    groups = len(without)
    error = math.sqrt((groups - 1) / groups * float(((without - without.mean()) ** 2).sum()))
    width = t_quantile(confidence, groups - 1) * error
    return Estimate(value, value - width, value + width, error)


def extrapolated(value: float, without: np.ndarray, confidence: float) -> Estimate:
    """A metric extrapolated to infinitely many images, from its values at N and N (1 - 1/G); arguments of `jackknife`.

    It is unbiased up to 1/N^2 where the bias is a constant over N.
    """
    groups = len(without)
    return jackknife(groups * value - (groups - 1) * float(without.mean()), without, confidence)


def random_halves(count: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Numbers of the images in each half of a random division, `NUM_SPLITS` times."""
    generator = np.random.default_rng(seed)
    for _ in range(NUM_SPLITS):
        order = generator.permutation(count)
        yield order[: count // 2], order[count // 2 :]


def from_halves(value: float, halves: np.ndarray, confidence: float) -> Estimate:
    """A metric with the interval of what it is on average over other images, of the same numbers.

    Args:
        value: of all images.
        halves: of the halves of each division, (R, 2).
        confidence: of the interval.
    """
    error = math.sqrt(float(((halves[:, 0] - halves[:, 1]) ** 2).mean()) / 4)
    width = t_quantile(confidence, len(halves)) * error
    return Estimate(value, value - width, value + width, error)


def proportion_from_halves(value: float, halves: np.ndarray, count: int, confidence: float) -> Estimate:
    """A share of images with Wilson's interval, at the number of independent images that its halves vary like.

    Unlike the plain interval it has a width where all images agree, and lies in [0, 1].

    Args:
        value: the share among all images.
        halves: among those of the halves of each division, (R, 2).
        count: number of images that it is the share of: the number of independent ones where all halves agree.
        confidence: of the interval.
    """
    variance, mean = from_halves(value, halves, confidence).standard_error ** 2, float(halves.mean())
    effective = count if variance == 0 else mean * (1 - mean) / variance
    low, high = wilson(value, effective, t_quantile(confidence, len(halves)))
    return Estimate(value, low, high, math.sqrt(value * (1 - value) / effective))


def wilson(value: float, count: float, quantile: float) -> tuple[float, float]:
    """Wilson's interval of a share of ``count`` independent images, half as wide as ``quantile`` standard errors."""
    z2 = quantile**2
    center = (value + z2 / (2 * count)) / (1 + z2 / count)
    width = math.sqrt(z2 * (value * (1 - value) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return max(0.0, min(center - width, value)), min(1.0, max(center + width, value))

"""Do flipped and turned images belong to a set: a statistical answer for ``--random_flip`` and its like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from diffusers_ddpm_ext.training.data.inspection.perceptual_hash import SIDE

Gray = NDArray[np.float64]
MOVES: dict[str, Callable[[Gray], Gray]] = {
    "random_flip": lambda image: image[:, ::-1],
    "vertical_flip": lambda image: image[::-1],
    "rotate90": lambda image: np.rot90(image),
}
"""Flag of `ddpm-ext train` -> what it does to an image."""
MIN_IMAGES = {"random_flip": 20, "vertical_flip": 100, "rotate90": 100}
"""Fewer images give no answer; most sets have an upper side, so that more are needed to say that one has none."""
MAX_EFFECT = {"random_flip": 0.15, "vertical_flip": 0.04, "rotate90": 0.04}
"""Differences that do no harm. Mirrored pictures are plausible where they differ a little; turned ones seldom are."""
ROUNDING = 1e-3
"""Differences below this, in standard deviations of a picture, are errors of rounding: of a centered circle."""
SIGNIFICANT = 3.0
"""Standard errors beyond which chance does not explain a difference."""
SIGNIFICANT_MEAN = 1.8
"""The same for the root mean square over the pixels of a picture, whose errors partly cancel."""


@dataclass
class Sums:
    """Sum and sum of squares of values that arrive one by one, of any shape."""

    values: Gray
    squares: Gray

    def add(self, value: Gray | float) -> None:
        """Add a value."""
        self.values += value
        self.squares += np.square(value)

    def effect(self, count: int) -> float:
        """Root mean square of the mean, in standard deviations: 0 where the mean is 0, at most 1."""
        noise = self.values.size * (ROUNDING * max(count, 1)) ** 2
        return float(np.sqrt(np.square(self.values).sum() / max(count * self.squares.sum(), noise)))


def _pixel_sums() -> dict[str, Sums]:
    return {name: Sums(np.zeros((SIDE, SIDE)), np.zeros((SIDE, SIDE))) for name in MOVES}


@dataclass
class SymmetryTest:
    """Compares images with flipped and turned ones, by measures whose mean is zero where both are equally likely.

    One is the difference of each pixel from that of the moved image, in gray at 32 x 32 pixels: digits, organs and
    landscapes have more ink on one side. The others are means of the gradients: a flip changes the sign of the product
    of both directions (handwriting leans), a quarter turn also that of the difference of their squares (horizons).
    """

    count: int = 0
    pixels: dict[str, Sums] = field(default_factory=_pixel_sums)
    slant: Sums = field(default_factory=lambda: Sums(np.zeros(1), np.zeros(1)))
    direction: Sums = field(default_factory=lambda: Sums(np.zeros(1), np.zeros(1)))

    def add(self, gray: NDArray[np.float32]) -> None:
        """Add an image, (32, 32); its brightness and contrast do not matter."""
        values = gray.astype(np.float64)
        spread = float(values.std())
        if not spread > 0:
            return
        values = (values - values.mean()) / spread
        for name, move in MOVES.items():
            self.pixels[name].add(values - move(values))
        down, right = np.gradient(values)
        vertical, horizontal = float(np.vdot(down, down)), float(np.vdot(right, right))
        self.slant.add(float(np.vdot(down, right)) / (vertical + horizontal))
        self.direction.add((vertical - horizontal) / (vertical + horizontal))
        self.count += 1

    def asymmetry(self, name: str) -> float:
        """The largest measure of a move, in standard deviations: 0 where moved images are as likely as others."""
        gradients = [self.slant, self.direction] if name == "rotate90" else [self.slant]
        return max(sums.effect(self.count) for sums in (self.pixels[name], *gradients))

    def fits(self, name: str) -> bool | None:
        """Whether moved images belong to the set; None for too few images to tell."""
        if self.count < MIN_IMAGES[name]:
            return None
        error, harmless = 1 / np.sqrt(self.count), MAX_EFFECT[name]
        chance = SIGNIFICANT if name == "random_flip" else SIGNIFICANT_MEAN
        return bool(
            self.pixels[name].effect(self.count) <= max(harmless, chance * error)
            and self.asymmetry(name) <= max(harmless, SIGNIFICANT * error)
        )

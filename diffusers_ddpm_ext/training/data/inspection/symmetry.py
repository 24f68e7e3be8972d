"""Do mirror images belong to a set: a statistical answer for ``--random_flip``."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from diffusers_ddpm_ext.training.data.inspection.perceptual_hash import SIDE

MIN_IMAGES = 20
MAX_EFFECT = 0.15
SIGNIFICANT = 3.0
"""Standard errors beyond which chance does not explain a difference."""


@dataclass
class MirrorTest:
    """Compares images with their mirror images, by two measures whose mean is zero where both are equally likely.

    One is the difference of each pixel from its mirror pixel, in gray at 32 x 32 pixels: digits, or organs, have more
    ink on one side. The other is the mean slant, the product of the horizontal and the vertical gradient:
    handwriting leans to one side.
    """

    count: int = 0
    slants: list[float] = field(default_factory=lambda: [0.0, 0.0])  # sum, sum of squares
    sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros((SIDE, SIDE)))
    squares: NDArray[np.float64] = field(default_factory=lambda: np.zeros((SIDE, SIDE)))

    def add(self, gray: NDArray[np.float32]) -> None:
        """Add an image, (32, 32); its brightness and contrast do not matter."""
        values = gray.astype(np.float64)
        spread = float(values.std())
        if not spread > 0:
            return
        values = (values - values.mean()) / spread
        difference = values - values[:, ::-1]
        down, right = np.gradient(values)
        slant = float((down * right).sum() / (down**2 + right**2).sum())
        self.count += 1
        self.sums += difference
        self.squares += difference**2
        self.slants[0] += slant
        self.slants[1] += slant**2

    @property
    def effects(self) -> tuple[float, float]:
        """Means of the two measures in their standard deviations; 0 where mirror images are equally likely."""
        count = max(self.count, 1)
        differences = float(np.sqrt((self.sums**2).sum() / max(count * self.squares.sum(), 1e-300)))
        slant = abs(self.slants[0]) / np.sqrt(max(count * self.slants[1], 1e-300))
        return differences, float(slant)

    @property
    def mirrors_belong(self) -> bool | None:
        """Whether no difference was found; None for too few images to tell."""
        if self.count < MIN_IMAGES:
            return None
        limit = max(MAX_EFFECT, SIGNIFICANT / np.sqrt(self.count))
        return bool(max(self.effects) <= limit)

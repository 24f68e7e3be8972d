"""Which timesteps the columns of a row of images belong to: of the diffusion of an image, and of its denoising."""

from __future__ import annotations

import math
from collections.abc import Sequence

COLUMNS = 10  # about this many images per row, for any number of steps


def column_interval(steps: int) -> int:
    """Number of steps between two images of a row, for about ten columns."""
    return max(1, math.ceil(steps / COLUMNS))


def diffusion_timesteps(num_train_timesteps: int, log_every_t: int | None = None) -> list[int]:
    """Timesteps of a row of the diffusion: 0, n, 2 n, ... and the last one; None for n gives about ten columns."""
    interval = log_every_t or column_interval(num_train_timesteps)
    return [*range(0, num_train_timesteps - 1, interval), num_train_timesteps - 1]


def denoising_timesteps(timesteps: Sequence[int]) -> list[int]:
    """Timesteps of the reverse steps after which a row of the denoising has an image; before them it has the noise.

    Args:
        timesteps: of the sampler, descending.
    """
    interval, last = column_interval(len(timesteps)), len(timesteps) - 1
    return [t for i, t in enumerate(timesteps) if (last - i) % interval == 0 or i == 0]

"""Plot of the gap between the losses of training and of held-out images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from numpy.typing import ArrayLike

from diffusers_ddpm_ext.plotting.chain import BITS, STEP
from diffusers_ddpm_ext.plotting.curves import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_gap(
    path: str | os.PathLike[str],
    timesteps: ArrayLike,
    training: ArrayLike,
    held_out: ArrayLike,
    gap: ArrayLike,
    low: ArrayLike,
    high: ArrayLike,
) -> Path:
    """Plot how much larger the bound's term is at each step for held-out images than for training images, as PNG.

    Args:
        path: the file.
        timesteps: (K,).
        training: term of training images, (K,), bits per dimension.
        held_out: term of held-out images, (K,).
        gap: their difference, (K,), with its interval.
        low: lower end, (K,).
        high: upper end, (K,).
    """

    def draw(axes: Axes) -> None:
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.fill_between(timesteps, low, high, color="#c44e52", alpha=0.2, linewidth=0)
        axes.plot(timesteps, gap, color="#c44e52", marker="o", markersize=3, label="held-out minus training")
        axes.plot(timesteps, training, color="#4c72b0", linestyle="--", linewidth=1, label="training images")
        axes.plot(timesteps, held_out, color="0.35", linestyle=":", linewidth=1.4, label="held-out images")
        axes.set(title="Loss of training and held-out images", xlabel=STEP, ylabel=f"term of the bound ({BITS})")

    return save_figure(path, draw)

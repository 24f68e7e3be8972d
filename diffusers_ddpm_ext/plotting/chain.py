"""Plots over the steps of a chain: schedule, loss weights, terms of the bound, reverse variance, chosen timesteps."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from diffusers_ddpm_ext.diffusion.schedule import NoiseSchedule
from diffusers_ddpm_ext.plotting.curves import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Distinguishable in black and white, too.
STYLES = (("#c44e52", "-"), ("#4c72b0", "--"), ("#2a7f3f", "-."), ("0.35", ":"))
STEP = "timestep t"
BITS = "bits per dimension"


def plot_schedule(path: str | os.PathLike[str], schedule: NoiseSchedule) -> Path:
    """Plot the betas and the signal-to-noise ratio of a chain as PNG, both on logarithmic axes."""
    steps = np.arange(len(schedule))
    with np.errstate(divide="ignore"):
        snr = np.where(schedule.snr > 0, schedule.snr, np.nan)

    def draw(axes: Axes) -> None:
        axes.plot(steps, schedule.betas, color=STYLES[0][0], linestyle=STYLES[0][1], label="beta (variance, left)")
        axes.set_yscale("log")
        axes.set(title=f"Noise schedule, T = {len(schedule)}", xlabel=STEP, ylabel="beta (variance added by a step)")
        other = axes.twinx()
        other.plot(steps, snr, color=STYLES[1][0], linestyle=STYLES[1][1], label="SNR (right)")
        other.axhline(1, color="0.7", linewidth=0.8)
        other.set_yscale("log")
        other.set_ylabel("signal-to-noise ratio (power)")
        other.spines["top"].set_visible(False)
        axes.plot([], [], color=STYLES[1][0], linestyle=STYLES[1][1], label="SNR (right)")

    return save_figure(path, draw)


def plot_weights(path: str | os.PathLike[str], weights: Mapping[str, ArrayLike], prediction_type: str) -> Path:
    """Plot weights by name, (T,) each, over the steps, relative to their mean; ValueError if there are none.

    ``prediction_type`` is their space. Infinite weights are left out.
    """
    if not weights:
        raise ValueError("plot_weights needs at least one table of weights.")

    def draw(axes: Axes) -> None:
        for (name, table), (ink, dash) in zip(weights.items(), _styles(len(weights)), strict=True):
            values = np.asarray(table, dtype=float)
            values = np.where(np.isfinite(values) & (values > 0), values, np.nan)
            axes.plot(values / np.nanmean(values), color=ink, linestyle=dash, linewidth=1.4, label=name)
        axes.set_yscale("log")
        axes.set(
            title=f"Weight of a step's squared {prediction_type} error",
            xlabel=STEP,
            ylabel="weight, relative to its mean",
        )

    return save_figure(path, draw)


def plot_steps(path: str | os.PathLike[str], steps: ArrayLike, bits: ArrayLike, total: float | None = None) -> Path:
    """Plot the terms of the bound, (K,), bits per dimension, at the steps of a chain; the first is the decoder's.

    ``total`` is the bound, for the title.
    """
    timesteps, values = np.asarray(steps), np.asarray(bits, dtype=float)

    def draw(axes: Axes) -> None:
        axes.plot(timesteps[1:], values[1:], ".-", color=STYLES[0][0], markersize=3, linewidth=0.8, label="divergence")
        axes.plot(timesteps[:1], values[:1], "s", color=STYLES[1][0], label=f"decoder, at t = {timesteps[0]}")
        positive = values[values > 0]
        if len(positive) and positive.max() > 5 * positive.min():
            if (values <= 0).any():
                axes.set_yscale("symlog", linthresh=positive.min())
            else:
                axes.set_yscale("log")
        text = "" if total is None else f": {total:.3f} {BITS} with the prior"
        axes.set(title=f"The bound, step by step{text}", xlabel=STEP, ylabel=f"{BITS}, of one step")

    return save_figure(path, draw)


def plot_variance(path: str | os.PathLike[str], curves: Mapping[str, ArrayLike]) -> Path:
    """Plot curves of v by name, (T,) each, between 0 (the posterior's variance) and 1 (beta)."""

    def draw(axes: Axes) -> None:
        for level, label in ((0, "v = 0: fixed_small, the posterior's"), (1, "v = 1: fixed_large, beta")):
            axes.axhline(level, color="0.35", linewidth=1, linestyle=(":", "--")[level], label=label)
        for (name, table), (ink, dash) in zip(curves.items(), _styles(len(curves)), strict=True):
            axes.plot(np.asarray(table, dtype=float), color=ink, linestyle=dash, linewidth=1.4, label=name)
        axes.set(
            title="Variance of a reverse step", xlabel=STEP, ylabel="v (fraction of the way from posterior to beta)"
        )
        axes.set_ylim(-0.05, 1.05)

    return save_figure(path, draw)


def plot_timesteps(
    path: str | os.PathLike[str], chosen: Mapping[int, Sequence[int]], num_train_timesteps: int
) -> Path:
    """Plot the chosen timesteps for each number of steps K, one row of dots for each."""

    def draw(axes: Axes) -> None:
        for count, steps in sorted(chosen.items()):
            label = "chosen step" if count == min(chosen) else None
            axes.plot(steps, [count] * len(steps), ".", color=STYLES[1][0], markersize=3, label=label)
        axes.set(
            title="The steps that make the bound least",
            xlabel=f"{STEP} (of 0 to {num_train_timesteps - 1})",
            ylabel="number of steps K",
        )

    return save_figure(path, draw)


def _styles(count: int) -> list[tuple[str, str]]:
    return [STYLES[i % len(STYLES)] for i in range(count)]

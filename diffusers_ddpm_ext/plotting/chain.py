"""Plots over the steps of a chain: schedule, loss weights, terms of the bound, reverse variance, chosen timesteps."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffusers_ddpm_ext.diffusion.schedule import NoiseSchedule
from diffusers_ddpm_ext.plotting.curves import MAX_DRAWN, is_drawable, save_figure, thin

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Distinguishable in black and white, too.
STYLES = (("#c44e52", "-"), ("#4c72b0", "--"), ("#2a7f3f", "-."), ("0.35", ":"))
STEP = "timestep t"
BITS = "bits per dimension"


def plot_schedule(path: str | os.PathLike[str], schedule: NoiseSchedule) -> Path:
    """Plot the betas and the signal-to-noise ratio of a chain as PNG, both on logarithmic axes."""
    steps = np.arange(len(schedule))
    betas, snr = (_positive(table) for table in (schedule.betas, schedule.snr))

    def draw(axes: Axes) -> None:
        axes.plot(*thin(steps, betas), color=STYLES[0][0], linestyle=STYLES[0][1], label="beta (variance, left)")
        _set_log_scale(axes, betas)
        axes.set(title=f"Noise schedule, T = {len(schedule)}", xlabel=STEP, ylabel="beta (variance added by a step)")
        other = axes.twinx()
        other.plot(*thin(steps, snr), color=STYLES[1][0], linestyle=STYLES[1][1], label="SNR (right)")
        other.axhline(1, color="0.7", linewidth=0.8)
        other.set_yscale("log")
        other.set_ylabel("signal-to-noise ratio (power)")
        other.spines["top"].set_visible(False)
        axes.plot([], [], color=STYLES[1][0], linestyle=STYLES[1][1], label="SNR (right)")

    return save_figure(path, draw)


def plot_weights(path: str | os.PathLike[str], weights: Mapping[str, ArrayLike], prediction_type: str) -> Path:
    """Plot weights by name, (T,) each, over the steps, relative to their mean.

    ``prediction_type`` is their space. Weights that are not positive and finite are left out; ValueError if all are.
    """
    tables = {name: _positive(table) for name, table in weights.items()}
    if not any(np.isfinite(table).any() for table in tables.values()):
        raise ValueError("plot_weights needs at least one table of weights with a positive, finite value.")

    def draw(axes: Axes) -> None:
        for (name, table), (ink, dash) in zip(tables.items(), _styles(len(tables)), strict=True):
            known = table[np.isfinite(table)]
            relative = table / known.mean() if len(known) else table
            points = thin(np.arange(len(table)), relative)
            axes.plot(*points, color=ink, linestyle=dash, linewidth=1.4, label=name)
        axes.set_yscale("log")
        axes.set(
            title=f"Weight of a step's squared {prediction_type} error",
            xlabel=STEP,
            ylabel="weight, relative to its mean",
        )

    return save_figure(path, draw)


def plot_steps(
    path: str | os.PathLike[str], steps: ArrayLike, bits: ArrayLike, total: float | None = None, unit: str = BITS
) -> Path:
    """Plot the terms of the bound, (K,), at the steps of a chain; the first is the decoder's.

    ``total`` is the bound, for the title, and ``unit`` the name of its unit. Terms that are not finite are left out;
    ValueError if there is no other.
    """
    timesteps, values = np.asarray(steps), np.asarray(bits, dtype=float)
    if timesteps.shape != values.shape or values.ndim != 1 or not is_drawable(values).any():
        raise ValueError(
            f"plot_steps needs as many steps as terms, got {timesteps.shape} and {values.shape}, and a finite one."
        )
    values = np.where(is_drawable(values), values, np.nan)

    def draw(axes: Axes) -> None:
        points = thin(timesteps[1:], values[1:])
        axes.plot(*points, ".-", color=STYLES[0][0], markersize=3, linewidth=0.8, label="divergence")
        axes.plot(timesteps[:1], values[:1], "s", color=STYLES[1][0], label=f"decoder, at t = {timesteps[0]}")
        positive = values[values > 0]
        if len(positive) and positive.max() / 5 > positive.min():
            if (values <= 0).any():
                axes.set_yscale("symlog", linthresh=max(positive.min(), 1 / MAX_DRAWN))
            else:
                axes.set_yscale("log")
        text = "" if total is None else f": {total:.3f} {unit} with the prior"
        axes.set(title=f"The bound, step by step{text}", xlabel=STEP, ylabel=f"{unit}, of one step")

    return save_figure(path, draw)


def plot_variance(path: str | os.PathLike[str], curves: Mapping[str, ArrayLike]) -> Path:
    """Plot curves of v by name, (T,) each, between 0 (the posterior's variance) and 1 (beta)."""

    def draw(axes: Axes) -> None:
        for level, label in ((0, "v = 0: fixed_small, the posterior's"), (1, "v = 1: fixed_large, beta")):
            axes.axhline(level, color="0.35", linewidth=1, linestyle=(":", "--")[level], label=label)
        for (name, table), (ink, dash) in zip(curves.items(), _styles(len(curves)), strict=True):
            values = np.asarray(table, dtype=float)
            points = thin(np.arange(len(values)), np.where(is_drawable(values), values, np.nan))
            axes.plot(*points, color=ink, linestyle=dash, linewidth=1.4, label=name)
        axes.set(
            title="Variance of a reverse step", xlabel=STEP, ylabel="v (fraction of the way from posterior to beta)"
        )
        axes.set_ylim(-0.05, 1.05)

    return save_figure(path, draw)


def plot_timesteps(
    path: str | os.PathLike[str], chosen: Mapping[int, Sequence[int]], num_train_timesteps: int
) -> Path:
    """Plot the chosen timesteps for each number of steps K, one row of dots for each; ValueError without any."""
    if not chosen:
        raise ValueError("plot_timesteps needs the timesteps of at least one number of steps.")

    def draw(axes: Axes) -> None:
        steps = [step for chosen_steps in chosen.values() for step in chosen_steps]
        counts = [count for count, chosen_steps in chosen.items() for _ in chosen_steps]
        axes.plot(steps, counts, ".", color=STYLES[1][0], markersize=3, label="chosen step")
        axes.set(
            title="The steps that make the bound least",
            xlabel=f"{STEP} (of 0 to {num_train_timesteps - 1})",
            ylabel="number of steps K",
        )

    return save_figure(path, draw)


def _positive(table: ArrayLike) -> NDArray[np.float64]:
    """A table with NaN in place of what a logarithmic axis cannot show."""
    values = np.asarray(table, dtype=float)
    return np.where(is_drawable(values) & (values > 1 / MAX_DRAWN), values, np.nan)


def _set_log_scale(axes: Axes, values: NDArray[np.float64]) -> None:
    if np.isfinite(values).any():
        axes.set_yscale("log")


def _styles(count: int) -> list[tuple[str, str]]:
    return [STYLES[i % len(STYLES)] for i in range(count)]

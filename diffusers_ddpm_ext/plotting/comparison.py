"""Curves of one metric of several runs over each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusers_ddpm_ext.plotting.curves import (
    MAX_DRAWN,
    is_drawable,
    legend_label,
    log_axis,
    running_mean,
    save_figure,
    thin,
)
from diffusers_ddpm_ext.utils.run_metrics import MetricCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INKS = ("#4c72b0", "#c44e52", "#2a7f3f", "#8172b3", "#b8860b", "#008b8b", "#d16ba5", "#555555")
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1)), (0, (6, 2, 1, 2)))
"""Colors and lines of the runs, in order; both, so that a reader who sees no colors can tell four of them apart."""
MAX_RUNS = len(INKS)


def plot_comparison(path: Path, metric: str, curves: Mapping[str, MetricCurve]) -> Path | None:
    """Plot a metric over the optimizer steps of several runs; None without a finite value.

    Args:
        path: PNG to write.
        metric: its name; a training metric of 50 values or more is drawn as its running mean.
        curves: by the run's label, in the order of the legend, at most `MAX_RUNS`; empty ones are left out but keep
            their color.
    """
    drawn = []
    for number, (label, curve) in enumerate(curves.items()):
        steps, values = np.asarray(curve.steps, dtype=float), np.asarray(curve.values, dtype=float)
        known = is_drawable(values) & is_drawable(steps)
        if known.any():
            drawn.append((number, label, *thin(steps[known], values[known])))
    if not drawn:
        return None
    is_noisy = metric.startswith("train/") and max(len(values) for *_, values in drawn) >= 50

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        shown = []
        for number, label, steps, values in drawn:
            means = running_mean(values, max(5, len(values) // 40)) if is_noisy and len(values) >= 50 else values
            marker = "o" if len(means) < 50 else ""
            style: dict[str, Any] = {"color": INKS[number], "linestyle": DASHES[number % len(DASHES)]}
            axes.plot(steps, means, marker=marker, markersize=3, linewidth=1.4, label=legend_label(label), **style)
            shown.append(means)
        together = np.concatenate(shown)
        if together.min() > 1 / MAX_DRAWN and together.max() / 5 > together.min():
            log_axis(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(title=f"{metric}{', running mean' if is_noisy else ''}", xlabel="optimizer step", ylabel=metric)

    return save_figure(path, draw)

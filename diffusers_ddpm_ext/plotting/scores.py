"""Plots of sample metrics over a training run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from diffusers_ddpm_ext.plotting.curves import save_figure
from diffusers_ddpm_ext.utils.run_metrics import MetricCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ENDS = ("_low", "", "_high")


def score_keys(score: str, suffix: str) -> tuple[str, str, str]:
    """Names of a score's metrics: lower end, value, upper end; ``suffix`` is that of the weights."""
    low, value, high = (f"val/{score}{end}{suffix}" for end in ENDS)
    return low, value, high


def plot_score(path: Path, metrics: Mapping[str, MetricCurve], score: str, suffix: str, samples: int) -> Path | None:
    """Plot a metric of samples with its interval over optimizer steps, as PNG; None without a finite value.

    Args:
        path: the file.
        metrics: of the run, with the names of `score_keys`.
        score: the metric.
        suffix: of the weights.
        samples: number of samples.
    """
    curves = [metrics[name] for name in score_keys(score, suffix) if name in metrics and metrics[name].values]
    if len(curves) < len(ENDS):
        return None
    low, value, high = curves

    def draw(axes: Axes) -> None:
        axes.fill_between(low.steps, low.values, high.values, color="#2a7f3f", alpha=0.2, linewidth=0)
        axes.plot(value.steps, value.values, color="#2a7f3f", marker="o", markersize=3, label=score)
        axes.set(title=f"{score} of N = {samples:,} samples, with interval", xlabel="optimizer step", ylabel=score)

    return save_figure(path, draw)

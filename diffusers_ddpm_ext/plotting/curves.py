"""Plots of a training run: losses and log-variances.

They need matplotlib (the extra ``train``), which is imported when the first one is drawn, without a display and
without changing the settings of a program that has its own plots.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffusers_ddpm_ext.utils.files import write_atomically
from diffusers_ddpm_ext.utils.run_metrics import MetricCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = {"train": "#4c72b0", "raw": "#c44e52", "ema": "#2a7f3f"}
DASH: dict[str, Any] = {"train": "-", "raw": (0, (4, 2)), "ema": "-"}
MARKER = {"train": "", "raw": "o", "ema": "s"}
MAX_PLOTTED = 20_000  # points of a curve
LEGEND_WIDTH = 90  # letters that fit side by side below the axes
LEGEND_LINE = 0.18  # inches that a line of it takes; the first three have their place
MAX_DRAWN = 1e100  # matplotlib's axes overflow beyond
RUN_LOSSES: tuple[tuple[str, str, Literal["train", "raw", "ema"]], ...] = (
    ("train/loss_simple", "training", "train"),
    ("val/loss_simple", "validation, raw weights", "raw"),
    ("val/loss_simple_ema", "validation, EMA weights", "ema"),
)


@dataclass(frozen=True)
class Curve:
    """A curve of a loss plot.

    Attributes:
        label: in the legend.
        steps: optimizer steps, (n,).
        values: losses, (n,); non-finite ones are left out.
        kind: training losses are drawn pale with their running mean, validation losses with markers.
    """

    label: str
    steps: ArrayLike
    values: ArrayLike
    kind: Literal["train", "raw", "ema"] = "train"


def plot_losses(
    path: str | os.PathLike[str],
    curves: Sequence[Curve],
    *,
    title: str = "Training and validation loss",
    quantity: str = "loss (mean squared error of a value)",
) -> Path:
    """Plot losses over optimizer steps, on a logarithmic axis if they span more than a factor of five.

    Args:
        path: PNG to write.
        curves: those without a finite value up to 1e100 are left out; ValueError if all are.
        title: of the plot.
        quantity: label of the loss axis, with its unit.
    """
    from matplotlib.ticker import MaxNLocator

    finite = []
    for curve in curves:
        steps, values = np.asarray(curve.steps, dtype=float), np.asarray(curve.values, dtype=float)
        if steps.shape != values.shape or steps.ndim != 1:
            raise ValueError(f"{curve.label} has steps {steps.shape} and values {values.shape}; both must be (n,).")
        if (known := is_drawable(values) & is_drawable(steps)).any():
            finite.append((curve, *thin(steps[known], values[known])))
    if not finite:
        raise ValueError("plot_losses needs a curve with a finite value.")

    def draw(axes: Axes) -> None:
        for curve, steps, values in finite:
            _draw_curve(axes, curve, steps, values)
        losses = np.concatenate([values for _, _, values in finite])
        if losses.min() > 1 / MAX_DRAWN and losses.max() / 5 > losses.min():
            log_axis(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(title=title, xlabel="optimizer step", ylabel=quantity)

    return save_figure(path, draw)


def plot_run_losses(metrics: Mapping[str, MetricCurve], path: Path, loss_type: str) -> Path | None:
    """Plot the losses of a run, from `read_metrics` of its ``metrics.jsonl``; None if there are none."""
    curves = [
        Curve(label, metrics[name].steps, metrics[name].values, kind)
        for name, label, kind in RUN_LOSSES
        if name in metrics and is_drawable(np.asarray(metrics[name].values, dtype=float)).any()
    ]
    return plot_losses(path, curves, quantity=f"loss_simple ({loss_type})") if curves else None


def plot_logvar(
    path: str | os.PathLike[str], logvar: ArrayLike, log_loss: ArrayLike, *, title: str | None = None
) -> Path:
    """Plot the learned log-variance of each step and the measured log of the mean loss, which it estimates.

    Args:
        path: PNG to write.
        logvar: learned table, (T,), natural log.
        log_loss: log of the mean unweighted loss at each step, (T,), natural log; NaN if it was not measured.
        title: of the plot; the mean distance of the two is added. By default it says what is drawn.
    """
    learned, measured = np.asarray(logvar, dtype=float), np.asarray(log_loss, dtype=float)
    if learned.shape != measured.shape or learned.ndim != 1:
        raise ValueError(f"logvar has shape {learned.shape} and log_loss {measured.shape}; both must be (T,).")
    if not is_drawable(learned).any():
        raise ValueError("plot_logvar needs a finite learned log-variance.")
    known = is_drawable(measured) & is_drawable(learned)
    width = len(learned) // 40 | 1
    is_smoothed = len(learned) >= 100
    heading = title or "Learned log-variance"
    if known.any():
        heading = title or "Learned log-variance and measured log loss"
        heading += f"\nmean distance {np.abs(learned - measured)[known].mean():.3f}"

    def draw(axes: Axes) -> None:
        steps = np.arange(len(learned))
        if known.any():
            points = thin(steps[known], measured[known])
            axes.plot(*points, ".", color="0.55", markersize=3, label="measured: log of mean loss")
        values = np.where(is_drawable(learned), learned, np.nan)
        if is_smoothed:
            axes.plot(*thin(steps, values), color=INK["raw"], alpha=0.3, linewidth=0.8)
            known_steps, means = steps[is_drawable(learned)], running_mean(values[is_drawable(learned)], width)
            label = f"learned log-variance, mean of {width} steps"
            axes.plot(*thin(known_steps, means), color=INK["raw"], linewidth=1.8, label=label)
        else:
            axes.plot(*thin(steps, values), color=INK["raw"], linewidth=1.6, label="learned log-variance")
        axes.set(title=heading, xlabel="timestep t", ylabel="natural log of the loss (squared data units)")

    return save_figure(path, draw)


def is_drawable(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Which values an axis can show: finite, and not beyond 1e100."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.abs(values) <= MAX_DRAWN)


def thin(steps: NDArray[Any], values: NDArray[Any], limit: int = MAX_PLOTTED) -> tuple[NDArray[Any], NDArray[Any]]:
    """Means of successive points, at most ``limit`` of them and each of equally many: (n,) to (m,).

    A figure of some thousand pixels shows no more, and drawing millions of points takes minutes. Up to ``limit``
    points stay as they are; NaN among the values of a mean is left out.
    """
    width = -(-len(values) // limit)
    if width <= 1:
        return steps, values
    starts = np.arange(0, len(values), width)
    known = np.isfinite(values)
    counts = np.add.reduceat(known.astype(float), starts)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        means = np.add.reduceat(np.where(known, values, 0.0), starts) / counts
    middles = np.add.reduceat(steps.astype(float), starts) / np.diff([*starts, len(values)])
    return middles, means


def running_mean(values: ArrayLike, width: int) -> NDArray[np.float64]:
    """Running mean over a window of ``width`` values (the next odd number), fewer at the ends: (n,) to (n,)."""
    array = np.asarray(values, dtype=float)
    half = width // 2
    sums = np.concatenate([[0.0], np.cumsum(array)])
    start = np.clip(np.arange(len(array)) - half, 0, None)
    stop = np.clip(np.arange(len(array)) + half + 1, None, len(array))
    return (sums[stop] - sums[start]) / (stop - start)


def _draw_curve(axes: Axes, curve: Curve, steps: NDArray[Any], values: NDArray[Any]) -> None:
    """Draw one curve; a long noisy one is pale, with its running mean over it."""
    ink, noisy = INK[curve.kind], curve.kind == "train" and len(values) >= 50
    if noisy:
        axes.plot(steps, values, color=ink, alpha=0.25, linewidth=0.8)
        values = running_mean(values, max(5, len(values) // 40))
    few = "." if len(values) < 50 and not MARKER[curve.kind] else MARKER[curve.kind]
    label = legend_label(f"{curve.label} (running mean)" if noisy else curve.label)
    axes.plot(
        steps, values, color=ink, linestyle=DASH[curve.kind], marker=few, markersize=4, linewidth=1.4, label=label
    )


def legend_label(text: str) -> str:
    """A label that matplotlib shows: it leaves out those that start with an underscore."""
    return f" {text}" if text.startswith("_") else text


def drawable_text(text: str) -> str:
    """A text with the characters that the font does not have, such as Chinese ones, escaped as in Python's source."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))

    def shown(characters: str) -> Iterator[str]:
        for character in characters:
            is_known = character == "\n" or font.get_char_index(ord(character))
            yield character if is_known else character.encode("unicode_escape").decode("ascii")

    return "".join(shown(text))


def log_axis(axes: Axes) -> None:
    """Make the vertical axis logarithmic, with plain array at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def save_figure(path: str | os.PathLike[str], draw: Callable[[Axes], None]) -> Path:
    """Draw one pair of axes and write it without a window or a global figure: as PNG, SVG or PDF, by the name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw(axes)
    handles, labels = axes.get_legend_handles_labels()
    shown = [axes.title, axes.xaxis.label, *(other.yaxis.label for other in figure.axes)]
    if handles:  # below the axes, where it hides no curve
        labels = ["\n".join(textwrap.wrap(drawable_text(label), LEGEND_WIDTH - 6) or [""]) for label in labels]
        columns = max(1, min(3, len(labels), LEGEND_WIDTH // (max(map(len, labels)) + 6)))  # 6: line and gaps
        lines = -(-sum(label.count("\n") + 1 for label in labels) // columns)
        figure.set_figheight(4.5 + LEGEND_LINE * max(0, lines - 3))
        shown += figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False).get_texts()
    for text in shown:
        text.set_parse_math(False)  # names may have dollar signs
        text.set_text(drawable_text(text.get_text()))
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    kind = Path(path).suffix.removeprefix(".").lower()
    return write_atomically(path, lambda file: canvas.print_figure(file, format=kind, dpi=150))

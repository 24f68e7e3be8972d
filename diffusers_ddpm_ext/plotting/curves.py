"""Numbers and images as pictures: arrays in, a file out.

Sheets of images need Pillow alone; curves need matplotlib (the extra ``train``), which is imported when the first one
is drawn, without a display and without touching the settings of a program that plots for itself.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GAP = 4  # pixels between images
TILE = 96  # side, in pixels, that small images are enlarged to, about
INK = {"train": "#4c72b0", "raw": "#c44e52", "ema": "#2a7f3f"}
DASH: dict[str, Any] = {"train": "-", "raw": (0, (4, 2)), "ema": "-"}
MARK = {"train": "", "raw": "o", "ema": "s"}


# ---------------------------------------------------------------- sheets of images


def image_grid(
    images: ArrayLike, columns: int | None = None, enlarge: int | None = None, gap: int = GAP
) -> Image.Image:
    """Put images side by side, row by row, enlarged so that a person can see single pixels.

    Args:
        images: (N, C, H, W) in [-1, 1]; values outside are clipped. One channel is grey, three are RGB, four RGBA;
            with any other number the channels stand side by side in grey.
        columns: images a row; None makes the sheet about as wide as high.
        enlarge: side of the square that a pixel becomes (nearest neighbour); None enlarges small images.
        gap: width of the white lines between images, in pixels of the sheet.

    Returns:
        The sheet. What a last row lacks is white.

    Raises:
        ValueError: the array has another shape or no image, or a number is below its smallest value.
    """
    levels = _levels(images)
    if columns is None:
        columns = max(1, round(math.sqrt(len(levels) * levels.shape[1] / levels.shape[2])))
    if enlarge is None:
        enlarge = max(1, round(TILE / max(levels.shape[1:3])))
    if columns < 1 or enlarge < 1 or gap < 0:
        raise ValueError(f"columns={columns} and enlarge={enlarge} must be at least 1, gap={gap} at least 0.")
    columns = min(columns, len(levels))
    tiles = levels.repeat(enlarge, axis=1).repeat(enlarge, axis=2)
    count, height, width, depth = tiles.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, depth), 255, dtype=np.uint8)
    for place, tile in enumerate(tiles):
        top, left = place // columns * (height + gap), place % columns * (width + gap)
        sheet[top : top + height, left : left + width] = tile
    return Image.fromarray(sheet[..., 0] if depth == 1 else sheet)


def save_grid(images: ArrayLike, path: str | os.PathLike[str], **options: Any) -> Path:
    """Write the sheet of :func:`image_grid` to a file, which is there whole or not at all.

    Args:
        images: as for :func:`image_grid`.
        path: file to write; its extension says the format.
        **options: further arguments of :func:`image_grid`.

    Returns:
        The path.
    """
    sheet = image_grid(images, **options)
    kind = Image.registered_extensions().get(Path(path).suffix.lower(), "PNG")
    if sheet.mode == "RGBA" and kind == "JPEG":
        sheet = sheet.convert("RGB")
    return write_whole(path, lambda file: sheet.save(file, kind))


def write_whole(path: str | os.PathLike[str], write: Callable[[BinaryIO], Any]) -> Path:
    """Write a file beside its place and move it there when it is complete, so that nobody ever sees a half of it.

    Args:
        path: file to write; its folder is made if it is missing.
        write: writes the content into an open file.

    Returns:
        The path.
    """
    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    unfinished = place.with_name(f".{place.name}.{os.getpid()}.part")
    try:
        with unfinished.open("wb") as file:
            write(file)
        unfinished.replace(place)
    finally:
        unfinished.unlink(missing_ok=True)
    return place


def _levels(images: ArrayLike) -> NDArray[np.uint8]:
    """Turn (N, C, H, W) in [-1, 1] into (N, H, W, 1 | 3 | 4) in 0 .. 255."""
    values = np.asarray(images, dtype=np.float32)
    if values.ndim != 4 or 0 in values.shape:
        raise ValueError(f"images has shape {values.shape}; it must be (N, C, H, W) with at least one image.")
    levels = ((values.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8).transpose(0, 2, 3, 1)
    if levels.shape[3] not in (1, 3, 4):
        count, height, width, channels = levels.shape
        levels = levels.transpose(0, 1, 3, 2).reshape(count, height, channels * width, 1)
    return levels


# ---------------------------------------------------------------- curves


@dataclass(frozen=True)
class Curve:
    """One line of a plot of losses.

    Attributes:
        label: what the legend says.
        steps: optimizer steps, (n,).
        values: losses, (n,); those that are not finite are left out.
        kind: how it is drawn: training losses noisy with their running mean, validation losses with a mark each.
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
    """Draw losses over optimizer steps, on a logarithmic axis where they span more than a factor of five.

    Args:
        path: PNG to write.
        curves: what to draw; those without a finite value are left out.
        title: heading.
        quantity: label of the axis of losses, with its unit.

    Returns:
        The path.

    Raises:
        ValueError: no curve has a finite value.
    """
    from matplotlib.ticker import MaxNLocator

    finite = []
    for curve in curves:
        steps, values = np.asarray(curve.steps, dtype=float), np.asarray(curve.values, dtype=float)
        if (sound := np.isfinite(values)).any():
            finite.append((curve, steps[sound], values[sound]))
    if not finite:
        raise ValueError("plot_losses needs a curve with a finite value.")

    def draw(axes: Axes) -> None:
        for curve, steps, values in finite:
            _draw_curve(axes, curve, steps, values)
        everything = np.concatenate([values for _, _, values in finite])
        if everything.min() > 0 and everything.max() > 5 * everything.min():
            log_axis(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(title=title, xlabel="optimizer step", ylabel=quantity)

    return figure(path, draw)


def plot_logvar(
    path: str | os.PathLike[str],
    logvar: ArrayLike,
    log_loss: ArrayLike,
    *,
    title: str = "Learned log-variance and measured log loss",
) -> Path:
    """Draw the learned log-variance of each step against the log of the mean loss measured there, which it estimates.

    Args:
        path: PNG to write.
        logvar: learned table, (T,), natural log.
        log_loss: log of the mean unweighted loss at each step, (T,), natural log; NaN where it was not measured.
        title: heading; the mean distance of the two is added to it.

    Returns:
        The path.

    Raises:
        ValueError: the two differ in shape.
    """
    learned, measured = np.asarray(logvar, dtype=float), np.asarray(log_loss, dtype=float)
    if learned.shape != measured.shape or learned.ndim != 1:
        raise ValueError(f"logvar has shape {learned.shape} and log_loss {measured.shape}; both must be (T,).")
    known = np.isfinite(measured)
    distance = np.abs(learned - measured)[known].mean() if known.any() else math.nan

    def draw(axes: Axes) -> None:
        steps = np.arange(len(learned))
        axes.plot(steps[known], measured[known], ".", color="0.55", markersize=3, label="measured: log of mean loss")
        axes.plot(steps, learned, color=INK["raw"], linewidth=1.6, label="learned log-variance")
        axes.set(
            title=f"{title}\nmean distance {distance:.3f}",
            xlabel="timestep t",
            ylabel="natural log of the loss (squared data units)",
        )

    return figure(path, draw)


def running_mean(values: ArrayLike, width: int) -> NDArray[np.float64]:
    """Average each value with its neighbours, ``width`` of them in all and fewer at the ends.

    Args:
        values: (n,).
        width: size of the window; an even one counts as the next odd one.

    Returns:
        (n,).
    """
    numbers = np.asarray(values, dtype=float)
    half = width // 2
    sums = np.concatenate([[0.0], np.cumsum(numbers)])
    start = np.clip(np.arange(len(numbers)) - half, 0, None)
    stop = np.clip(np.arange(len(numbers)) + half + 1, None, len(numbers))
    return (sums[stop] - sums[start]) / (stop - start)


def _draw_curve(axes: Axes, curve: Curve, steps: NDArray[Any], values: NDArray[Any]) -> None:
    """Draw one curve: a long noisy one pale, with its running mean over it."""
    ink, noisy = INK[curve.kind], curve.kind == "train" and len(values) >= 50
    if noisy:
        axes.plot(steps, values, color=ink, alpha=0.25, linewidth=0.8)
        values = running_mean(values, max(5, len(values) // 40))
    few = "." if len(values) < 50 and not MARK[curve.kind] else MARK[curve.kind]
    label = f"{curve.label} (running mean)" if noisy else curve.label
    axes.plot(
        steps, values, color=ink, linestyle=DASH[curve.kind], marker=few, markersize=4, linewidth=1.4, label=label
    )


def log_axis(axes: Axes) -> None:
    """Make the vertical axis logarithmic, with plain numbers at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def figure(path: str | os.PathLike[str], draw: Callable[[Axes], None]) -> Path:
    """Draw one pair of axes and write it as PNG; no window, no global figure, nothing left open."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(framealpha=0.85, edgecolor="none")
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return write_whole(path, lambda file: canvas.print_figure(file, format="png", dpi=150))

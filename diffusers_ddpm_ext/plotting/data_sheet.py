"""One picture of a set of images: some of them, histograms of values, sizes, classes, and pairs that look the same."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffusers_ddpm_ext.plotting.curves import is_drawable, log_axis
from diffusers_ddpm_ext.utils.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

WIDTH = 12.0
TILE, GAP = 136, 8
"""Side of a tile in pixels, and white between pictures."""
COLUMNS, PAIRS, PAIRS_PER_ROW = 12, 12, 6
INKS = {1: ("0.35",), 3: ("#c44e52", "#2a7f3f", "#4c72b0"), 4: ("#c44e52", "#2a7f3f", "#4c72b0", "0.6")}
ACCENT = "#4c72b0"
MAX_POINTS = 20_000
MAX_BARS = 20


@dataclass(frozen=True)
class PicturePair:
    """Two pictures, (h, w, 3) in 0 to 1, with a line about both and the names of each."""

    first: NDArray[np.float32]
    second: NDArray[np.float32]
    title: str
    names: tuple[str, str]


@dataclass(frozen=True)
class DataSheet:
    """What the picture shows.

    Attributes:
        title: above all.
        samples: pictures, (h, w, 3) each, in 0 to 1, at most 128 pixels high and wide.
        edges: of the bins of the histograms, (bins + 1,).
        counts: (C, bins).
        sizes: heights and widths in pixels, (n, 2).
        resolution: suggested height and width.
        classes: names and numbers of images, the largest first.
        class_title: above the classes.
        pairs: that look the same.
    """

    title: str
    samples: Sequence[NDArray[np.float32]]
    edges: NDArray[np.float64]
    counts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    resolution: tuple[int, int] | None = None
    classes: Sequence[tuple[str, int]] = ()
    class_title: str = ""
    pairs: Sequence[PicturePair] = field(default=())


def draw_data_sheet(path: Path, sheet: DataSheet) -> Path:
    """Draw the picture and write it as PNG, without a window or a global figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(sheet.samples) // COLUMNS)
    heights = [rows * WIDTH / COLUMNS, 3.6]
    if sheet.pairs:
        heights.append(0.3 + 1.35 * -(-min(len(sheet.pairs), PAIRS) // PAIRS_PER_ROW))
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.3), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(_plain(sheet.title), fontsize=13, fontweight="bold")
    parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights)
    _draw_samples(parts[0].subplots(), sheet.samples)
    charts = [_draw_histogram, _draw_sizes] + ([_draw_classes] if sheet.classes else [])
    row: Any = parts[1].subplots(1, len(charts))
    for axes, draw in zip(row, charts, strict=True):
        draw(axes, sheet)
        axes.spines[["top", "right"]].set_visible(False)
    if sheet.pairs:
        _draw_pairs(parts[2], sheet.pairs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a name in a script that the font lacks
        return write_atomically(path, lambda file: canvas.print_figure(file, format="png", dpi=110))


def _plain(text: str) -> str:
    """A name in which dollar signs do not begin a formula."""
    return text.replace("$", r"\$")


def _draw_samples(axes: Axes, samples: Sequence[NDArray[np.float32]]) -> None:
    """Pictures in rows, each in the middle of its tile."""
    rows = -(-len(samples) // COLUMNS)
    sheet = np.ones((rows * TILE, COLUMNS * TILE, 3), dtype=np.float32)
    for number, picture in enumerate(samples):
        row, column = divmod(number, COLUMNS)
        _paste(sheet, picture, row * TILE, column * TILE)
    _show(axes, sheet)


def _paste(sheet: NDArray[np.float32], picture: NDArray[np.float32], top: int, left: int) -> None:
    """Put a picture into the middle of the tile at a place; one that is too small is enlarged."""
    factor = max(1, (TILE - GAP) // max(picture.shape[:2]))
    enlarged = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    height, width = enlarged.shape[:2]
    top, left = top + (TILE - height) // 2, left + (TILE - width) // 2
    sheet[top : top + height, left : left + width] = enlarged


def _show(axes: Axes, sheet: NDArray[np.float32]) -> None:
    axes.imshow(sheet, vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _draw_histogram(axes: Axes, sheet: DataSheet) -> None:
    from matplotlib import colormaps

    axes.set_title("values of pixels, per channel", fontsize=10)
    if not is_drawable(sheet.edges).all():
        axes.text(0.5, 0.5, "values beyond 1e100", ha="center", transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return
    channels = len(sheet.counts)
    inks = INKS.get(channels) or colormaps["viridis"](np.linspace(0, 0.9, channels))
    names = {3: "RGB", 4: "RGBA"}.get(channels, [str(channel) for channel in range(channels)])
    for counts, ink, name in zip(sheet.counts, inks, names, strict=True):
        share = counts / max(counts.sum(), 1)
        axes.stairs(share, sheet.edges, color=ink, linewidth=1.2, label=name)
        if channels in INKS:
            axes.stairs(share, sheet.edges, color=ink, alpha=0.15, fill=True)
    positive = sheet.counts[sheet.counts > 0]
    axes.set(xlabel="value", ylabel="share of the pixels")
    if len(positive) and (sheet.counts.max() / sheet.counts.sum(axis=1).max()) > 0.2:
        log_axis(axes)
    if channels > 1:
        axes.legend(fontsize=8, frameon=False, ncols=1 + channels // 8)


def _draw_sizes(axes: Axes, sheet: DataSheet) -> None:
    """Sizes as points whose area is the number of images, and the suggested resolution."""
    axes.set_title("sizes (pixels)", fontsize=10)
    sizes, counts = np.unique(sheet.sizes, axis=0, return_counts=True)
    if len(sizes) > MAX_POINTS:
        chosen = np.linspace(0, len(sizes) - 1, MAX_POINTS).astype(int)
        sizes, counts = sizes[chosen], counts[chosen]
    area = 12 + 300 * np.sqrt(counts / counts.sum()) if len(sizes) < 200 else 8
    axes.scatter(sizes[:, 1], sizes[:, 0], s=area, color=ACCENT, alpha=0.5, linewidth=0)
    if sheet.resolution is not None:
        height, width = sheet.resolution
        axes.plot(width, height, "x", color="#c44e52", markersize=8, label=f"suggested: {height} x {width}")
        axes.legend(fontsize=8, frameon=False, loc="upper left")
    limits = (0.0, 1.1 * max(float(sizes.max()), *(sheet.resolution or (1, 1))))
    axes.plot(limits, limits, color="0.85", linewidth=0.8, zorder=0)
    axes.set(xlabel="width", ylabel="height", xlim=limits, ylim=limits, aspect="equal")


def _draw_classes(axes: Axes, sheet: DataSheet) -> None:
    shown = list(sheet.classes[:MAX_BARS])
    if len(sheet.classes) > MAX_BARS:
        rest = sum(count for _, count in sheet.classes[MAX_BARS:])
        shown.append((f"{len(sheet.classes) - MAX_BARS:,} more", rest))
    places = np.arange(len(shown))[::-1]
    axes.barh(places, [count for _, count in shown], color=ACCENT, alpha=0.75)
    axes.set_yticks(places, [_plain(name) for name, _ in shown], fontsize=7 if len(shown) > 10 else 8)
    axes.set_title(_plain(sheet.class_title), fontsize=10)
    axes.set(xlabel="images")


def _draw_pairs(part: SubFigure, pairs: Sequence[PicturePair]) -> None:
    shown = pairs[:PAIRS]
    part.suptitle("pairs that look the same", fontsize=10)
    grid: Any = part.subplots(-(-len(shown) // PAIRS_PER_ROW), PAIRS_PER_ROW, squeeze=False)
    places = grid.flat
    for pair, axes in zip(shown, places, strict=False):
        sheet = np.ones((TILE, 2 * TILE, 3), dtype=np.float32)
        _paste(sheet, pair.first, 0, 0)
        _paste(sheet, pair.second, 0, TILE)
        _show(axes, sheet)
        axes.set_title(pair.title, fontsize=8, pad=2)
        for place, name in zip((0.25, 0.75), pair.names, strict=True):
            axes.text(place, -0.02, _plain(name), fontsize=6, ha="center", va="top", transform=axes.transAxes)
    for axes in places:
        axes.axis("off")

"""Sheets of images with pixels computed by hand, atomic files, plots without open figures."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from diffusers_ddpm_ext.diffusion.schedule import NoiseSchedule
from diffusers_ddpm_ext.plotting import curves
from diffusers_ddpm_ext.plotting.chain import plot_schedule, plot_steps, plot_timesteps, plot_variance, plot_weights
from diffusers_ddpm_ext.plotting.comparison import plot_comparison
from diffusers_ddpm_ext.plotting.curves import MAX_PLOTTED, Curve, plot_logvar, plot_losses, running_mean, thin
from diffusers_ddpm_ext.plotting.sheets import CAPTION_HEIGHT, GAP, LINE_HEIGHT, grid_size, image_grid, save_grid
from diffusers_ddpm_ext.utils.run_metrics import MetricCurve


def test_a_sheet_by_hand():
    """Three 1x2 images of one channel, two a row, doubled, with a line of one pixel."""
    images = np.array([[-1.0, 1.0], [0.0, 2.0], [-3.0, 0.5]]).reshape(3, 1, 1, 2)
    sheet = np.asarray(image_grid(images, columns=2, enlarge=2, gap=1))
    w = 255
    line = [w] * 9
    expected = [
        [0, 0, 255, 255, w, 128, 128, 255, 255],
        [0, 0, 255, 255, w, 128, 128, 255, 255],
        line,
        [0, 0, 191, 191, w, w, w, w, w],
        [0, 0, 191, 191, w, w, w, w, w],
    ]
    assert sheet.tolist() == expected


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_channels_become_the_mode(channels, mode):
    images = torch.linspace(-1, 1, 2 * channels * 6).reshape(2, channels, 2, 3)
    sheet = image_grid(images, columns=2, enlarge=1, gap=0)
    assert sheet.mode == mode
    pixels = np.asarray(sheet).reshape(2, 6, channels)
    for which in range(2):
        tile = pixels[:, 3 * which : 3 * which + 3].transpose(2, 0, 1)
        np.testing.assert_allclose(tile / 127.5 - 1, images[which].numpy(), atol=1 / 255)


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """Every figure that is written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    found: list[Figure] = []
    write = FigureCanvasAgg.print_figure
    monkeypatch.setattr(
        FigureCanvasAgg, "print_figure", lambda self, *a, **k: (found.append(self.figure), write(self, *a, **k))
    )
    return found


@pytest.mark.filterwarnings("error")  # of glyphs that the font does not have
def test_every_name_is_in_the_legend_as_it_is(tmp_path, figures):
    """Dollar signs are no formulas, an underscore hides nothing, and other scripts are told apart."""
    names = {"lr$1e-3$": "lr$1e-3$", "cost_$5": "cost_$5", "_hidden": " _hidden", "a$x_{$": "a$x_{$",
             "\u6f22": "\\u6f22", "\u5b57": "\\u5b57", "\u00fcn\u00ef": "\u00fcn\u00ef"}  # fmt: skip
    curves_ = {name: MetricCurve() for name in names}
    for curve in curves_.values():
        curve.append(1, 2.0)
    plot_comparison(tmp_path / "all.png", "val/loss", curves_)
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == list(names.values())
    plot_losses(tmp_path / "one.png", [Curve("$_{$", [1], [1.0])], quantity="loss ($x_{$)")
    assert figures[1].axes[0].get_ylabel() == "loss ($x_{$)"


def test_long_names_stay_on_the_picture(tmp_path, figures):
    """Eight names of 190 letters: nothing is left out, the legend is inside, and the curves keep their place."""
    curves_ = {f"{number} {'word ' * 37}end": MetricCurve() for number in range(8)}
    for curve in curves_.values():
        curve.append(1, 2.0)
    plot_comparison(tmp_path / "all.png", "val/loss", curves_)
    legend, axes = figures[0].legends[0], figures[0].axes[0]
    assert [text.get_text().replace("\n", " ") for text in legend.get_texts()] == list(curves_)
    box, picture = legend.get_window_extent(), figures[0].bbox
    assert picture.x0 <= box.x0 < box.x1 <= picture.x1
    assert picture.y0 <= box.y0 < box.y1 <= axes.get_window_extent().y0
    assert axes.get_window_extent().height > 200


def test_a_log_variance_that_was_not_measured_is_drawn_alone(tmp_path, figures):
    plot_logvar(tmp_path / "a.png", np.zeros(20), np.full(20, np.nan))
    assert figures[0].axes[0].get_title() == "Learned log-variance"
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["learned log-variance"]
    plot_logvar(tmp_path / "b.png", np.zeros(20), np.full(20, 0.5))
    assert figures[1].axes[0].get_title() == "Learned log-variance and measured log loss\nmean distance 0.500"


@pytest.mark.parametrize(("shape", "enlarged"), [((1, 8, 8), 96), ((3, 32, 32), 96), ((3, 128, 128), 128)])
def test_small_images_are_enlarged(shape, enlarged):
    assert image_grid(np.zeros((1, *shape))).size == (enlarged, enlarged)


@pytest.mark.parametrize(("shape", "columns"), [((16, 1, 8, 8), 4), ((10, 1, 16, 4), 6), ((2, 1, 8, 8), 1)])
def test_a_sheet_is_about_square(shape, columns):
    sheet = image_grid(np.zeros(shape), enlarge=1, gap=0)
    assert sheet.width == columns * shape[3]


@pytest.mark.parametrize(
    ("images", "options"),
    [
        (np.zeros((3, 8, 8)), {}),
        (np.zeros((0, 1, 8, 8)), {}),
        (np.zeros((1, 1, 2, 2)), {"columns": 0}),
        (np.zeros((1, 1, 2, 2)), {"enlarge": 0}),
        (np.zeros((1, 1, 2, 2)), {"gap": -1}),
    ],
)
def test_invalid_arrays_are_refused(images, options):
    with pytest.raises(ValueError, match="must be"):
        image_grid(images, **options)


def test_long_captions_are_wrapped_and_cut():
    """All images have strips of one height; a text of one line is drawn as it is without the others."""
    images, texts = np.zeros((3, 3, 96, 96)), ["a cat", "an astronaut who rides a horse", "a word " * 50]
    short, long = image_grid(images[:1], captions=texts[:1]), image_grid(images, columns=3, captions=texts)
    assert short.size == (96, 96 + CAPTION_HEIGHT)
    assert long.size == (3 * 96 + 2 * GAP, 96 + CAPTION_HEIGHT + 2 * LINE_HEIGHT)
    assert image_grid(images, captions=texts).size == grid_size(3, 96, 96, texts)[::-1]
    strips = np.asarray(long)[96:, :, 0]
    line = np.asarray(short)[96:, :, 0]
    assert np.array_equal(strips[:CAPTION_HEIGHT, :96], line)
    assert (strips[CAPTION_HEIGHT:, :96] == 255).all()
    dark = [
        [(strips[top : top + LINE_HEIGHT, left : left + 96] < 128).any() for top in (0, 13, 26)] for left in (100, 200)
    ]
    assert dark == [[True, True, False], [True, True, True]]


@pytest.mark.parametrize(
    ("text", "same"), [("\x1b[2J", "\\x1b[2J"), ("caf\u00e9", "cafe"), ("\u732b", "?"), ("", " ")]
)
def test_captions_have_letters_of_the_font_alone(text, same):
    """Control characters are escaped, accents left out, other scripts question marks, and no box is drawn."""
    images = np.zeros((1, 1, 96, 96))
    assert np.array_equal(image_grid(images, captions=[text]), image_grid(images, captions=[same]))


@pytest.mark.parametrize("name", ["a.png", "deep/er/a.png", "a.jpg", "a.webp"])
def test_a_sheet_is_saved_in_its_format(tmp_path, name):
    path = save_grid(np.zeros((2, 4, 8, 8)), tmp_path / name)
    with Image.open(path) as image:
        image.load()
        assert image.format == {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[name.split(".")[-1]]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("width", [1, 4, 5, 99])
def test_running_mean_is_the_mean_of_a_window(width):
    values = np.random.default_rng(0).normal(size=23)
    half = width // 2
    expected = [values[max(0, i - half) : i + half + 1].mean() for i in range(23)]
    np.testing.assert_allclose(running_mean(values, width), expected, atol=1e-12)


def ink(path):
    """Pixels of a figure that are not white, and whether it is of a readable size."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) > 600
        return (np.asarray(image.convert("RGB")) < 250).any(-1).sum()


def test_curves_are_drawn(tmp_path):
    rng = np.random.default_rng(0)
    steps = np.arange(1, 400)
    noisy = Curve("training", steps, 1 / steps + rng.uniform(0, 0.01, len(steps)))
    raw = Curve("validation, raw weights", [100, 200], [0.02, 0.01], "raw")
    ema = Curve("validation, EMA weights", [100, 200], [0.03, float("nan")], "ema")
    one = plot_losses(tmp_path / "one.png", [noisy])
    three = plot_losses(tmp_path / "three.png", [noisy, raw, ema])
    assert ink(three) > ink(one) > 5000


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "values",
    [
        [0.5], [0.0, 1.0], [-2.0, 3.0], [1.0, INF], [2.0, 2.0], [0.0] * 60, [NAN, 1.0, -INF], [1.0, 1e308],
        [5e-324, 1e-300, 1e99], [-1e99, 1e99],
    ],
)  # fmt: skip
def test_odd_curves_are_drawn_too(tmp_path, values):
    assert ink(plot_losses(tmp_path / "odd.png", [Curve("training", range(len(values)), values)])) > 5000


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="finite"):
        plot_losses(tmp_path / "none.png", [Curve("training", [1], [float("nan")]), Curve("x", [], [])])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda path: plot_losses(path, [Curve("a", [1, 2], [1])]), "a has steps"),
        (lambda path: plot_losses(path, [Curve("a", [1], [1e308])]), "finite"),
        (lambda path: plot_weights(path, {}, "epsilon"), "positive, finite"),
        (lambda path: plot_weights(path, {"a": [0, NAN, INF, -1]}, "epsilon"), "positive, finite"),
        (lambda path: plot_steps(path, [], []), "finite"),
        (lambda path: plot_steps(path, [0, 1], [NAN, INF]), "finite"),
        (lambda path: plot_steps(path, [0, 1], [1.0]), "as many steps"),
        (lambda path: plot_timesteps(path, {}, 10), "at least one"),
        (lambda path: plot_logvar(path, [], []), "finite"),
        (lambda path: plot_logvar(path, [NAN], [1.0]), "finite"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(draw, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        draw(tmp_path / "none.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: plot_schedule(path, NoiseSchedule(trained_betas=[0.5])),
        lambda path: plot_schedule(path, NoiseSchedule(trained_betas=[1e-6, 0.5, 1.0])),
        lambda path: plot_weights(path, {"a": [0, NAN, INF], "b": [1e-9, 1, 1e9], "c": [3, 3, 3]}, "epsilon"),
        lambda path: plot_steps(path, [7], [0.1]),
        lambda path: plot_steps(path, [0, 1, 2], [0, 0, 0], 0.0),
        lambda path: plot_steps(path, [0, 1, 2, 3], [NAN, 1e-9, 10, -1], 1.0),
        lambda path: plot_steps(path, [0, 1], [1e308, 0.5]),
        lambda path: plot_variance(path, {"v": [NAN, NAN]}),
        lambda path: plot_variance(path, {"v": [0.5], "w": [INF]}),
        lambda path: plot_timesteps(path, {1: [3], 2: [0, 9]}, 10),
        lambda path: plot_logvar(path, [1.0, INF, 2.0], [NAN, 1.0, 2.0]),
    ],
)
def test_odd_tables_are_drawn_without_a_warning(draw, tmp_path):
    assert ink(draw(tmp_path / "odd.png")) > 3000


def test_a_million_values_are_thinned_to_their_means(tmp_path):
    steps = np.arange(1_000_000)
    values = np.where(steps % 2, 3.0, 1.0)
    values[::1000] = NAN
    thinned, means = thin(steps, values)
    assert len(thinned) == len(means) == MAX_PLOTTED
    starts = range(0, 1_000_000, 50)
    np.testing.assert_allclose(thinned[:100], [steps[i : i + 50].mean() for i in starts[:100]])
    np.testing.assert_allclose(means[:100], [np.nanmean(values[i : i + 50]) for i in starts[:100]])
    assert ink(plot_losses(tmp_path / "many.png", [Curve("training", steps, values)])) > 3000
    same = thin(steps[:MAX_PLOTTED], values[:MAX_PLOTTED])
    assert all(np.array_equal(a, b[:MAX_PLOTTED], equal_nan=True) for a, b in zip(same, (steps, values), strict=True))
    uneven, last = thin(np.arange(7.0), np.array([1, 2, 3, 4, 5, 6, NAN]), 3)
    assert uneven.tolist() == [1, 4, 6]
    assert last.tolist()[:2] == [2, 5]
    assert np.isnan(last[2])


def test_logvar_is_drawn_where_it_was_measured(tmp_path):
    learned = np.linspace(0, -3, 100)
    measured = np.where(np.arange(100) % 2, learned + 0.1, np.nan)
    assert ink(plot_logvar(tmp_path / "logvar.png", learned, measured)) > 5000
    assert ink(plot_logvar(tmp_path / "unmeasured.png", learned, np.full(100, np.nan))) > 5000
    with pytest.raises(ValueError, match="must be"):
        plot_logvar(tmp_path / "no.png", learned, measured[1:])


def test_plots_leave_no_figure_and_change_no_setting(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    plot_losses(tmp_path / "a.png", [Curve("training", [1, 2], [1, 2])])
    assert dict(matplotlib.rcParams) == before
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


def test_sheets_need_no_matplotlib(tmp_path):
    """`ddpm-ext sample` runs where only the base packages are installed."""
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import numpy as np; from diffusers_ddpm_ext.plotting.sheets import save_grid\n"
        f"save_grid(np.zeros((4, 3, 8, 8)), {str(tmp_path / 'grid.png')!r})\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "grid.png").exists()


@pytest.mark.parametrize(
    ("suffix", "start"), [("png", b"\x89PNG\r\n"), ("svg", b"<?xml"), ("pdf", b"%PDF-"), ("SVG", b"<?xml")]
)
def test_the_format_is_that_of_the_name(tmp_path, suffix, start):
    path = plot_losses(tmp_path / f"loss.{suffix}", [Curve("training", [1, 2], [1.0, 2.0])])
    assert path.read_bytes().startswith(start)


def test_the_legend_is_below_the_axes(tmp_path, monkeypatch):
    """No part of it is over the curves, however many and long its labels are."""
    figures, original = [], Figure.add_subplot
    monkeypatch.setattr(Figure, "add_subplot", lambda self: figures.append(self) or original(self))
    labels = ["training", "validation, raw weights", "a long name of a run, longer than forty characters, to be sure"]
    for count in (1, 2, 3):
        plot_losses(tmp_path / "loss.png", [Curve(label, [1, 2], [1.0, 2.0]) for label in labels[:count]])
        figure = figures.pop()
        renderer = figure.canvas.get_renderer()
        (legend,), (axes,) = figure.legends, figure.axes
        assert legend.get_window_extent(renderer).y1 <= axes.get_tightbbox(renderer).y0 + 1
        assert legend.get_window_extent(renderer).x0 >= 0


def test_the_legend_of_a_variance_is_as_wide_as_its_figure_at_most(tmp_path, monkeypatch):
    """It has the longest labels of all plots; three of them side by side were cut at both margins."""
    figures, original = [], Figure.add_subplot
    monkeypatch.setattr(Figure, "add_subplot", lambda self: figures.append(self) or original(self))
    curves = {"v_posterior": [0.5, 1.0], "v_decoder: of the first step of a chain": [0.5, 1.0]}
    plot_variance(tmp_path / "variance.png", curves)
    (figure,) = figures
    extent = figure.legends[0].get_window_extent(figure.canvas.get_renderer())
    assert extent.x0 >= 0
    assert extent.x1 <= figure.bbox.width


def test_a_long_log_variance_has_its_mean(tmp_path, monkeypatch):
    """1,000 steps of noise around a line: the smoothed line is nearer to it than the values are."""
    drawn = []
    monkeypatch.setattr(curves, "save_figure", lambda path, draw: draw(Axes()) or path)

    class Axes:
        def plot(self, steps, values, *format, **style):
            drawn.append((np.asarray(values, dtype=float), style.get("label", "")))

        def set(self, **texts):
            pass

    line = np.linspace(-1, 1, 1000)
    noisy = line + np.random.default_rng(0).normal(0, 0.2, 1000)
    plot_logvar(tmp_path / "x.png", noisy, np.full(1000, NAN))
    *_, (values, _), (means, label) = drawn
    assert np.array_equal(values, noisy)
    assert label == "learned log-variance, mean of 25 steps"
    assert np.abs(means - line).mean() < np.abs(values - line).mean() / 3

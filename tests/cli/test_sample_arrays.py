"""`ddpm-ext sample` of other data than 8-bit images: arrays, TIFF and PNG in its dtype and range, and previews."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from helpers.tiny import EXACT, tiny_unet
from PIL import Image

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, cli
from diffusers_ddpm_ext.cli.sample_files import SampleFormat, png_bytes
from diffusers_ddpm_ext.utils.pixel_format import PixelFormat
from diffusers_ddpm_ext.utils.random_keys import generator

COMPONENTS = ((0.5, 0, 0, 0, 0, 0), (0, 0.5, 0, 0, 0, 0), (0, 0, 0, 0, 0.5, 0.25))
FORMATS = {
    "gray": (1, PixelFormat("uint16", 0, 65535, ".png")),
    "two": (2, PixelFormat("int16", -32768, 32767, ".npy")),
    "color": (3, PixelFormat("uint16", 0, 65535, ".png")),
    "alpha": (4, PixelFormat("uint16", 0, 4095, ".png")),
    "bands": (5, PixelFormat("float32", -3.5, 8, ".npy", None, COMPONENTS)),
    "many": (13, PixelFormat("float16", 0, 100, ".tif")),
    "bytes": (3, PixelFormat("uint8", 0, 255, ".npz")),
}
FAST = ("two", "color")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folders of pipelines, by the name of their format, and one of 8-bit images, `plain`."""
    place = tmp_path_factory.mktemp("models")
    for name, (channels, pixels) in (FORMATS | {"plain": (3, None), "plain5": (5, None)}).items():
        pipeline = DDPMExtPipeline(tiny_unet(channels), DDPMExtScheduler(4), pixel_format=pixels)
        pipeline.save_pretrained(place / name)
    return place


@pytest.fixture
def sample(root, tmp_path, monkeypatch):
    """The command, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def command(name: str, *flags: str, count: int = 3) -> int:
        return cli.main(["sample", str(root / name), "--device", "cpu", *EXACT, "--num_images", str(count), *flags])

    return command


def expected_of(root: Path, name: str, count: int = 3) -> np.ndarray:
    """What the pipeline itself draws from the command's noise."""
    pipeline = DDPMExtPipeline.from_pretrained(root / name)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(count, [generator("sample", 0, index) for index in range(count)], output_type="array").images


def read(path: Path) -> np.ndarray:
    """One image of a folder, (H, W, C), by NumPy, tifffile and imagecodecs."""
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".npz":
        return np.load(path)["arr_0"]
    values = tifffile.imread(path) if path.suffix == ".tif" else imagecodecs.png_decode(path.read_bytes())
    return values[..., None] if values.ndim == 2 else values


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in FORMATS]
)
def test_files_hold_the_values_of_the_data(root, sample, name, capsys):
    """One array, the pages of a TIFF and a folder of the data's own type have its dtype, range and channels."""
    channels, pixels = FORMATS[name]
    expected = expected_of(root, name)
    assert expected.dtype == np.dtype(pixels.dtype)
    for out in ("a.npy", "a.npz", "a.tif", "each"):
        assert sample(name, "--out", out) == 0
        assert f"3 images of 8x8x{channels} {pixels.dtype} written to {out}" in capsys.readouterr().out
    np.testing.assert_array_equal(np.load("a.npy"), expected, strict=True)
    np.testing.assert_array_equal(np.load("a.npz")["arr_0"], expected, strict=True)
    np.testing.assert_array_equal(tifffile.imread("a.tif").reshape(expected.shape), expected)
    for index, image in enumerate(expected):
        np.testing.assert_array_equal(read(Path(f"each/{index:05d}{pixels.suffix}")), image, strict=True)


@pytest.mark.parametrize(
    "kind", ["tif", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("npy", "npz", "png"))]
)
def test_the_type_of_a_folder_is_chosen(root, sample, kind):
    """--format, also for --individual; the same command resumes, with another format it is refused."""
    name = "color" if kind == "png" else "bands"
    line = ["--format", kind, "--batch_size", "2"]
    assert sample(name, "--out", "each", *line, count=2) == 0
    assert sample(name, "--out", "a.npy", "--individual", "beside", *line) == 0
    broken = Path(f"each/00001.{kind}")
    broken.write_bytes(broken.read_bytes()[:-9])
    assert sample(name, "--out", "each", *line) == 0  # one exists, one is cut off, one is missing
    for index, image in enumerate(expected_of(root, name)):
        for folder in ("each", "beside"):
            values = read(Path(f"{folder}/{index:05d}.{kind}"))
            assert values.dtype == image.dtype
            np.testing.assert_allclose(values, image, rtol=0, atol=1 if kind == "png" else 1e-4)  # in batches of two
    assert sample(name, "--out", "each", "--format", "tif" if kind == "npy" else "npy") == 2


def test_one_png_of_a_16_bit_model_is_the_image(root, sample):
    """At its own size with all bits; several are a grid, which is a preview."""
    assert sample("color", "--out", "one.png", count=1) == 0
    np.testing.assert_array_equal(read(Path("one.png")), expected_of(root, "color", 1)[0], strict=True)
    assert sample("color", "--out", "grid.png") == 0
    with Image.open("grid.png") as grid:
        assert grid.mode == "RGB"
        assert min(grid.size) > 90


def test_bit_depth_makes_pictures_of_the_values(root, sample):
    """Unsigned integers of the range, as for 8-bit models, also of color in 16 bits."""
    fractions = (expected_of(root, "alpha") / 4095).astype(np.float64)
    for depth in (8, 16):
        assert sample("alpha", "--bit_depth", str(depth), "--out", f"{depth}") == 0
        for index, image in enumerate(fractions):
            levels = read(Path(f"{depth}/{index:05d}.png"))
            assert levels.dtype == np.dtype(f"uint{depth}")
            np.testing.assert_allclose(levels / (2**depth - 1), image, atol=0.5 / 4095 + 0.5 / (2**depth - 1))
    assert sample("plain", "--bit_depth", "16", "--out", "color") == 0
    assert read(Path("color/00000.png")).dtype == np.uint16


def test_8_bit_models_write_what_they_did(root, sample):
    """float32 in [0, 1] as .npy, uint8 as .npz, TIFF and files; the record of the folder has its old keys."""
    levels = expected_of(root, "plain")
    for out in ("a.npy", "a.npz", "a.tif", "each"):
        assert sample("plain", "--out", out) == 0
    assert np.load("a.npy").dtype == np.float32
    for stored in (np.load("a.npz")["arr_0"], tifffile.imread("a.tif")):
        assert stored.dtype == np.uint8
        assert np.abs(stored.astype(int) - levels).max() <= 1
    record = json.loads(Path("each/samples.json").read_text())
    assert record["bit_depth"] == 8
    assert not {"values", "format", "pixel_format", "preview_channels"} & record.keys()


@pytest.mark.parametrize(
    ("name", "flags", "drawn"),
    [
        ("two", [], lambda x: x[..., 0]),
        ("bands", [], lambda x: np.stack([x[..., 0] / 2, x[..., 1] / 2, x[..., 4] / 2 + 0.25], axis=-1)),
        ("bands", ["--preview_channels", "4", "0", "2"], lambda x: x[..., [4, 0, 2]]),
        pytest.param("bands", ["--preview_channels", "3"], lambda x: x[..., 3], marks=pytest.mark.slow),
        pytest.param("plain5", [], lambda x: x[..., 0], marks=pytest.mark.slow),
    ],
)
def test_grids_show_a_preview(root, sample, name, flags, drawn):
    """The chosen channels, the recorded components or the first channel, by hand; a video shows the same."""
    pixels = FORMATS.get(name, (5, PixelFormat()))[1]
    images = drawn(pixels.to_model(expected_of(root, name, 1))[0]).clip(-1, 1)
    assert sample(name, "--out", "a.png", *flags, count=1) == 0
    with Image.open("a.png") as picture:
        grid = np.asarray(picture)[:96:12, :96:12] / 127.5 - 1
    np.testing.assert_allclose(grid, images, atol=2 / 255)
    assert sample(name, "--out", "a.gif", *flags, count=1) == 0
    with Image.open("a.gif") as video:
        video.seek(video.n_frames - 1)
        last = np.asarray(video.convert("RGB"))[:96:12, :96:12] / 127.5 - 1
    np.testing.assert_allclose(last if images.ndim == 3 else last[..., 0], images, atol=0.2)  # of 256 colors


@pytest.mark.parametrize(
    ("name", "flags", "answer"),
    [
        ("bands", ["--out", "each", "--format", "png"], "the samples have 5 of float32: add --format npy, npz or tif"),
        ("plain5", ["--out", "each"], "the samples have 5 of uint8: add --format npy"),
        ("two", ["--out", "each", "--format", "png"], "the samples have 2 of int16"),
        ("bands", ["--out", "a.npy", "--format", "npy"], "--format npy has no effect"),
        ("bands", ["--out", "a.npy", "--preview_channels", "1"], "--preview_channels has no effect"),
        ("bands", ["--out", "a.png", "--preview_channels", "0", "1"], "--preview_channels"),
        (
            "bands",
            ["--out", "a.png", "--preview_channels", "0", "1", "5"],
            "--preview_channels: preview_channels=[0, 1,",
        ),
        ("bands", ["--out", "a.png", "--preview_channels", "-1"], "--preview_channels"),
        ("bands", ["--out", "a.png", "--format", "jpg"], "--format"),
        ("bands", ["--out", "a.hdf5"], "must end in one of"),
    ],
)
def test_what_cannot_be_written_is_one_line(sample, name, flags, answer, capsys):
    """Refused before a network is loaded, and nothing is written."""
    assert sample(name, *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert answer in error
    assert list(Path().iterdir()) == []


def test_a_damaged_record_of_the_format_is_one_line(root, sample, tmp_path, capsys):
    """A hand-edited model_index.json."""
    index = root / "two" / "model_index.json"
    content = index.read_text()
    try:
        index.write_text(content.replace('"int16"', '"int24"'))
        assert sample("two", "--out", "a.npy") == 2
    finally:
        index.write_text(content)
    assert "model_index.json: pixel_format: dtype='int24' is unknown" in capsys.readouterr().err


def test_tiff_names_the_package_it_needs(sample, monkeypatch, capsys):
    """Without tifffile, one line with the way to install it."""
    monkeypatch.setitem(sys.modules, "tifffile", None)
    for flags in (["--out", "a.tif"], ["--out", "each"]):
        assert sample("many", *flags) == 2
        assert "needs tifffile: pip install diffusers-ddpm-ext[arrays]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("form", "photometric", "extra"),
    [
        (SampleFormat(3), "RGB", ()),
        (SampleFormat(4), "RGB", ("UNASSALPHA",)),
        (SampleFormat(4, PixelFormat("uint16", 0, 65535)), "RGB", ("UNASSALPHA",)),
        (SampleFormat(4, PixelFormat("uint16", 0, 65535, ".tif")), "MINISBLACK", ("UNSPECIFIED",) * 3),
        (SampleFormat(3, PixelFormat("float32", 0, 1, ".tif")), "MINISBLACK", ("UNSPECIFIED",) * 2),
    ],
)
def test_tiff_says_what_the_channels_are(tmp_path, form, photometric, extra):
    """Color, transparency of pictures, and channels without a meaning."""
    image = np.random.default_rng(0).uniform(0, 1, (6, 5, form.channels)).astype(form.own.dtype if form.own else "f4")
    form.save(tmp_path / "a.tif", image)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        page = file.pages[0]
        assert page.photometric.name == photometric
        assert tuple(each.name for each in page.extrasamples) == extra
        np.testing.assert_array_equal(page.asarray(), form.values(image))


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_files_are_read_by_other_programs(channels, dtype):
    """imagecodecs (libpng) and Pillow decode every value."""
    values = np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, (7, 5, channels)).astype(dtype)
    decoded = imagecodecs.png_decode(png_bytes(values))
    np.testing.assert_array_equal(decoded.reshape(values.shape), values)
    assert decoded.dtype == dtype

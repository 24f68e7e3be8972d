"""Options of size, crop and background as they reach the images, and what the plan says of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.training.data.dataset import load_data
from diffusers_ddpm_ext.training.data.geometry import describe_geometry

RNG = np.random.default_rng(0)
ORIENTATION = 274
LANCZOS, NEAREST = Image.Resampling.LANCZOS, Image.Resampling.NEAREST


def levels(folder: Path, **options) -> np.ndarray:
    """All images of a folder as they are stored, (n, h, w, C)."""
    data = load_data(DataOptions(train_data_dir=str(folder), **{"validation_fraction": 0, **options}))
    return data.train.load_levels(range(len(data.train))).values.permute(0, 2, 3, 1).numpy()


def color(height: int, width: int, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize(
    ("options", "prepare"),
    [
        ({"resize": "stretch", "resize_filter": "lanczos"}, lambda image: image.resize((20, 12), LANCZOS)),
        ({"resize": "stretch", "resize_filter": "nearest"}, lambda image: image.resize((20, 12), NEAREST)),
        ({"resize": "pad"}, lambda image: ImageOps.pad(image, (20, 12), Image.Resampling.BILINEAR, "black")),
        (
            {"resize": "pad", "resize_filter": "hamming", "background": "#204060"},
            lambda image: ImageOps.pad(image, (20, 12), Image.Resampling.HAMMING, "#204060"),
        ),
    ],
)  # fmt: skip
def test_photographs_are_prepared_as_pillow_does(options, prepare, tmp_path):
    """Upright first: the camera's orientation decides what is wide."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    for number, size in enumerate([(30, 44), (44, 30), (7, 9)]):
        Image.fromarray(color(*size)).save(tmp_path / f"{number}.png", exif=exif)
    expected = []
    for path in sorted(tmp_path.iterdir()):
        with Image.open(path) as image:
            expected.append(np.asarray(prepare(ImageOps.exif_transpose(image))))
    np.testing.assert_array_equal(levels(tmp_path, resolution=(12, 20), **options), np.stack(expected))


@pytest.mark.parametrize("background", [None, "white", "black", "#ff8800"])
@pytest.mark.parametrize("kind", ["RGBA", "LA", "P"])
def test_transparency_is_put_on_the_background(kind, background, tmp_path):
    image = Image.fromarray(color(9, 16, 4))
    image = image.quantize(16) if kind == "P" else image.convert(kind)
    image.save(tmp_path / "a.png")
    backdrop = Image.new("RGBA", (16, 9), background or "white")
    with Image.open(tmp_path / "a.png") as saved:
        backdrop.alpha_composite(saved.convert("RGBA"))
    options = {} if background is None else {"background": background}
    stored = levels(tmp_path, resolution=(9, 16), channels=3, **options)
    np.testing.assert_array_equal(stored[0], np.asarray(backdrop.convert("RGB")))
    padded = levels(tmp_path, resolution=(16, 16), channels=3, resize="pad", **options)[0]
    np.testing.assert_array_equal(padded[4:13], stored[0])
    assert tuple(padded[0, 0]) == Image.new("RGB", (1, 1), background or "white").getpixel((0, 0))


@pytest.mark.parametrize(
    ("dtype", "options"), [("float32", {}), ("int16", {"data_range": (-1024, 3071)}), ("uint16", {})]
)
def test_arrays_of_five_channels_are_padded_with_their_lowest_level(dtype, options, tmp_path):
    low, high = options.get("data_range", (0, 1) if dtype == "float32" else (0, 65535))
    array = (low + RNG.random((8, 12, 5)) * (high - low)).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    stored = levels(tmp_path, resolution=(12, 12), resize="pad", **options)[0]
    np.testing.assert_array_equal(stored[2:10], array)
    assert (stored[[0, 1, 10, 11]] == low).all()
    white = levels(tmp_path, resolution=(12, 12), resize="pad", background="white", **options)[0]
    assert (white[0] == high).all()


def test_the_plan_says_how_many_files_have_several_frames(tmp_path):
    frames = [Image.fromarray(color(16, 16)) for _ in range(3)]
    for name in ("a.gif", "b.png", "c.webp", "d.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "e.mpo", save_all=True, append_images=frames[1:])  # parts of one photograph
    frames[0].save(tmp_path / "f.png")
    data = load_data(DataOptions(train_data_dir=str(tmp_path), resolution=(16, 16), validation_fraction=0))
    assert "the first of several frames in 4 files" in data.description
    first = data.train.load_levels([1]).values[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(first, np.asarray(frames[0]))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, ["random crop"]),
        ({"center_crop": True, "random_flip": True}, ["center crop", "random flip"]),
        ({"resize": "pad", "resize_filter": "bicubic"}, ["padded", "resized with bicubic"]),
        (
            {"resize": "stretch", "rotate90": True, "vertical_flip": True},
            ["stretched", "vertical flip", "quarter turns"],
        ),
        ({"random_crop": "before"}, ["random crop of 0.8 to 1 of each image before resizing"]),
    ],
)
def test_the_plan_says_what_is_done(options, parts):
    assert describe_geometry(DataOptions(**options)) == parts
    whole = [part for part in parts if part not in ("random crop", "center crop")]
    assert describe_geometry(DataOptions(**options), is_cropped=False) == whole

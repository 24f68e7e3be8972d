"""Resizing against Pillow's own functions, for 8-bit images and for arrays of every dtype and number of channels."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageOps

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.data.resizing import Resizing, Surface, fit, parse_color, resample

RNG = np.random.default_rng(0)
FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
DTYPES = ("uint8", "uint16", "int16", "uint32", "float16", "float32", "float64")
SIZES = [(20, 30), (5, 61)]
PLAIN = Surface()


def noise(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values over the whole range of an integer dtype, around 0 for floats."""
    if np.dtype(dtype).kind == "f":
        return RNG.normal(0, 3, shape).astype(dtype)
    limits = np.iinfo(dtype)
    return RNG.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)


def in_float64(values: np.ndarray, size: tuple[int, int], name: str) -> np.ndarray:
    """Pillow's resampling (Resample.c) as two matrix products in float64, the oracle of what float32 cannot hold."""
    kernels = {
        "box": (0.5, lambda x: ((x > -0.5) & (x <= 0.5)).astype(float)),
        "bilinear": (1.0, lambda x: np.maximum(0, 1 - abs(x))),
        "hamming": (1.0, lambda x: np.where(abs(x) < 1, np.sinc(x) * (0.54 + 0.46 * np.cos(np.pi * x)), 0)),
        "bicubic": (2.0, cubic),
        "lanczos": (3.0, lambda x: np.where(abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)),
    }

    def matrix(count: int, new: int) -> np.ndarray:
        support, kernel = kernels[name]
        scale = count / new
        stretch = max(scale, 1)
        centers = (np.arange(new)[:, None] + 0.5) * scale
        weights = kernel((np.arange(count) + 0.5 - centers) / stretch)
        low = np.maximum((centers - support * stretch + 0.5).astype(int), 0)
        high = np.minimum((centers + support * stretch + 0.5).astype(int), count)
        weights = np.where((np.arange(count) >= low) & (np.arange(count) < high), weights, 0)
        return weights / weights.sum(1, keepdims=True)

    rows, columns = matrix(values.shape[0], size[0]), matrix(values.shape[1], size[1])
    return np.einsum("ih,hwc,jw->ijc", rows, values.astype(np.float64), columns)


def cubic(x: np.ndarray) -> np.ndarray:
    x = abs(x)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_images_of_8_bits_are_pillows(name, mode):
    channels = len(mode)
    values = noise("uint8", (33, 47, channels))
    image = Image.fromarray(values[..., 0] if channels == 1 else values)
    for size in SIZES:
        expected = np.atleast_3d(np.asarray(image.resize(size[::-1], Image.Resampling[name.upper()])))
        surface = Surface(has_alpha=mode == "RGBA")
        np.testing.assert_array_equal(fit(image, size, Resizing("stretch", name), False, surface), expected)
        np.testing.assert_array_equal(resample(values, size, name, surface), expected)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_of_any_dtype_and_number_of_channels(name, dtype):
    values = noise(dtype, (33, 47, 5))
    for size in SIZES:
        result = resample(values, size, name, PLAIN)
        assert (result.shape, result.dtype) == ((*size, 5), np.dtype(dtype))
        if name == "nearest":
            rows = ((np.arange(size[0]) + 0.5) * 33 / size[0]).astype(int)
            columns = ((np.arange(size[1]) + 0.5) * 47 / size[1]).astype(int)
            np.testing.assert_array_equal(result, values[rows[:, None], columns])
            continue
        if dtype == "uint8":  # each channel as Pillow resizes one of 8 bits, which rounds and clips in between
            planes = [Image.fromarray(values[..., c]) for c in range(5)]
            expected = [np.asarray(plane.resize(size[::-1], Image.Resampling[name.upper()])) for plane in planes]
            np.testing.assert_array_equal(result, np.stack(expected, -1))
            continue
        integers = np.iinfo(dtype) if result.dtype.kind in "iu" else None
        low, high = (integers.min, integers.max) if integers else (values.min(), values.max())
        exact = in_float64(values, size, name).clip(float(low), float(high))
        span = float(values.max()) - float(values.min())
        rounding = {"i": 0.5, "u": 0.5, "f": 4e-3 if dtype == "float16" else 0}[result.dtype.kind]
        tolerance = rounding + 1e-6 * span
        assert np.abs(result.astype(np.float64) - exact).max() <= tolerance


@pytest.mark.parametrize("name", FILTERS[1:])
def test_float32_equals_pillows_floats(name):
    values = RNG.random((33, 47, 3), np.float32)
    for size in SIZES:
        planes = [Image.fromarray(values[..., c]).resize(size[::-1], Image.Resampling[name.upper()]) for c in range(3)]
        expected = np.stack([np.asarray(plane) for plane in planes], -1)
        np.testing.assert_array_equal(resample(values, size, name, PLAIN), expected.clip(0, 1))


@pytest.mark.parametrize("offset", [0.0, 1e9, -1e300])
def test_float64_keeps_what_float32_cannot_hold(offset):
    values = RNG.random((40, 40, 1)) * max(1.0, abs(offset) * 1e-9) + offset
    result = resample(values, (10, 10), "bilinear", PLAIN)
    exact = in_float64(values, (10, 10), "bilinear")
    assert np.abs(result - exact).max() <= 3e-7 * np.ptp(values) + 8 * np.spacing(abs(offset))
    constant = np.full((9, 9, 1), 12345678.000001)
    np.testing.assert_array_equal(resample(constant, (4, 4), "lanczos", PLAIN), constant[:4, :4])


def test_overshoot_is_clipped_to_the_limits():
    step = np.zeros((8, 16, 1), np.float32)
    step[:, 8:] = 1
    for name in ("bicubic", "lanczos"):
        overshot = np.asarray(Image.fromarray(step[..., 0]).resize((64, 32), Image.Resampling[name.upper()]))
        assert overshot.max() > 1.02
        result = resample(step, (32, 64), name, PLAIN)
        np.testing.assert_array_equal(result[..., 0], overshot.clip(0, 1))
        wide = resample(step, (32, 64), name, Surface(limits=(-1, 2)))
        np.testing.assert_array_equal(wide[..., 0], overshot)


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_transparency_of_deep_images_is_weighed_like_that_of_8_bits(dtype):
    """The color of transparent pixels must not leak, as in Pillow's RGBA."""
    values = noise("uint8", (24, 24, 4))
    values[:12, :, 3] = 0
    expected = np.asarray(Image.fromarray(values).resize((9, 9), Image.Resampling.BILINEAR)).astype(float)
    deep = (values.astype(np.float64) * (257 if dtype == "uint16" else 1 / 255)).astype(dtype)
    result = resample(deep, (9, 9), "bilinear", Surface(has_alpha=True)) / (257 if dtype == "uint16" else 1 / 255)
    opaque = expected[..., 3] > 40
    assert np.abs(result - expected)[opaque].max() < 6  # Pillow rounds premultiplied colors to 8 bits
    assert (result[expected[..., 3] == 0] == 0).all()


# ---------------------------------------------------------------- modes


@pytest.mark.parametrize("own", [(40, 60), (100, 40), (10, 15), (20, 30)])
@pytest.mark.parametrize("size", [(20, 30), (16, 16), (32, 8)])
@pytest.mark.parametrize("color", [None, "white", "#336699"])
def test_padding_is_pillows(own, size, color):
    image = Image.fromarray(noise("uint8", (*own, 3)))
    expected = np.asarray(ImageOps.pad(image, size[::-1], Image.Resampling.BICUBIC, color or "black"))
    np.testing.assert_array_equal(fit(image, size, Resizing("pad", "bicubic", color), False, PLAIN), expected)


@pytest.mark.parametrize("own", [(40, 60), (100, 40), (10, 15), (20, 30)])
def test_cropping_covers_the_size_from_its_center(own):
    """ImageOps.fit is the crop first: its pixels are the same up to the place of the cut, less than one pixel."""
    image = Image.fromarray(np.add.outer(np.arange(own[0]), np.arange(own[1])).astype(np.uint8))
    result = fit(image, (20, 30), Resizing(), True, PLAIN)
    expected = np.asarray(ImageOps.fit(image, (30, 20), Image.Resampling.BILINEAR))
    assert result.shape == (20, 30, 1)
    assert np.abs(result[..., 0].astype(int) - expected).max() <= max(own[0] / 20, own[1] / 30) + 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_border_of_an_array_is_a_level_of_its_range(dtype):
    values = np.full((4, 8, 5), 1, dtype)
    floats = np.dtype(dtype).kind == "f"
    low, high = (0, 1) if floats else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    for color, level in ((None, low), ("black", low), ("white", high)):
        padded = fit(values, (8, 8), Resizing("pad", background=color), False, PLAIN)
        assert (padded[[0, 1, 6, 7]] == np.array(level, dtype)).all()
        np.testing.assert_array_equal(padded[2:6], values)
    padded = fit(values, (8, 8), Resizing("pad"), False, Surface(limits=(1, 3)))
    assert (padded == 1).all()
    with pytest.raises(ConfigError, match=r"--background red: images of 5 channels have no colors"):
        fit(values, (8, 8), Resizing("pad", background="red"), False, PLAIN)


def test_the_border_continues_what_is_behind_transparency():
    image = Image.new("RGB", (8, 4), "white")
    assert (fit(image, (8, 8), Resizing("pad"), False, Surface(was_transparent=True)) == 255).all()
    assert (fit(image, (8, 8), Resizing("pad"), False, PLAIN)[0] == 0).all()
    rgba = fit(Image.new("RGBA", (8, 4), "white"), (8, 8), Resizing("pad"), False, Surface(has_alpha=True))
    assert (rgba[0] == 0).all()


def test_colors_are_named_or_hexadecimal():
    assert parse_color("white") == (255, 255, 255)
    assert parse_color(" #F80 ") == (255, 136, 0)
    assert parse_color("rebeccapurple") == (102, 51, 153)
    for wrong in ("", "transparent", "#ff", "#ff880080", "0", "whit e", "\x1b[31m"):
        with pytest.raises(ConfigError, match=r"--background .*must be an opaque color") as caught:
            parse_color(wrong)
        assert "\x1b" not in str(caught.value)


def test_strips_are_refused_where_they_would_become_large():
    strip = Image.new("L", (30_000, 2))
    with pytest.raises(ValueError, match="are a strip"):
        fit(strip, (64, 64), Resizing(), False, PLAIN)
    assert fit(strip, (64, 64), Resizing("stretch"), False, PLAIN).shape == (64, 64, 1)
    padded = fit(Image.new("L", (30_000, 2), 9), (64, 64), Resizing("pad"), False, PLAIN)
    assert padded[..., 0].any(1).sum() == 1  # at least a line of the image is left


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_part_is_that_of_the_resized_whole(name, dtype):
    """Resizing by 1/2 and cropping is resizing the part: away from nothing, at every pixel."""
    values = noise(dtype, (40, 60, 1))
    whole = resample(values, (20, 30), name, Surface(limits=(-1e3, 1e3)))
    part = resample(values, (8, 10), name, Surface(limits=(-1e3, 1e3)), box=(12, 8, 32, 24))
    np.testing.assert_array_equal(part, whole[4:12, 6:16])

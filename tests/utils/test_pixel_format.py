"""Tests of utils/pixel_format.py: from the data's values to the model's and back, and its JSON."""

import json

import numpy as np
import pytest

from diffusers_ddpm_ext.utils.pixel_format import PixelFormat

DTYPES = ("uint8", "uint16", "int16", "uint32", "float16", "float32", "float64")


def full_range(dtype: str, **fields) -> PixelFormat:
    """The range that is the default for a dtype."""
    low, high = (0, 1) if dtype.startswith("float") else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    return PixelFormat(dtype, low, high, ".npy", **fields)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
def test_every_level_survives_the_model(dtype):
    """All values of the dtype come back, although the model has them in float32."""
    pixels = full_range(dtype)
    values = np.arange(pixels.low, pixels.high + 1).astype(dtype)
    assert len(values) == pixels.num_levels
    back = pixels.from_model(pixels.to_model(values))
    assert back.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(back, values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ends_of_the_range_are_exact_and_the_rest_is_clipped(dtype):
    """-1 and 1 are the ends, in both directions, and nothing leaves the range."""
    pixels = full_range(dtype)
    ends = np.array([pixels.low, pixels.high], dtype)
    assert pixels.to_model(ends).tolist() == [-1, 1]
    assert pixels.to_model(ends).dtype == np.float32
    np.testing.assert_array_equal(pixels.from_model([-1, 1, -7.5, 1.0001]), ends[[0, 1, 0, 1]])


def test_8_bit_levels_are_the_16_bit_levels_times_257():
    """Level v of 255 and level 257 v of 65535 are the same brightness: the model gets the same float."""
    levels = np.arange(256)
    wide = full_range("uint16").to_model((257 * levels).astype(np.uint16))
    np.testing.assert_array_equal(PixelFormat().to_model(levels.astype(np.uint8)), wide)
    np.testing.assert_array_equal(wide, (2 * levels.astype(np.float32) - 255) / np.float32(255))


def test_integers_are_rounded_half_to_even():
    """Between two levels the even one is taken, NumPy's and IEEE's rule, which has no bias."""
    pixels = PixelFormat("int16", -2, 2, ".npy")  # levels lie 0.5 apart
    np.testing.assert_array_equal(pixels.from_model([-0.75, -0.25, 0.25, 0.75, 0.3]), [-2, 0, 0, 2, 1])


@pytest.mark.parametrize(("dtype", "digits"), [("float16", 5e-4), ("float32", 1e-7), ("float64", 1e-7)])
def test_floats_come_back_to_their_precision(dtype, digits):
    """A range that is not symmetric, such as degrees; float64 has the precision of the model, float32."""
    pixels = PixelFormat(dtype, -40, 60.5, ".tif")
    values = np.random.default_rng(0).uniform(-40, 60.5, 1000).astype(dtype)
    assert pixels.num_levels is None
    np.testing.assert_allclose(pixels.from_model(pixels.to_model(values)), values, atol=100.5 * digits, rtol=0)


def test_the_largest_ranges_do_not_overflow():
    """The whole range of float64 and of uint32: no infinity on the way."""
    top = np.finfo(np.float64).max
    pixels = PixelFormat("float64", -top, top, ".npy")
    assert pixels.to_model([-top, 0, top]).tolist() == [-1, 0, 1]
    assert pixels.from_model([-1, 0, 1]).tolist() == [-top, 0, top]
    assert full_range("uint32").from_model([-1, 1]).tolist() == [0, 2**32 - 1]
    assert full_range("uint32").num_levels == 2**32


def test_ends_are_those_that_the_dtype_can_hold():
    """A float32 file with the value 0.1 is inside the range 0 to 0.1."""
    pixels = PixelFormat("float32", 0, 0.1, ".npy")
    assert pixels.high == float(np.float32(0.1)) != 0.1
    assert PixelFormat("uint16", np.uint16(3), np.float32(4095), ".tif").to_dict()["high"] == 4095


@pytest.mark.parametrize("dtype", DTYPES)
def test_json_round_trip(dtype):
    """What JSON holds is the whole format."""
    components = ((0.5, -0.25, 0.0), (0.0, 1e-9, 0.125), (1.0, 2.0, -3.0))
    for fields in ({}, {"preview_channels": (3, 1, 0)}, {"preview_components": components}):
        pixels = full_range(dtype, **fields)
        assert PixelFormat.from_dict(json.loads(json.dumps(pixels.to_dict()))) == pixels


def test_ordinary_images_are_the_default():
    """uint8 in 0..255 is 8-bit; a part of that range is not, since its levels mean something else."""
    assert PixelFormat().is_8_bit
    assert PixelFormat(suffix=".npy").is_8_bit
    assert not PixelFormat("uint8", 0, 100).is_8_bit
    assert PixelFormat("uint8", 0, 100).num_levels == 101


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"dtype": "int64"}, "dtype='int64'"),
        ({"dtype": 8}, "dtype=8"),
        ({"low": -1}, "low=-1 must be an integer from 0 to 255"),
        ({"high": 256}, "high=256"),
        ({"high": 100.5}, "high=100.5 must be an integer"),
        ({"high": float("nan")}, "high=nan"),
        ({"high": "255"}, "high='255'"),
        ({"high": True}, "high=True"),
        ({"low": 255}, "low=255 must be smaller than high=255"),
        ({"dtype": "float16", "high": 70000, "suffix": ".npy"}, "high=70000"),
        ({"dtype": "float32", "low": 1, "high": 1 + 1e-12, "suffix": ".npy"}, "low=1.0 must be smaller"),
        ({"dtype": "float32", "low": float("-inf"), "suffix": ".npy"}, "low=-inf"),
        ({"suffix": ".jpg"}, "suffix='.jpg'"),
        ({"dtype": "float32", "high": 1}, "suffix='.png' cannot hold float32"),
        ({"preview_channels": (0, 1)}, "preview_channels"),
        ({"preview_channels": (0, 1, -1)}, "preview_channels=-1"),
        ({"preview_channels": "012"}, "preview_channels='012'"),
        ({"preview_channels": [0.5]}, "preview_channels=0.5"),
        ({"preview_components": [[1, 2]]}, "preview_components=[[1, 2]]"),
        ({"preview_components": [[1, 2], [1, 2], [1]]}, "rows of 2, 2, 1 numbers"),
        ({"preview_components": [[1, 2], [1, 2], [1, None]]}, "=None must be a finite number"),
        ({"gamma": 2}, "unknown key 'gamma'"),
    ],
)
def test_wrong_descriptions_name_the_value(fields, named):
    """A hand-written or damaged model_index.json is one sentence."""
    content = PixelFormat().to_dict() | fields
    with pytest.raises(ValueError, match="pixel_format") as error:
        PixelFormat.from_dict(content)
    assert named in str(error.value)


@pytest.mark.parametrize("content", [None, [], "uint8", {"dtype": "uint8", "low": 0, "high": 255}])
def test_descriptions_of_another_form_are_refused(content):
    """No object, or one without a key."""
    with pytest.raises(ValueError, match="pixel_format"):
        PixelFormat.from_dict(content)


def test_nan_is_no_pixel():
    """NumPy would make 0 or the lowest integer of it."""
    with pytest.raises(ValueError, match="1 NaN"):
        full_range("uint16").from_model([0.0, float("nan")])

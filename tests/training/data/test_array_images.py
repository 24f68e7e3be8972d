"""Arrays of any dtype, layout and number of channels are read without loss; what is ambiguous or wrong is named."""

from __future__ import annotations

import io
import sys
from itertools import product

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from diffusers_ddpm_ext.errors import ConfigError, RunError
from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.training.data.array_images import ArrayReading, UnreadableImage, UnsupportedImage
from diffusers_ddpm_ext.training.data.dataset import load_data
from diffusers_ddpm_ext.training.data.image_files import ListCell
from diffusers_ddpm_ext.training.data.image_store import LazyImages
from diffusers_ddpm_ext.training.data.pixel_values import full_range, to_pixels
from diffusers_ddpm_ext.training.data.raw_image import read_image
from diffusers_ddpm_ext.utils.pixel_format import FLOAT_DTYPES, INTEGER_DTYPES, PixelFormat

RNG = np.random.default_rng(0)
SIZE = (6, 7)
DTYPES = (*INTEGER_DTYPES, *FLOAT_DTYPES)


def values(dtype: str, channels: int | None = 3) -> np.ndarray:
    """Random values over the whole range of the dtype, with both ends of it; floats in [0, 1]."""
    shape = SIZE if channels is None else (*SIZE, channels)
    if np.dtype(dtype).kind == "f":
        drawn = RNG.random(shape).astype(dtype)
        drawn.flat[:2] = 0, 1
        return drawn
    limits = np.iinfo(dtype)
    drawn = RNG.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    drawn.flat[:2] = limits.min, limits.max
    return drawn


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def tiff(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def folder_data(folder, **options):
    defaults = {"resolution": SIZE, "validation_fraction": 0.0, "cache_images": "never"}
    return load_data(DataOptions(train_data_dir=str(folder), **(defaults | options)))


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(("dtype", "order", "channels"), [*product(DTYPES, "<>", (None, 1, 2, 5))])
def test_npy_is_read_as_it_is(dtype, order, channels):
    array = values(dtype, channels)
    for fortran in (False, True):
        stored = np.asfortranarray(array) if fortran else array
        raw = read_image(npy(stored.astype(np.dtype(dtype).newbyteorder(order))))
        assert (raw.values.dtype, raw.suffix) == (np.dtype(dtype), ".npy")
        np.testing.assert_array_equal(raw.values, array.reshape(*SIZE, channels or 1))


def test_npz_has_one_array_or_a_key(tmp_path):
    array = values("float32", 2)
    np.savez(tmp_path / "one.npz", array)
    np.savez_compressed(tmp_path / "two.npz", image=array, mask=array[..., 0] > 0.5)
    np.testing.assert_array_equal(read_image(tmp_path / "one.npz").values, array)
    np.testing.assert_array_equal(read_image(tmp_path / "two.npz", ArrayReading("image")).values, array)
    with pytest.raises(UnsupportedImage, match=r"holds 2 arrays: image, mask; name one of them by --array_key$"):
        read_image(tmp_path / "two.npz")
    with pytest.raises(UnsupportedImage, match=r"has no array 'picture': it has image, mask"):
        read_image(tmp_path / "two.npz", ArrayReading("picture"))


TIFFS = {
    "float": (values("float32", None), {}),
    "double": (values("float64", None), {}),
    "half": (values("float16", None), {}),
    "signed": (values("int16", None), {}),
    "32 bits": (values("uint32", None), {}),
    "16 bits": (values("uint16", None), {}),
    "16-bit color": (values("uint16", 3), {"photometric": "rgb"}),
    "16-bit color with alpha": (values("uint16", 4), {"photometric": "rgb"}),
    "float color": (values("float32", 3), {"photometric": "rgb"}),
    "five bands": (values("float32", 5), {"photometric": "minisblack", "planarconfig": "contig"}),
    "five bands of 8 bits": (values("uint8", 5), {"photometric": "minisblack", "planarconfig": "contig"}),
    "two bands of 8 bits": (values("uint8", 2), {"photometric": "minisblack", "planarconfig": "contig"}),
    "color and infrared": (values("uint8", 4), {"photometric": "rgb", "extrasamples": ["unspecified"]}),
    "color and two bands": (values("uint8", 5), {"photometric": "rgb", "planarconfig": "contig"}),
    "big-endian": (values("uint16", 3), {"photometric": "rgb", "byteorder": ">"}),
    "BigTIFF": (values("uint16", 3), {"photometric": "rgb", "bigtiff": True}),
    "compressed": (values("float32", 3), {"photometric": "rgb", "compression": "zlib", "predictor": True}),
    "tiled": (values("uint16", 3), {"photometric": "rgb", "tile": (16, 16)}),
    "pages of one array": (values("float32", 3), {"photometric": "minisblack"}),
}


@pytest.mark.parametrize("name", TIFFS)
def test_tiff_of_any_depth_and_number_of_bands(name):
    array, options = TIFFS[name]
    raw = read_image(tiff(array, **options))
    assert (raw.values.dtype, raw.suffix) == (array.dtype, ".tif")
    assert raw.has_alpha == (name == "16-bit color with alpha")
    np.testing.assert_array_equal(raw.values, array if array.ndim == 3 else array[..., None])


def test_planes_and_channels_of_tiff_become_the_last_axis():
    array = values("float32", 5)
    planes = array.transpose(2, 0, 1).copy()
    for options in (
        {"photometric": "minisblack", "planarconfig": "separate"},
        {"imagej": True, "metadata": {"axes": "CYX"}},
    ):
        np.testing.assert_array_equal(read_image(tiff(planes, **options)).values, array)
    with pytest.raises(UnsupportedImage, match="--array_layout"):  # tifffile does not write which axis is which
        read_image(tiff(planes, photometric="minisblack"))


def test_of_a_stack_over_time_the_first_image_is_used():
    stack = values("float32", 4).transpose(2, 0, 1).copy()
    raw = read_image(tiff(stack, imagej=True, metadata={"axes": "TYX"}))
    assert raw.is_animated
    np.testing.assert_array_equal(raw.values[..., 0], stack[0])


def test_white_is_zero_and_orientation():
    array = values("uint16", 3)
    inverted = tiff(65535 - array[..., 0], photometric="miniswhite", metadata=None)
    np.testing.assert_array_equal(read_image(inverted).values[..., 0], array[..., 0])
    for orientation in range(1, 9):
        picture = Image.fromarray(array[..., 0].astype(np.float32))
        exif = Image.Exif()
        exif[274] = orientation
        file = io.BytesIO()
        picture.save(file, "TIFF", tiffinfo={274: orientation})
        from PIL import ImageOps

        picture.info["exif"] = exif.tobytes()
        picture._exif = exif
        expected = np.asarray(ImageOps.exif_transpose(picture))
        raw = read_image(file.getvalue())
        np.testing.assert_array_equal(raw.values[..., 0], expected)
        assert raw.is_turned == (orientation > 1)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_png_of_16_bits_per_color_is_not_truncated(channels):
    array = values("uint16", channels)
    raw = read_image(imagecodecs.png_encode(array))
    expected = array[..., [0, 0, 0, 1]] if channels == 2 else array  # gray with transparency becomes color
    np.testing.assert_array_equal(raw.values, expected)
    assert (raw.has_alpha, raw.suffix) == (channels != 3, ".png")


def test_floats_of_other_formats_are_kept():
    array = values("float32", None)
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PPM")  # PFM
    np.testing.assert_array_equal(read_image(file.getvalue()).values[..., 0], array)


def test_jpeg_2000_of_16_bits_per_color():
    array = values("uint16", 3)
    np.testing.assert_array_equal(read_image(imagecodecs.jpeg2k_encode(array, level=0, reversible=True)).values, array)


@pytest.mark.parametrize("module", ["tifffile", "imagecodecs"])
def test_a_missing_reader_is_named_with_its_install_line(monkeypatch, tmp_path, module):
    content = imagecodecs.png_encode(values("uint16")) if module == "imagecodecs" else tiff(values("float32", None))
    (tmp_path / "a.png").write_bytes(content)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"'a.png'.*need `{module}`: pip install diffusers-ddpm-ext\[arrays\]$"):
        folder_data(tmp_path, skip_bad_images=True)


# ---------------------------------------------------------------- layout and dtype


@pytest.mark.parametrize("shape", [(3, 6, 7), (6, 6, 6), (1, 6, 7), (6, 3, 3), (2, 64, 64)])
def test_a_layout_that_may_be_either_is_asked_for(shape):
    array = RNG.random(shape).astype(np.float32)
    with pytest.raises(UnsupportedImage, match="--array_layout channels_last or channels_first"):
        read_image(npy(array))
    np.testing.assert_array_equal(read_image(npy(array), ArrayReading(layout="channels_last")).values, array)
    first = read_image(npy(array), ArrayReading(layout="channels_first")).values
    np.testing.assert_array_equal(first, np.moveaxis(array, 0, -1))


@pytest.mark.parametrize("shape", [(), (6,), (2, 6, 7, 3)])
def test_other_numbers_of_axes_are_refused(shape):
    with pytest.raises(UnsupportedImage, match="is not that of one image"):
        read_image(npy(np.zeros(shape, np.float32)))


@pytest.mark.parametrize("dtype", ["bool", "int8", "int32", "int64", "uint64"])
def test_other_integers_need_a_range_and_become_the_smallest_dtype(dtype):
    array = np.array([[0, 1], [1, 1]]).astype(dtype)
    with pytest.raises(UnsupportedImage, match=f"are {dtype}, from 0 to 1: give their range by --data_range"):
        read_image(npy(array))
    for data_range, expected in (((0, 1), "uint8"), ((-5, 5), "int16"), ((0, 40000), "uint16"), ((0, 1e6), "uint32")):
        raw = read_image(npy(array), ArrayReading(data_range=data_range))
        assert raw.values.dtype.name == expected
        np.testing.assert_array_equal(raw.values[..., 0], array)


@pytest.mark.parametrize("array", [np.zeros((6, 7), complex), np.array([["a"] * 7] * 6), np.zeros((0, 7), "f4")])
def test_what_is_no_image_of_numbers_is_refused(array):
    with pytest.raises((UnsupportedImage, UnreadableImage), match=r"not real numbers|no pixels"):
        read_image(npy(array))


def test_lists_of_arrow_and_python_keep_their_values():
    pa = pytest.importorskip("pyarrow")
    array = values("int16", 2)
    nested = pa.array([array.tolist()], pa.list_(pa.list_(pa.list_(pa.int16()))))
    for column in (nested, pa.chunked_array([nested])):
        raw = read_image(ListCell(column))
        assert raw.values.dtype == np.int16
        np.testing.assert_array_equal(raw.values, array)
    raw = read_image(ListCell(array.tolist()), ArrayReading(data_range=(-32768, 32767)))
    np.testing.assert_array_equal(raw.values, array)
    ragged = array.tolist()
    ragged[2] = ragged[2][:3]
    for cell in (ragged, pa.array([ragged])):
        with pytest.raises(UnreadableImage, match=r"inhomogeneous|different lengths"):
            read_image(ListCell(cell))


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")])
def test_nan_and_infinity_are_named_by_file(tmp_path, value, word):
    for index in range(3):
        array = values("float32", 2)
        if index == 1:
            array[2, 3, 1] = value
        np.save(tmp_path / f"{index}.npy", array)
    with pytest.raises(ConfigError, match=rf"1 of 3 images.*'1.npy' \(it has {word} in row 2, column 3, channel 1\)"):
        folder_data(tmp_path)
    assert len(folder_data(tmp_path, skip_bad_images=True).train) == 2


def test_floats_beyond_one_need_a_range_and_both_files_are_named(tmp_path):
    for name, array in (("low", -2.5), ("high", 90.0), ("middle", 0.5)):
        np.save(tmp_path / f"{name}.npy", np.full(SIZE, array, np.float32))
    with pytest.raises(ConfigError, match=r"from -2.5 \('low.npy'\) to 90 \('high.npy'\).*--data_range"):
        folder_data(tmp_path)
    data = folder_data(tmp_path, data_range=(-10.0, 90.0))
    assert data.pixel_format == PixelFormat("float32", -10, 90, ".npy")
    torch.testing.assert_close(data.train.pixels([0, 1, 2])[:, 0, 0, 0], torch.tensor([1, -0.85, -0.79]))
    tenth = np.float32(0.1)  # above 0.1
    (tmp_path / "tenth").mkdir()
    np.save(tmp_path / "tenth/a.npy", np.full(SIZE, tenth))
    assert folder_data(tmp_path / "tenth", data_range=(0.0, 0.1)).train.pixels([0]).max() == 1
    with pytest.raises(ConfigError, match=r"'low.npy'.*-2.5 to -2.5, are not all in --data_range 0 90"):
        folder_data(tmp_path, data_range=(0.0, 90.0))


def test_a_range_that_the_dtype_cannot_hold_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(SIZE, np.uint8))
    for data_range in ((0.0, 300.0), (0.0, 0.5)):
        with pytest.raises(ConfigError, match=r"--data_range 0 .* are uint8: .*high"):
            folder_data(tmp_path, data_range=data_range)


def test_mixed_dtypes_and_channels_are_named_with_both_files(tmp_path):
    np.save(tmp_path / "a.npy", values("uint8"))
    np.save(tmp_path / "b.npy", values("float32"))
    with pytest.raises(ConfigError, match=r"differ in depth: 'a.npy' is uint8, 'b.npy' is float32"):
        folder_data(tmp_path)
    np.save(tmp_path / "b.npy", values("uint8", 5))
    with pytest.raises(ConfigError, match=r"'a.npy' is color \(3\), 'b.npy' is 5 channels; give all of them"):
        folder_data(tmp_path)
    with pytest.raises(ConfigError, match=r"'b.npy'.*has 5 channels, which --channels 3 .* does not change"):
        folder_data(tmp_path, channels=3)
    np.save(tmp_path / "b.npy", values("uint8", None))
    with pytest.raises(ConfigError, match=r"'b.npy' is grayscale \(1\); --channels 1, 3 or 4 converts them all"):
        folder_data(tmp_path)
    assert folder_data(tmp_path, channels=3).channels == 3


@pytest.mark.parametrize(("dtype", "channels"), [*product(("uint16", "int16", "float32", "uint32"), (1, 3, 4))])
def test_channels_of_any_dtype_are_converted(tmp_path, dtype, channels):
    gray = values(dtype, None)
    np.save(tmp_path / "a.npy", gray)
    pixels = folder_data(tmp_path, channels=channels).train.images.image(0).numpy()
    assert (pixels.shape, pixels.dtype.name) == ((channels, *SIZE), dtype)
    for plane in pixels[:3]:
        np.testing.assert_array_equal(plane, gray)
    assert (pixels[3:] == full_range(dtype).high).all()


def test_an_array_is_prepared_like_the_same_picture(tmp_path):
    array = RNG.integers(0, 256, (13, 17, 3), dtype=np.uint8)
    (tmp_path / "png").mkdir()
    (tmp_path / "npy").mkdir()
    Image.fromarray(array).save(tmp_path / "png/a.png")
    np.save(tmp_path / "npy/a.npy", array)
    one, other = (folder_data(tmp_path / kind, channels=1).train.images.image(0) for kind in ("png", "npy"))
    assert torch.equal(one, other)


def test_embeddings_that_metadata_names_are_no_images(tmp_path):
    (tmp_path / "text").mkdir()
    for index in range(3):
        Image.fromarray(values("uint8")).save(tmp_path / f"{index}.png")
        np.save(tmp_path / f"text/{index}.npy", np.zeros((4, 8), np.float32))
    rows = "".join(f"{index}.png,text/{index}.npy\n" for index in range(3))
    (tmp_path / "metadata.csv").write_text("file_name,embedding\n" + rows)
    assert len(folder_data(tmp_path).train) == 3
    (tmp_path / "metadata.csv").unlink()
    with pytest.raises(ConfigError, match=r"'0.png' is uint8, 'text/0.npy' is float32"):
        folder_data(tmp_path)


# ---------------------------------------------------------------- the model's values


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_pixels_become_the_models_values(dtype):
    """Against the definition in float64: low is -1, high is 1; also on tensors that torch cannot compute with."""
    array = values(dtype)
    for pixel_format in (full_range(dtype), PixelFormat(dtype, -3 if dtype == "int16" else 0, 200, ".npy")):
        low, high = pixel_format.low, pixel_format.high
        expected = (array.astype(np.float64) - low) / (high - low) * 2 - 1
        mapped = to_pixels(torch.from_numpy(array), pixel_format)
        assert mapped.dtype == torch.float32
        np.testing.assert_allclose(mapped.numpy(), expected, rtol=3e-7, atol=3e-7)


def test_a_copy_in_16_bits_is_the_same_for_the_network(tmp_path):
    """Level v of 8 bits and level 257 v of 16 are one value: 2 v / 255 - 1."""
    eight = values("uint8")
    sixteen = eight.astype(np.uint16) * 257
    one, other = (to_pixels(torch.from_numpy(each), full_range(each.dtype.name)) for each in (eight, sixteen))
    assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_store_and_every_crop_returns_the_same_values(tmp_path, dtype):
    """In memory, decoded for each use and from the cache; against crops and flips by NumPy."""
    arrays = [values(dtype, 2) for _ in range(4)]
    for index, array in enumerate(arrays):
        np.save(tmp_path / f"{index}.npy", array)
    options = DataOptions(
        train_data_dir=str(tmp_path), resolution=(6, 5), random_flip=True, validation_fraction=0.0,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    loaded = [
        load_data(options.__class__(**{**vars(options), "cache_images": mode}), memory_limit=limit)
        for mode, limit in (("never", 2**20), ("never", 0), ("always", 2**20))
    ]
    assert isinstance(loaded[1].train.images, LazyImages)
    assert len({each.fingerprint for each in loaded}) == 1
    batches = [each.train.load_levels([0, 1, 2, 3], 5, [7, 7, 8, 9]).values.numpy() for each in loaded]
    for index, array in enumerate(arrays):
        planes = array.transpose(2, 0, 1)
        candidates = [planes[:, :, x : x + 5][:, :, ::step] for x in range(3) for step in (1, -1)]
        assert any(np.array_equal(batches[0][index], each) for each in candidates)
    for batch in batches[1:]:
        np.testing.assert_array_equal(batch, batches[0])
    np.save(tmp_path / "1.npy", values("uint8" if dtype != "uint8" else "int16", 2))
    with pytest.raises(RunError, match=r"'1.npy'.*became another kind of image"):
        loaded[1].train.images.image(1)


def test_another_range_is_another_set_of_images(tmp_path):
    np.save(tmp_path / "a.npy", np.full(SIZE, 0.5, np.float32))
    fingerprints = {folder_data(tmp_path, data_range=each).fingerprint for each in (None, (0.0, 1.0), (0.0, 2.0))}
    assert len(fingerprints) == 2


def test_a_damaged_tiff_gives_one_error_and_no_warning(tmp_path):
    """Also where one image is read before the pass over all of them; warnings are errors in tests."""
    (tmp_path / "a.tif").write_bytes(tiff(values("float32", None))[:150])
    for mode in ("never", "auto"):
        with pytest.raises(ConfigError, match=r"1 of 1 images cannot be read: 'a.tif'"):
            folder_data(tmp_path, cache_images=mode, cache_dir=str(tmp_path / "cache"))

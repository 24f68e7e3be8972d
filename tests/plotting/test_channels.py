"""Previews of images of any number of channels: which are drawn, in what colors, and what the caption says."""

from __future__ import annotations

import numpy as np
import pytest

from diffusers_ddpm_ext.plotting.channels import channel_view, principal_components
from diffusers_ddpm_ext.plotting.sheets import grid_size, image_grid
from diffusers_ddpm_ext.utils.pixel_format import PixelFormat


def bands(channels: int, count: int = 2, size: int = 8) -> np.ndarray:
    """Images in [-1, 1] of which every channel is different."""
    return np.random.default_rng(channels).uniform(-1, 1, (count, channels, size, size)).astype(np.float32)


def sheet_of(images: np.ndarray, pixels: PixelFormat | None = None) -> np.ndarray:
    """The images alone, without the line below them: (N, H, W) or (N, H, W, 3), in [-1, 1]."""
    sheet = np.asarray(image_grid(images, columns=1, enlarge=1, gap=0, pixels=pixels))
    count, _, height, width = images.shape
    return sheet[: count * height].reshape(count, height, width, *sheet.shape[2:]) / 127.5 - 1


@pytest.mark.parametrize("channels", [2, 5, 13])
def test_the_first_channel_is_drawn_by_default(channels):
    """In gray, with a line that says so."""
    images = bands(channels)
    np.testing.assert_allclose(sheet_of(images), images[:, 0], atol=1 / 255)
    assert channel_view(channels).caption == f"channel 0 of {channels} (0 is the first)"


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_are_drawn_as_they_are(channels):
    """Gray, color and color with transparency have no line below."""
    view = channel_view(channels, PixelFormat())
    images = bands(channels)
    assert view.caption == ""
    np.testing.assert_array_equal(view(images), images)


@pytest.mark.parametrize("picked", [(1,), (4, 2, 0), (0, 1, 0)])
def test_channels_are_picked_by_number(picked):
    """One is gray, three are red, green and blue; one channel may be there twice."""
    images, pixels = bands(5), PixelFormat(preview_channels=picked)
    drawn = sheet_of(images, pixels)
    expected = images[:, picked].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(drawn if len(picked) == 3 else drawn[..., None], expected, atol=1 / 255)
    assert ", ".join(map(str, picked)) in channel_view(5, pixels).caption


def test_a_channel_of_pictures_can_be_picked():
    """Also of color images, and of those with transparency the colors alone."""
    assert sheet_of(bands(4), PixelFormat(preview_channels=(0, 1, 2))).shape[-1] == 3
    np.testing.assert_allclose(sheet_of(bands(3), PixelFormat(preview_channels=(2,))), bands(3)[:, 2], atol=1 / 255)


def test_a_channel_that_does_not_exist_is_refused():
    """By its name and number."""
    with pytest.raises(ValueError, match=r"preview_channels=\[7\] must be below 5"):
        image_grid(bands(5), pixels=PixelFormat(preview_channels=(7,)))


@pytest.mark.parametrize("channels", [3, 5, 13])
def test_components_are_those_of_a_singular_value_decomposition(channels):
    """NumPy's SVD of the centered pixels: the same colors up to the sign, with variance 1 / 2.5^2 and no mean."""
    images = np.einsum("kc,nchw->nkhw", np.random.default_rng(1).normal(size=(channels,) * 2), bands(channels, 6))
    rows = principal_components(images)
    colors = channel_view(channels, PixelFormat(preview_components=rows))(images).transpose(1, 0, 2, 3).reshape(3, -1)
    flat = images.transpose(1, 0, 2, 3).reshape(channels, -1)
    directions, sizes, _ = np.linalg.svd(flat - flat.mean(axis=1, keepdims=True), full_matrices=False)
    expected = directions.T[:3] @ (flat - flat.mean(axis=1, keepdims=True))
    expected /= 2.5 * sizes[:3, None] / np.sqrt(flat.shape[1])
    signs = np.sign((colors * expected).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(colors, expected * signs, atol=1e-4)
    assert all(max(row[:-1], key=abs) > 0 for row in rows)


def test_components_of_flat_data_are_gray():
    """Constant channels, and copies of one channel, have fewer than three components: the rest is 0, not NaN."""
    one = bands(1, 3)
    for images, varying in ((np.full((2, 5, 4, 4), 0.25), 0), (np.repeat(one, 5, axis=1), 1)):
        rows = np.array(principal_components(images))
        assert np.isfinite(rows).all()
        assert (np.abs(rows[:, :-1]).max(axis=1) > 0).sum() == varying
        assert (rows[varying:] == 0).all()


@pytest.mark.parametrize("count", [1, 3, 16])
def test_the_size_of_a_sheet_includes_its_line(count):
    """A small sheet wraps the line instead of cutting it."""
    pixels = PixelFormat(preview_components=principal_components(bands(5)))
    caption = channel_view(5, pixels).caption
    assert "principal components" in caption
    sheet = image_grid(bands(5, count), pixels=pixels)
    assert sheet.size == grid_size(count, 8, 8, note=caption)[::-1]
    assert (np.asarray(sheet)[-14:] < 128).any()


def test_the_fourth_channel_of_an_array_is_no_transparency():
    """Four bands of a file of arrays are drawn as other numbers of channels are; in a PNG they are color and alpha."""
    array = PixelFormat("float32", 0, 1, ".npy")
    assert channel_view(4, array).caption == "channel 0 of 4 (0 is the first)"
    assert np.asarray(image_grid(bands(4), pixels=array)).ndim == 2
    assert np.asarray(image_grid(bands(4), pixels=PixelFormat("uint16", 0, 65535))).shape[-1] == 4

"""SpatialRescaler against torch's pooling, and in folders."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch
from torch.nn import functional

from diffusers_ddpm_ext import SpatialRescaler

PICTURES = torch.randn(2, 5, 16, 24, generator=torch.Generator().manual_seed(0))


def test_halving_bilinearly_averages_the_four_pixels_in_the_middle():
    twice = SpatialRescaler(2, in_channels=5)(PICTURES)
    expected = functional.avg_pool2d(functional.avg_pool2d(PICTURES, 2), 2)
    assert twice.shape == (2, 5, 4, 6)
    torch.testing.assert_close(twice, expected, rtol=0, atol=1e-6)


def test_a_one_by_one_convolution_mixes_the_channels_of_the_small_picture():
    rescaler = SpatialRescaler(1, "nearest", in_channels=5, out_channels=3, bias=True)
    weight, bias = rescaler.channel_mapper.weight[:, :, 0, 0], rescaler.channel_mapper.bias
    expected = torch.einsum("oi,bihw->bohw", weight, PICTURES[:, :, ::2, ::2]) + bias[None, :, None, None]
    torch.testing.assert_close(rescaler(PICTURES), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ({"n_stages": 0}, (16, 24)),
        ({"multiplier": 2.0}, (32, 48)),
        ({"method": "area"}, (8, 12)),
        ({"method": "bicubic", "multiplier": 0.3}, (4, 7)),
    ],
)
def test_sizes(arguments, size):
    assert SpatialRescaler(in_channels=5, **arguments)(PICTURES).shape[2:] == size


@pytest.mark.parametrize("out_channels", [None, 3])
def test_a_folder_holds_it(out_channels, tmp_path):
    rescaler = SpatialRescaler(2, in_channels=5, out_channels=out_channels)
    rescaler.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "SpatialRescaler"
    loaded = diffusers.SpatialRescaler.from_pretrained(tmp_path)
    assert loaded.channels == rescaler.channels == (out_channels or 5)
    assert torch.equal(loaded(PICTURES), rescaler(PICTURES))
    assert loaded.half()(PICTURES).dtype == torch.float16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_stages": -1}, "n_stages=-1"),
        ({"n_stages": True}, "n_stages=True"),
        ({"n_stages": 10**9}, "from 0 to 16"),
        ({"method": "trilinear"}, "choose one of nearest, bilinear"),
        ({"multiplier": 0}, "multiplier=0"),
        ({"multiplier": float("nan")}, "multiplier=nan"),
        ({"in_channels": 0}, "in_channels=0"),
        ({"out_channels": "3"}, "out_channels='3'"),
        ({"bias": "no"}, "bias='no'"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        SpatialRescaler(**arguments)


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (PICTURES[0], "takes floating ones of shape"),
        (PICTURES[:, :3], "height, width"),
        (PICTURES.long(), "int64"),
        ("picture", "str"),
        (PICTURES[:, :, :4, :4], "give larger ones"),
    ],
)
def test_pictures_are_checked(pictures, message):
    with pytest.raises(ValueError, match=message):
        SpatialRescaler(3, in_channels=5)(pictures)

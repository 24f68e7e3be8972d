"""Heads of the original's attention: what it ran is converted, and converted back."""

from __future__ import annotations

import pytest
import torch
from helpers.conversion_cases import BASE, CROSS, random_weights

from diffusers_ddpm_ext.compvis.architecture import complete_unet_params, head_counts, translate_unet
from diffusers_ddpm_ext.compvis.unet_params import unet_params_of
from diffusers_ddpm_ext.compvis.weights import convert_unet, export_unet

WIDE = BASE | {"attention_resolutions": [1, 2]}
SIZE = {"num_heads": -1}


@pytest.mark.parametrize(
    ("width", "options", "heads"),
    [
        # cross attention: width // size heads of width // heads channels each
        (96, CROSS | SIZE | {"num_head_channels": 64}, [1, 3]),
        (160, CROSS | SIZE | {"num_head_channels": 64}, [2, 5]),
        (224, CROSS | SIZE | {"num_head_channels": 40}, [5, 11]),
        (96, CROSS | {"num_heads": 5}, [5, 5]),
        (160, CROSS | {"num_heads": 12, "legacy": False}, [12, 12]),
        (96, CROSS | SIZE | {"num_head_channels": 32, "legacy": False}, [3, 6]),
        # without legacy, self-attention counts the heads again from their channels: 64 // 22 = 2, and 64 // 2 = 32
        (32, {"num_heads": 12, "legacy": False, "attention_resolutions": [1], "channel_mult": [1]}, [16]),
        (64, {"num_heads": 22, "legacy": False, "attention_resolutions": [1], "channel_mult": [1]}, [32]),
    ],
)
def test_heads_that_do_not_divide_a_width(width, options, heads):
    params = WIDE | {"model_channels": width} | options
    assert head_counts(complete_unet_params(params))[0] == heads
    network = random_weights(translate_unet(params).build())
    weights = export_unet(network, params)
    if "context_dim" in options:  # the original's inner width: heads times their channels
        assert weights["input_blocks.1.1.proj_in.weight"].shape[:2] == (heads[0] * (width // heads[0]), width)
    back = unet_params_of(network)
    again = convert_unet(export_unet(network, back), back)
    assert again.config.attention_head_dim == network.config.attention_head_dim
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    ("width", "options"),
    [
        (96, {"num_heads": 5}),  # its reshape fails
        (96, SIZE | {"num_head_channels": 64}),  # asserted there
        (96, CROSS | SIZE | {"num_head_channels": 64, "legacy": False}),  # 1 head of 64 channels: not Diffusers' 96
        (32, CROSS | SIZE | {"num_head_channels": 64}),  # no head at all
        (32, CROSS | {"num_heads": 33}),
        (96, {"num_heads": 5, "legacy": False}),
    ],
)
def test_heads_that_the_original_or_diffusers_cannot_have(width, options):
    with pytest.raises(ValueError, match=r"num_head\w+ \d+ does not divide"):
        translate_unet(WIDE | {"model_channels": width} | options)


def test_levels_without_attention_may_have_any_width():
    params = BASE | CROSS | SIZE | {"num_head_channels": 64, "model_channels": 96, "attention_resolutions": [2]}
    assert translate_unet(params | {"legacy": False}).config["attention_head_dim"] == [1, 3]

"""Weights against their configuration without the network: Diffusers' own classes are the oracle."""

from __future__ import annotations

import inspect
import json

import pytest
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel

from diffusers_ddpm_ext import UNet2DExtModel
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.utils.input_files import JsonObject
from diffusers_ddpm_ext.utils.network_tensors import check_main_tensors
from diffusers_ddpm_ext.utils.tensor_files import StoredTensor

LEVELS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
UNET = LEVELS | {"sample_size": 8, "attention_head_dim": 4}
PLAIN = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
RESNET = {
    "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D"),
}
CROSS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 8,
}
CODES = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
}
NETWORKS = {
    "unet": (UNet2DModel, UNET | PLAIN),
    "classes": (UNet2DModel, UNET | PLAIN | {"num_class_embeds": 3, "layers_per_block": 2}),
    "resnet": (UNet2DModel, UNET | RESNET | {"class_embed_type": "timestep", "time_embedding_dim": 20}),
    "ours": (UNet2DExtModel, UNET | PLAIN),
    "cross": (UNet2DConditionModel, UNET | CROSS),
    "uneven": (UNet2DConditionModel, UNET | CROSS | {"layers_per_block": (2, 1), "num_class_embeds": 3}),
    "kl": (AutoencoderKL, LEVELS | CODES),
    "vq": (VQModel, LEVELS | CODES | {"num_vq_embeddings": 9, "vq_embed_dim": 2}),
}
CHANGES = [
    {"block_out_channels": [16, 16]},
    {"block_out_channels": [8, 8]},
    {"layers_per_block": 3},
    {"in_channels": 5},
    {"out_channels": 5},
    {"num_class_embeds": 7},
    {"num_class_embeds": None},
    {"latent_channels": 6},
    {"num_vq_embeddings": 4},
    {"vq_embed_dim": 3},
    {"cross_attention_dim": 16},
    {"time_embedding_dim": 40},
    {"norm_num_groups": 2},
]


def tensors(network):
    return {name: StoredTensor("F32", tuple(value.shape), 0) for name, value in network.state_dict().items()}


@pytest.fixture(scope="module", params=NETWORKS)
def case(request):
    cls, config = NETWORKS[request.param]
    return cls, tensors(cls(**config)), json.loads(cls(**config).to_json_string())


def test_weights_of_their_own_configuration(case):
    cls, stored, config = case
    check_main_tensors(stored, JsonObject("config.json", config), cls.__name__)


def changed_networks():
    """Every network with every change of an option that its class has."""
    for name, (cls, config) in NETWORKS.items():
        known = {key: each.default for key, each in inspect.signature(cls).parameters.items()} | config
        for change in CHANGES:
            if change.keys() <= known.keys() and known | change != known:
                yield pytest.param(name, change, id=f"{name}-{json.dumps(change)}")


@pytest.mark.parametrize(("case", "change"), list(changed_networks()), indirect=["case"])
def test_a_configuration_of_another_network(case, change):
    cls, stored, config = case
    other = config | change
    assert other != config
    fits = tensors(cls.from_config(other)) == stored
    if fits:
        check_main_tensors(stored, JsonObject("config.json", other), cls.__name__)
    else:
        with pytest.raises(ConfigError, match="damaged, or of another model"):
            check_main_tensors(stored, JsonObject("config.json", other), cls.__name__)


def test_levels_of_different_number(case):
    cls, stored, config = case
    wrong = config | {"block_out_channels": [8, 16, 16]}
    with pytest.raises(ConfigError, match="one value for each level"):
        check_main_tensors(stored, JsonObject("config.json", wrong), cls.__name__)

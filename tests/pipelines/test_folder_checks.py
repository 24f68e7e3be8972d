"""Folders that are damaged, forged or absurdly large: one sentence before anything is built."""

from __future__ import annotations

import inspect
import json
import os
import time
from pathlib import Path
from typing import Any

import diffusers
import pytest
from diffusers import UNet2DConditionModel, UNet2DModel
from helpers.tiny import tiny_unet
from safetensors.torch import load_file, save_file

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from diffusers_ddpm_ext.cli import main
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.utils.network_budget import (
    FLAGS,
    NEVER_NULL,
    check_network_config,
    check_network_types,
    least_parameters,
)

INDEX, NETWORK, SCHEDULER = "model_index.json", "unet/config.json", "scheduler/scheduler_config.json"


@pytest.fixture
def folder(tmp_path) -> Path:
    DDPMExtPipeline(tiny_unet(1), DDPMExtScheduler(num_train_timesteps=10)).save_pretrained(tmp_path)
    return tmp_path


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refusal(folder: Path) -> str:
    """The message of a refusal, one line within a second or two."""
    start = time.monotonic()
    with pytest.raises((ValueError, OSError)) as error:
        DDPMExtPipeline.from_pretrained(folder)
    assert time.monotonic() - start < 10
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize("name", [INDEX, NETWORK, SCHEDULER])
@pytest.mark.parametrize(
    "content",
    [
        *("true", "null", "NaN", "[]", "3", '"x"', "{", "", "\0"),
        "[" * 100_000 + "]" * 100_000,
        '{"a": 1e999}',
        '{"a": "\\ud800"}',
    ],
    ids=lambda content: repr(content[:8]),
)
def test_a_damaged_configuration_is_named(folder, name, content):
    (folder / name).write_text(content)
    assert Path(name).name in refusal(folder)


@pytest.mark.parametrize("name", [INDEX, NETWORK, SCHEDULER, "unet/diffusion_pytorch_model.safetensors"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refusal(folder)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"layers_per_block": 10**6}, "layers_per_block"),
        ({"layers_per_block": 65}, "layers_per_block"),
        ({"layers_per_block": "2"}, "layers_per_block"),
        ({"layers_per_block": 0}, "layers_per_block"),
        ({"block_out_channels": [8] * 2000}, "block_out_channels"),
        ({"block_out_channels": []}, "block_out_channels"),
        ({"block_out_channels": [8.0, 16.5]}, "block_out_channels"),
        ({"block_out_channels": [8, 10**9]}, "block_out_channels"),
        ({"block_out_channels": [8, 8192]}, "parameters"),
        ({"block_out_channels": {"a": 1}}, "block_out_channels"),
        ({"num_class_embeds": 10**8}, "num_class_embeds"),
        ({"num_class_embeds": 10**6}, "parameters"),
        ({"norm_num_groups": 0}, "norm_num_groups"),
        ({"attention_head_dim": 0}, "attention_head_dim"),
        ({"in_channels": 10**9}, "in_channels"),
        ({"out_channels": True}, "out_channels"),
        ({"down_block_types": [1, 2]}, "down_block_types"),
        ({"up_block_types": "UpBlock2D"}, "up_block_types"),
        ({"dropout": "0.1"}, "dropout"),
        ({"act_fn": "\x1b[31mred"}, "red"),
        ({"norm_num_groups": 3}, ""),
        ({"in_channels": 3}, ""),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps"),
    ],
    ids=str,
)
def test_a_network_that_cannot_be(folder, values, words):
    change(folder / NETWORK, **values)
    assert words in refusal(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"unet": ["diffusers", "AutoencoderKL"]},
        {"unet": ["diffusers", "DDPMScheduler"]},
        {"unet": ["diffusers", "NoSuchModel"]},
        {"unet": ["diffusers"]},
        {"unet": "UNet2DModel"},
        {"scheduler": ["diffusers", "UNet2DModel"]},
        {"scheduler": [None, None]},
        {"_class_name": 5},
        {"conditioning_key": ["adm"]},
        {"conditioning_key": "typo"},
        {"use_positional_encodings": "yes"},
        {"null_class_label": "none"},
        {"null_class_label": -1},
        {"id2label": {"x": "y"}},
        {"id2label": 7},
    ],
    ids=str,
)
def test_a_pipeline_that_cannot_be(folder, values):
    change(folder / INDEX, **values)
    refusal(folder)


@pytest.mark.parametrize(
    "content",
    [
        *("true", "[]", "{}"),
        '{"metadata": {}, "weight_map": {}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../x"}}',
    ],
)
def test_an_index_of_shards_that_cannot_be(folder, content):
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(content)
    assert "index" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_weights_cut_short_are_named(folder, keep):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refusal(folder)


@pytest.mark.parametrize(
    "change_names", [lambda name: "module." + name, lambda name: name.replace("mid_block", "middle")]
)
def test_weights_of_another_network_are_named(folder, change_names):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({change_names(name): tensor for name, tensor in load_file(path).items()}, path)
    assert "lack" in refusal(folder)


@pytest.mark.parametrize("size", [10**9, 0, -8, 2.5, [8, 10**9], "8"])
def test_an_image_size_that_cannot_be(folder, size):
    change(folder / NETWORK, sample_size=size)
    pipeline = DDPMExtPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="sample_size"):
        pipeline(num_inference_steps=1)


def test_released_networks_pass():
    """The largest published configurations, and what they have at least."""
    adm = {"block_out_channels": [256, 256, 512, 512, 1024, 1024], "layers_per_block": 2, "num_class_embeds": 1000}
    condition = {
        "block_out_channels": [320, 640, 1280],
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, 2, 10],
    }
    for config in (
        adm,
        condition,
        {"attention_head_dim": [5, 10, 20]},
        {"conv_in_kernel": 3, "time_embedding_dim": None},
    ):
        check_network_types(config, "config")
        check_network_config(config, "config")
    assert 40e6 < least_parameters(adm) < 554e6
    with pytest.raises(ConfigError, match="config: in_channels"):
        check_network_types({"in_channels": -1}, "config")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("upsample_type", "conv\x1b[2J"),
        ("upsample_type", "deconv"),
        ("downsample_type", ["conv"]),
        ("time_embedding_type", "sinusoidal"),
        ("class_embed_type", "label"),
        ("resnet_time_scale_shift", "shift"),
        ("mid_block_type", "none"),
        ("attention_type", 1),
        ("center_input_sample", [False]),
        ("flip_sin_to_cos", "false"),
        ("upcast_attention", 1),
        ("only_cross_attention", []),
        ("only_cross_attention", [True, "no"]),
        ("use_linear_projection", {}),
    ],
)
def test_unknown_words(key, value):
    """For most of them Diffusers builds another network without a word, which fails, or is wrong, when it runs."""
    with pytest.raises(ConfigError, match=f"config: {key} is .*; allowed: ") as caught:
        check_network_types({key: value}, "config")
    assert caught.value.args[0].isprintable()


@pytest.mark.parametrize("key", NEVER_NULL)
def test_no_null(key):
    """None of Diffusers' networks has this default."""
    with pytest.raises(ConfigError, match=f"config: {key} is null"):
        check_network_types({key: None}, "config")


def test_defaults_pass():
    for network in (UNet2DModel, UNet2DConditionModel):
        defaults = inspect.signature(network.__init__).parameters
        check_network_types({key: value.default for key, value in defaults.items() if key != "self"}, "config")
        flags = {key for key, value in defaults.items() if isinstance(value.default, bool)}
        assert flags <= set(FLAGS)


def test_the_least_number_of_parameters_is_one():
    network = tiny_unet(1)
    assert 0 < least_parameters(network.config) < network.num_parameters()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"])
def test_an_infinite_setting_of_a_stock_scheduler_is_read(name, tmp_path):
    """Their ``lambda_min_clipped`` is -Infinity, which is in the saved configuration and right."""
    pipeline = DDPMExtPipeline(tiny_unet(1), getattr(diffusers, name)())
    pipeline.save_pretrained(tmp_path)
    assert "-Infinity" in (tmp_path / "scheduler" / "scheduler_config.json").read_text()
    loaded = DDPMExtPipeline.from_pretrained(tmp_path)
    assert loaded.scheduler.config.lambda_min_clipped == -float("inf")
    assert main(["sample", str(tmp_path), "--num_inference_steps", "2", "--out", str(tmp_path / "x.png")]) == 0


@pytest.mark.parametrize(
    "change_to", [{"time_embedding_type": "nnnn"}, {"act_fn": "nnnn"}, {"down_block_types": ["Nope", "DownBlock2D"]}]
)
def test_names_that_the_network_does_not_know(change_to, folder):
    """Some of Diffusers' constructors answer an unknown name with an UnboundLocalError."""
    change(folder / NETWORK, **change_to)
    assert "\n" not in refusal(folder)

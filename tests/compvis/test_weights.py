"""Weights of original networks converted to Diffusers': compared with recorded outputs of the original, and back."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from helpers.conversion_cases import (
    ARCHITECTURES,
    BASE,
    CASES,
    CASES_WITH_CHECKPOINT,
    GOLDEN,
    random_weights,
    recorded,
    run,
    unet_params,
)
from torch import nn

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from diffusers_ddpm_ext.compvis.architecture import translate_unet
from diffusers_ddpm_ext.compvis.reader.archive import read_tensors
from diffusers_ddpm_ext.compvis.unet_params import unet_params_of
from diffusers_ddpm_ext.compvis.weights import convert_tensors, convert_unet, ema_buffer_names, export_unet, unet_keys
from diffusers_ddpm_ext.utils.vocabulary import FROM_COMPVIS_PREDICTION_TYPE


def network_part(tensors):
    return {name: tensor for name, tensor in tensors.items() if name.startswith("model.diffusion_model.")}


@pytest.mark.parametrize("case", CASES_WITH_CHECKPOINT)
def test_recorded_outputs(case):
    """The original's own outputs, raw and averaged weights."""
    tensors = read_tensors(GOLDEN / "h_ckpt" / f"{case}.ckpt")
    params, arrays = unet_params(case), recorded(case)
    network = convert_unet(network_part(tensors), params)
    assert float((run(network, arrays) - arrays["out_raw"]).abs().max()) <= 5e-6
    if CASES[case]["ema"]:
        names = ema_buffer_names(params)
        average = convert_unet({names[name]: tensors[name] for name in tensors if name in names}, params)
        assert float((run(average, arrays) - arrays["out_ema"]).abs().max()) <= 5e-6
        assert float((arrays["out_ema"] - arrays["out_raw"]).abs().max()) > 1e-2, (
            "otherwise the two could not be distinguished"
        )


def test_recorded_sampling_loop():
    """x_T, noise and weights of the original's p_sample_loop give its intermediates and samples."""
    case = json.loads((GOLDEN / "g_p_sample_loop.json").read_text())["cases"][0]
    params = case["params"]
    with np.load(GOLDEN / "g_p_sample_loop.npz") as arrays:
        start, noise, states, final = (
            torch.from_numpy(arrays[f"{case['id']}/{name}"]) for name in ("x_T", "noise", "intermediates", "final")
        )
    weights = torch.load(GOLDEN / case["weights"], weights_only=True)
    unet = convert_unet(weights, params["unet_config"]["params"])
    scheduler = DDPMExtScheduler(clip_sample=params.get("clip_denoised", True))
    arguments = {"timesteps", "beta_schedule", "linear_start", "linear_end", "cosine_s", "given_betas"}
    scheduler.register_schedule(**{name: value for name, value in params.items() if name in arguments})
    prediction_type = FROM_COMPVIS_PREDICTION_TYPE[params.get("parameterization", "eps")]
    scheduler = DDPMExtScheduler.from_config(
        scheduler.config, prediction_type=prediction_type, v_posterior=params.get("v_posterior", 0.0)
    )
    pipeline = DDPMExtPipeline(unet, scheduler)
    kept, sample = [start], start
    with torch.no_grad():
        for t in range(len(noise) - 1, -1, -1):
            out = pipeline.unet(sample, torch.tensor(t)).sample
            sample = scheduler.step(out, t, sample, variance_noise=noise[t]).prev_sample
            if t in case["intermediate_timesteps"]:
                kept.append(sample)
    assert float((torch.stack(kept) - states).abs().max()) <= 1e-4
    assert float((sample - final).abs().max()) <= 1e-4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_round_trip_is_bit_exact(name):
    """Every tensor is restored, with and without the arguments of the UNetModel."""
    params = BASE | ARCHITECTURES[name]
    network = random_weights(translate_unet(params).build())
    tensors = export_unet(network, params)
    assert list(dict.fromkeys(unet_keys(params))) == unet_keys(params)
    assert set(tensors) == set(unet_keys(params))
    again, rows = convert_tensors(tensors, params)
    own = network.state_dict()
    assert all(torch.equal(again[key], own[key]) for key in own)
    assert again.keys() == own.keys()
    assert {row.target for row in rows} == set(own)
    own_params = unet_params_of(network)
    order = {"use_new_attention_order": params.get("use_new_attention_order", False)}
    assert all(torch.equal(export_unet(network, own_params | order)[key], tensors[key]) for key in tensors)


class Attention(nn.Module):
    """Self-attention by its definition: softmax(q k / sqrt(d)) v for each head."""

    def __init__(self, heads: int, new_order: bool) -> None:
        super().__init__()
        self.heads, self.new_order = heads, new_order

    def forward(self, qkv: torch.Tensor) -> torch.Tensor:
        batch, triple, length = qkv.shape
        size = triple // 3 // self.heads
        if self.new_order:  # rows: q of all heads, k of all heads, v of all heads
            q, k, v = (part.reshape(batch, self.heads, size, length) for part in qkv.chunk(3, dim=1))
        else:  # rows: q, k, v of the first head, then of the second
            parts = qkv.reshape(batch, self.heads, 3, size, length)
            q, k, v = parts[:, :, 0], parts[:, :, 1], parts[:, :, 2]
        weights = torch.einsum("bhct,bhcs->bhts", q, k).div(size**0.5).softmax(-1)
        return torch.einsum("bhts,bhcs->bhct", weights, v).reshape(batch, -1, length)


@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize("heads", [1, 4])
def test_order_of_heads(heads, new_order):
    """Diffusers' attention with converted weights is attention over the original's rows."""
    params = BASE | {"num_heads": heads, "use_new_attention_order": new_order}
    tensors = export_unet(random_weights(translate_unet(params).build()), params)
    block = convert_unet(tensors, params).mid_block.attentions[0]
    hidden = torch.randn(2, 64, 3, 3, generator=torch.Generator().manual_seed(1))
    norm = nn.functional.group_norm(
        hidden, 32, tensors["middle_block.1.norm.weight"], tensors["middle_block.1.norm.bias"]
    ).flatten(2)
    qkv = nn.functional.conv1d(norm, tensors["middle_block.1.qkv.weight"], tensors["middle_block.1.qkv.bias"])
    mixed = Attention(heads, new_order)(qkv)
    out = nn.functional.conv1d(
        mixed, tensors["middle_block.1.proj_out.weight"], tensors["middle_block.1.proj_out.bias"]
    )
    with torch.no_grad():
        assert torch.allclose(block(hidden), hidden + out.reshape(hidden.shape), atol=2e-6)


def test_resampling_without_weights():
    """The convolutions in its place compute average pooling and repetition."""
    params = BASE | {"conv_resample": False}
    network = random_weights(translate_unet(params).build())
    converted = convert_unet(export_unet(network, params), params)
    hidden = torch.randn(2, 32, 6, 6)
    with torch.no_grad():
        down = converted.down_blocks[0].downsamplers[0](hidden)
        up = converted.up_blocks[0].upsamplers[0](torch.randn(2, 64, 3, 3))
        wide = torch.randn(2, 64, 3, 3)
        up = converted.up_blocks[0].upsamplers[0](wide)
    assert torch.allclose(down, nn.functional.avg_pool2d(hidden, 2), atol=1e-6)
    assert torch.equal(up, nn.functional.interpolate(wide, scale_factor=2, mode="nearest"))


def test_keys_that_do_not_match_are_listed():
    params = BASE
    tensors = export_unet(random_weights(translate_unet(params).build()), params)
    gap = {name: tensor for name, tensor in tensors.items() if name != "out.2.bias"}
    with pytest.raises(ValueError, match=r"missing: out\.2\.bias; unexpected: extra\.weight"):
        convert_unet(gap | {"extra.weight": torch.zeros(1)}, params)
    with pytest.raises(ValueError, match=r"different shape .*out\.2\.bias"):
        convert_unet(gap | {"out.2.bias": torch.zeros(4)}, params)


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_prefixes_and_half_weights(prefix):
    tensors = export_unet(random_weights(translate_unet(BASE).build()), BASE)
    half = {prefix + name: tensor.half() for name, tensor in tensors.items()}
    network = convert_unet(half, BASE)
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())
    assert torch.equal(network.conv_in.bias, tensors["input_blocks.0.0.bias"].half().float())
    assert not network.training


def test_ema_buffer_names_are_unique():
    """Keys without their dots are still distinct in a deep network."""
    deep = BASE | {"channel_mult": [1, 2, 3, 4, 5], "num_res_blocks": 3, "attention_resolutions": [1, 2, 4, 8, 16]}
    names = ema_buffer_names(deep)
    assert sorted(names.values()) == sorted(unet_keys(deep))
    assert names["model_ema.diffusion_modelinput_blocks00weight"] == "input_blocks.0.0.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_res_blocks": [1, 2]}, "num_res_blocks"),
        ({"n_embed": 8}, "n_embed"),
        ({"channel_mult": [2, 4]}, "channel_mult"),
        ({"channel_mult": [0.5, 1]}, "channel_mult"),
        ({"dims": 3}, "dims"),
        ({"num_attention_blocks": [1, 1]}, "num_attention_blocks"),
        ({"num_heads": 3}, "num_heads"),
        ({"num_heads": -1}, "num_head_channels"),
        ({"model_channels": 40}, "model_channels"),
        ({"num_classes": "both"}, "num_classes"),
        ({"num_classes": "sequential"}, "adm_in_channels"),
        ({"num_head": 2}, "num_heads"),
        ({"context_dim": 8}, "use_spatial_transformer"),
        ({"in_channels": None}, "in_channels"),
        ({"use_spatial_transformer": True, "context_dim": 8, "resblock_updown": True}, "resblock_updown"),
    ],
)
def test_params_that_no_network_can_express_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        translate_unet(BASE | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_num_groups": 8}, "norm_num_groups"),
        ({"norm_eps": 1e-6}, "norm_eps"),
        ({"freq_shift": 1}, "freq_shift"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos"),
        ({"downsample_padding": 0}, "downsample_padding"),
        ({"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": None}, "attn_norm_num_groups"),
        ({"block_out_channels": [64, 96]}, "block_out_channels"),
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "up_block_types"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type"),
    ],
)
def test_settings_that_cannot_be_exported_are_refused_by_name(change, message):
    config = translate_unet(BASE).config | change
    with pytest.raises(ValueError, match=message):
        unet_params_of(UNet2DModel(**config))

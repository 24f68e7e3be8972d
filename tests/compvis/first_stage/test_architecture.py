"""Arguments of CompVis' autoencoders: what is translated, and what is refused with a way out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from torch.nn import functional

from diffusers_ddpm_ext.compvis.first_stage.architecture import attention_levels, read_first_stage
from diffusers_ddpm_ext.compvis.first_stage.arguments import first_stage_config_of, original_config
from diffusers_ddpm_ext.compvis.first_stage.weights import convert_first_stage, export_first_stage

DDCONFIG: dict[str, Any] = {
    "double_z": True, "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2],
    "num_res_blocks": 1, "attn_resolutions": [16], "dropout": 0.0,
}  # fmt: skip
TARGETS = {"kl": "ldm.models.autoencoder.AutoencoderKL", "vq": "ldm.models.autoencoder.VQModelInterface"}


def section(kind: str = "kl", changes: dict[str, Any] | None = None, **params: Any) -> dict[str, Any]:
    """A ``first_stage_config`` with other values; None removes one."""
    codes = {"n_embed": 16} if kind == "vq" else {}
    options = DDCONFIG | ({"double_z": False} if kind == "vq" else {}) | (changes or {})
    options = {name: value for name, value in options.items() if value is not None}
    params = {"embed_dim": 4, **codes, "ddconfig": options} | params
    return {"target": TARGETS[kind], "params": {name: value for name, value in params.items() if value is not None}}


@pytest.mark.parametrize(
    ("kind", "ddconfig", "params", "words"),
    [
        ("kl", {}, {"embed_dim": 3}, "embed_dim 3 is not supported with z_channels 4.*original's class"),
        ("kl", {"tanh_out": True}, {}, "tanh_out true.*apply torch.tanh"),
        ("kl", {"give_pre_end": True}, {}, "give_pre_end true.*set it to false"),
        ("vq", {"attn_type": "linear"}, {}, "attn_type linear.*vanilla, vanilla-xformers, none"),
        ("vq", {"use_linear_attn": True, "attn_type": "none"}, {}, "use_linear_attn true"),
        ("kl", {"attn_type": "memory-efficient-cross-attn"}, {}, "attn_type memory-efficient-cross-attn"),
        ("kl", {"ch_mult": [2, 4]}, {}, "ch_mult must begin with 1"),
        ("kl", {"ch_mult": [1, 1.5]}, {}, "ch_mult takes a list"),
        ("kl", {"ch_mult": []}, {}, "ch_mult takes a list"),
        ("kl", {"ch_mult": [1] * 7}, {}, "cannot be halved 6 times"),
        ("kl", {"ch": 48}, {}, "ch 48 is not possible: it must be a multiple of 32"),
        ("kl", {"ch": 2**20}, {}, "ch takes a whole number"),
        ("kl", {"ch": 65536, "ch_mult": [1, 64]}, {}, "block_out_channels|weights take at least"),
        ("kl", {"z_channels": 0}, {}, "z_channels takes"),
        ("kl", {"z_channels": None}, {}, "lacks z_channels"),
        ("kl", {"resolution": [32, 32]}, {}, "resolution takes"),
        ("kl", {"attn_resolutions": 16}, {}, "attn_resolutions takes a list"),
        ("kl", {"double_z": False}, {}, "double_z false.*set it to true"),
        ("vq", {"double_z": None}, {}, "double_z true.*default true.*set it to false"),
        ("vq", {}, {"n_embed": None}, "n_embed is missing"),
        ("vq", {}, {"n_embed": 0}, "n_embed takes"),
        ("kl", {}, {"embed_dim": "4"}, "embed_dim takes"),
        ("kl", {}, {"embed_dim": None}, "embed_dim is missing"),
        ("kl", {}, {"ddconfig": None}, "ddconfig is missing"),
        ("kl", {}, {"ddconfig": [1]}, "ddconfig must be a mapping"),
        ("kl", {}, {"embedding": 4}, "embedding 4 is not supported"),
        ("kl", {"attn_type": "${a.b}"}, {}, "attn_type"),
    ],
)
def test_refused_in_one_sentence(kind, ddconfig, params, words):
    with pytest.raises(ValueError, match=words) as error:
        read_first_stage(section(kind, ddconfig, **params), "first_stage_config")
    message = str(error.value)
    assert message.startswith("first_stage_config.")
    assert "\n" not in message
    assert len(message) < 300


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("ldm.models.autoencoder.IdentityFirstStage", "no weights"),
        ("ldm.models.autoencoder.AutoencoderKLResi", "no Diffusers class"),
        ("ldm.models.autoencoder.AutoencoderKl", "did you mean AutoencoderKL"),
        (None, "known are AutoencoderKL, VQModel, VQModelInterface"),
        ({"a": 1}, "known are"),
    ],
)
def test_other_classes_are_refused(target, words):
    with pytest.raises(ValueError, match=words):
        read_first_stage({"target": target, "params": {}}, "model")


def test_attention_follows_the_configurations_resolution():
    """50 is halved to 25 and 12 on the way down, and doubled from 12 to 24 and 48 on the way up."""
    odd = DDCONFIG | {"resolution": 50, "ch_mult": [1, 1, 1], "attn_type": "vanilla"}
    assert attention_levels(odd | {"attn_resolutions": [25]}) == ([False, True, False], [False] * 3)
    assert attention_levels(odd | {"attn_resolutions": [12, 48]}) == ([False, False, True], [True, False, True])
    assert attention_levels(odd | {"attn_resolutions": [25], "attn_type": "none"}) == ([False] * 3, [False] * 3)
    config = read_first_stage(section("kl", {"resolution": 50, "ch_mult": [1, 1, 2], "attn_resolutions": [25]}), "x")
    autoencoder = config.build()
    weights = export_first_stage(autoencoder, config.section)
    assert "encoder.down.1.attn.0.q.weight" in weights
    assert not any(key.startswith("decoder.up") and ".attn." in key for key in weights)
    with pytest.raises(ValueError, match="attention cannot be exported"):
        export_first_stage(autoencoder)


def test_the_original_ignores_other_arguments_of_its_encoder():
    config = read_first_stage(section("kl", {"use_old": 1}, lossconfig={"target": "x"}, monitor="a"), "x")
    fates = {row.key: row.fate for row in config.rows}
    assert fates["x.params.ddconfig.use_old"] == fates["x.params.lossconfig"] == "without effect"
    assert fates["x.params.ddconfig.ch"] == "translated"


def test_a_codebook_of_another_width():
    config = read_first_stage(section("vq", embed_dim=6), "x")
    autoencoder = config.build()
    assert isinstance(autoencoder, VQModel)
    weights = export_first_stage(autoencoder)
    assert weights["quantize.embedding.weight"].shape == (16, 6)
    assert weights["quant_conv.weight"].shape == (6, 4, 1, 1)
    assert weights["post_quant_conv.weight"].shape == (4, 6, 1, 1)
    assert first_stage_config_of(autoencoder).embed_dim == 6


def test_resampling_without_weights_is_pooling_and_repeating():
    """The convolutions that replace it compute the same; they do not go back."""
    config = read_first_stage(section("kl", {"resamp_with_conv": False}), "x")
    with torch.random.fork_rng(devices=[]):
        weights = export_first_stage(read_first_stage(section("kl"), "x").build())
    del weights["encoder.down.0.downsample.conv.weight"], weights["encoder.down.0.downsample.conv.bias"]
    del weights["decoder.up.1.upsample.conv.weight"], weights["decoder.up.1.upsample.conv.bias"]
    autoencoder, rows = convert_first_stage(weights, config)
    assert sum(not row.source for row in rows) == 4
    x = torch.randn(2, 32, 7, 9)
    down = autoencoder.encoder.down_blocks[0].downsamplers[0](x)
    torch.testing.assert_close(down, functional.avg_pool2d(x, 2))
    y = torch.randn(2, 64, 3, 5)
    up = autoencoder.decoder.up_blocks[0].upsamplers[0](y)
    torch.testing.assert_close(up, functional.interpolate(y, scale_factor=2.0, mode="nearest"))
    with pytest.raises(ValueError, match="resamp_with_conv false cannot be exported"):
        export_first_stage(autoencoder, config.section)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"act_fn": "gelu"}, "act_fn is gelu"),
        ({"use_quant_conv": False}, "use_quant_conv is False"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, "latents_mean"),
        ({"shift_factor": 0.1}, "shift_factor is 0.1"),
        ({"norm_num_groups": 16}, "norm_num_groups is 16"),
        ({"block_out_channels": (64, 96)}, "multiples of the first"),
        ({"up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D")}, "same levels"),
    ],
)
def test_what_the_original_cannot_express(settings, words):
    plain = {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    with pytest.raises(ValueError, match=words):
        export_first_stage(AutoencoderKL(**plain | settings))


def test_other_autoencoders_do_not_go_back():
    tiny = AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                           num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))  # fmt: skip
    with pytest.raises(ValueError, match="AutoencoderTiny, which cannot be exported"):
        export_first_stage(tiny)


def test_the_recorded_configuration_counts_while_it_is_the_same_autoencoder():
    config = read_first_stage(section("kl", {"attn_type": "vanilla-xformers", "dropout": 0.5}), "x")
    autoencoder = config.build()
    recorded = copy.deepcopy(config.section)
    assert original_config(autoencoder, recorded).ddconfig["attn_type"] == "vanilla-xformers"
    recorded["params"]["ddconfig"]["ch"] = 64
    assert original_config(autoencoder, recorded).ddconfig["attn_type"] == "vanilla"
    autoencoder.register_to_config(shift_factor=0.5)
    with pytest.raises(ValueError, match="shift_factor"):
        original_config(autoencoder, config.section)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "nan", "integers"])
def test_damaged_weights(change):
    config = read_first_stage(section("kl"), "x")
    weights = export_first_stage(config.build())
    key = "decoder.mid.attn_1.q.weight"
    if change == "missing":
        del weights[key]
    elif change == "unexpected":
        weights["decoder.mid.attn_2.q.weight"] = torch.zeros(1)
    elif change == "shape":
        weights[key] = weights[key][..., 0].reshape(32, 128)
    elif change == "nan":
        weights[key] = torch.full_like(weights[key], float("nan"))
    else:
        weights[key] = weights[key].to(torch.int8)
    with pytest.raises(ValueError, match=r"attn_[12]\.q\.weight"):
        convert_first_stage(weights, config)

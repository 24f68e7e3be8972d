"""Flags of improved-diffusion and guided-diffusion: rules of their papers and command lines."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers.conversion_cases import random_weights

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, UNet2DExtModel
from diffusers_ddpm_ext.compvis.architecture import translate_unet
from diffusers_ddpm_ext.compvis.config.openai import read_flags
from diffusers_ddpm_ext.compvis.convert import convert_openai
from diffusers_ddpm_ext.compvis.weights import export_unet

SMALL = {"image_size": 32, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "num_head_channels": 16}


def test_attention_resolutions_are_pixels():
    config = read_flags({"image_size": 64, "attention_resolutions": "16,8", "sigma_small": True})
    assert config.unet_params["attention_resolutions"] == [4, 8]
    assert config.unet_params["channel_mult"] == [1, 2, 3, 4]
    assert config.family == "improved"


@pytest.mark.parametrize(("size", "mult"), [(256, [1, 1, 2, 2, 4, 4]), (128, [1, 1, 2, 3, 4]), (32, [1, 2, 2, 2])])
def test_widths_follow_from_the_size(size, mult):
    assert read_flags({"image_size": size}).unet_params["channel_mult"] == mult


def test_linear_betas_scale_with_the_number_of_steps():
    """Appendix of [iDDPM]: the same noise at the end for any T."""
    schedule = DDPMExtScheduler(**read_flags({"diffusion_steps": 4000, "family": "improved"}).schedule).schedule
    assert np.allclose(schedule.betas, np.linspace(0.0001 / 4, 0.02 / 4, 4000), rtol=1e-14)


def test_cosine_betas():
    """[iDDPM] eq. 17, betas at most 0.999."""
    schedule = DDPMExtScheduler(**read_flags({"noise_schedule": "cosine"}).schedule).schedule
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    assert np.allclose(schedule.betas, np.minimum(1 - f[1:] / f[:-1], 0.999), rtol=1e-12)


def test_other_flags():
    config = read_flags({"learn_sigma": True, "predict_xstart": True, "class_cond": True, "use_fp16": True})
    assert config.family == "guided"
    assert config.unet_params["out_channels"] == 6
    assert config.schedule["variance_type"] == "learned_range"
    assert config.schedule["prediction_type"] == "sample"
    assert config.class_cond
    assert config.timestep_scale == 1
    fates = {row.key: row.fate for row in config.rows}
    assert fates["use_fp16"] == fates["timestep_respacing"] == "without effect"
    assert read_flags({"sigma_small": True}).schedule["variance_type"] == "fixed_small"
    assert read_flags({"sigma_small": False}).schedule["variance_type"] == "fixed_large"
    assert read_flags({"diffusion_steps": 4000, "family": "improved"}).timestep_scale == 0.25
    assert read_flags({"diffusion_steps": 4000, "family": "guided"}).timestep_scale == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"diffusion_steps": 4000}, "family"),
        ({"sigma_small": True, "use_fp16": True}, "families"),
        ({"large_size": 256}, "super-resolution"),
        ({"classifier_depth": 2}, "classifier"),
        ({"num_chanels": 64}, "num_channels"),
        ({"image_size": 48}, "channel_mult"),
        ({"noise_schedule": "sqrt"}, "noise_schedule"),
        ({"learn_sigma": "perhaps"}, "learn_sigma"),
        ({"num_heads": "many"}, "num_heads"),
        ({"attention_resolutions": "a"}, "attention_resolutions"),
        ({"family": "stable"}, "family"),
    ],
)
def test_refused_by_name(flags, message):
    with pytest.raises(ValueError, match=message):
        read_flags(flags)


def test_half_of_the_first_width_is_refused():
    """guided-diffusion's 512 model."""
    with pytest.raises(ValueError, match="channel_mult"):
        translate_unet(read_flags({"image_size": 512, "use_fp16": False}).unet_params)


@pytest.mark.parametrize("steps", [1000, 4000])
def test_a_checkpoint_becomes_a_pipeline(steps, tmp_path):
    """Learned variances, classes and scaled timesteps, in a folder that samples and matches its source."""
    flags = SMALL | {"learn_sigma": True, "class_cond": True, "rescale_timesteps": True, "diffusion_steps": steps}
    config = read_flags(flags)
    params = config.unet_params | {"num_classes": 5}
    for seed, name in ((1, "model.pt"), (2, "ema.pt")):
        torch.save(export_unet(random_weights(translate_unet(params).build(), seed), params), tmp_path / name)
    (tmp_path / "flags.json").write_text(json.dumps(flags))
    converted = convert_openai(tmp_path / "model.pt", tmp_path / "flags.json", tmp_path / "ema.pt")
    assert isinstance(converted.pipeline.unet, UNet2DExtModel) == (steps == 4000)
    converted.save(tmp_path / "folder")
    assert converted.compare(tmp_path / "folder") == []
    pipeline = DDPMExtPipeline.from_pretrained(tmp_path / "folder")
    truth = torch.load(tmp_path / "ema.pt", weights_only=True)
    assert torch.equal(pipeline.unet.conv_in.weight, truth["input_blocks.0.0.weight"])
    raw = DDPMExtPipeline.from_pretrained(tmp_path / "folder", variant="raw")
    truth = torch.load(tmp_path / "model.pt", weights_only=True)
    assert torch.equal(raw.unet.conv_in.weight, truth["input_blocks.0.0.weight"])
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(class_labels=[0, 4], num_inference_steps=3, output_type="np").images
    assert images.shape == (2, 32, 32, 3)
    with pytest.raises(ValueError, match=r"0\.\.4"):
        pipeline(class_labels=5)

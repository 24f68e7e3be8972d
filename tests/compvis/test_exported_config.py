"""The YAML file of ``--config_out``: arguments that both originals take, and what they compute from them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from helpers.conversion_cases import BASE, CROSS, FOLDER, random_weights

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from diffusers_ddpm_ext.cli import main
from diffusers_ddpm_ext.compvis.architecture import translate_unet
from diffusers_ddpm_ext.compvis.save import compvis_config, save_compvis

# Arguments of the classes in CompVis/latent-diffusion.
DDPM_ARGUMENTS = """
unet_config timesteps beta_schedule loss_type ckpt_path ignore_keys load_only_unet monitor use_ema
first_stage_key image_size channels log_every_t clip_denoised linear_start linear_end cosine_s given_betas
original_elbo_weight v_posterior l_simple_weight conditioning_key parameterization scheduler_config
use_positional_encodings learn_logvar logvar_init
"""
UNET_ARGUMENTS = """
image_size in_channels model_channels out_channels num_res_blocks attention_resolutions dropout channel_mult
conv_resample dims num_classes use_checkpoint use_fp16 num_heads num_head_channels num_heads_upsample
use_scale_shift_norm resblock_updown use_new_attention_order use_spatial_transformer transformer_depth
context_dim n_embed legacy
"""


def pipeline(network: dict | None = None, key: str | None = None, **schedule) -> DDPMExtPipeline:
    unet = translate_unet(BASE | (network or {}), conditioning_key=key).build()
    return DDPMExtPipeline(random_weights(unet), DDPMExtScheduler(**schedule), conditioning_key=key)


def original_betas(params: dict) -> np.ndarray:
    """The betas that ``make_beta_schedule`` of the original returns for the arguments."""
    start, end, steps = params["linear_start"], params["linear_end"], params["timesteps"]
    if params["beta_schedule"] == "cosine":
        t = np.arange(steps + 1) / steps + params["cosine_s"]
        alphas = np.cos(t / (1 + params["cosine_s"]) * np.pi / 2) ** 2
        return np.clip(1 - alphas[1:] / alphas[:-1], 0, 0.999)
    if params["beta_schedule"] == "linear":
        return np.linspace(start**0.5, end**0.5, steps) ** 2
    line = np.linspace(start, end, steps)
    return line if params["beta_schedule"] == "sqrt_linear" else np.sqrt(line)


@pytest.mark.parametrize(
    "schedule",
    [
        {"beta_schedule": "linear", "num_train_timesteps": 40},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2", "cosine_s": 0.02, "num_train_timesteps": 300},
        {"beta_schedule": "sqrt", "beta_end": 0.01},
        {"trained_betas": np.linspace(1e-3, 0.04, 30).tolist()},
        {"trained_betas": np.linspace(0.02, 0.3, 20, dtype=np.float32).astype(float) ** 2},
        {"trained_betas": [0.25, 0.5]},
    ],
)
def test_betas_with_a_name(schedule):
    pipe = pipeline(**schedule)
    params = compvis_config(pipe)["model"]["params"]
    assert "given_betas" not in params, "the original subtracts it from 1: a list of YAML fails there"
    np.testing.assert_allclose(original_betas(params), pipe.scheduler.schedule.betas, rtol=1e-6)


@pytest.mark.parametrize(
    "schedule",
    [
        {"beta_schedule": "sigmoid"},
        {"beta_schedule": "laplace", "num_train_timesteps": 100},
        {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"trained_betas": [0.1, 0.3, 0.2, 0.4]},
    ],
)
def test_betas_without_a_name_are_in_the_checkpoint_only(schedule, tmp_path, capsys):
    pipe = pipeline(**schedule)
    pipe.save_pretrained(tmp_path / "folder")
    out = ["--out", str(tmp_path / "m.ckpt"), "--config_out", str(tmp_path / "m.yaml")]
    assert main(["convert", "--to", "compvis", str(tmp_path / "folder"), *out]) == 0
    assert "--schedule checkpoint" in capsys.readouterr().out
    text = (tmp_path / "m.yaml").read_text()
    assert text.startswith("# ")
    params = yaml.safe_load(text)["model"]["params"]
    assert "given_betas" not in params
    state = torch.load(tmp_path / "m.ckpt", weights_only=True)["state_dict"]
    assert params["timesteps"] == len(state["betas"]) == len(pipe.scheduler.schedule), "the tables fit its buffers"
    back = ["--from", "compvis", "--checkpoint", str(tmp_path / "m.ckpt"), "--config", str(tmp_path / "m.yaml")]
    assert main(["convert", *back, "--schedule", "checkpoint", "--out", str(tmp_path / "again")]) == 0
    again = DDPMExtPipeline.from_pretrained(tmp_path / "again")
    np.testing.assert_allclose(again.scheduler.schedule.betas, pipe.scheduler.schedule.betas, rtol=1e-6)


@pytest.mark.parametrize(
    ("network", "key"),
    [
        ({}, None),
        (CROSS, "crossattn"),
        (CROSS | {"num_classes": 5}, "crossattn-adm"),
        (CROSS | {"disable_self_attentions": [False, False], "num_heads": 2}, "crossattn"),
        ({"num_classes": 4}, "adm"),
        ({"in_channels": 6}, "concat"),
    ],
)
@pytest.mark.parametrize("use_ema", [True, False])
def test_arguments_that_both_originals_take(network, key, use_ema):
    params = compvis_config(pipeline(network, key), use_ema)["model"]["params"]
    assert params.keys() <= set(DDPM_ARGUMENTS.split())
    assert params["unet_config"]["params"].keys() <= set(UNET_ARGUMENTS.split())
    assert params["use_ema"] is use_ema
    assert isinstance(params["unet_config"]["params"]["num_res_blocks"], int), "range() of a list fails"


def test_what_only_stability_has_is_kept_where_it_matters():
    params = compvis_config(pipeline(CROSS | {"disable_self_attentions": [True, False]}, "crossattn"))
    assert params["model"]["params"]["unet_config"]["params"]["disable_self_attentions"] == [True, False]


def test_a_damaged_report_is_not_ignored(tmp_path):
    """Without it the order of the attention's heads would silently be another."""
    pipe = pipeline({"num_heads": 4})
    pipe.save_pretrained(tmp_path / "folder")
    for text in ("{", "[]", "{}", '{"facts": 3}', '{"facts": {"unet_params": [1]}}', '{"facts": {"unet_params": {}}}'):
        (tmp_path / "folder" / "conversion.json").write_text(text)
        with pytest.raises(ValueError, match=r"conversion\.json|UNetModel needs"):
            save_compvis(tmp_path / "folder", tmp_path / "m.ckpt")
        assert not (tmp_path / "m.ckpt").exists()
    facts = {"unet_params": BASE | {"num_heads": 4, "use_new_attention_order": True}}
    (tmp_path / "folder" / "conversion.json").write_text(json.dumps({"facts": facts}))
    assert compvis_config(tmp_path / "folder")["model"]["params"]["unet_config"]["params"]["use_new_attention_order"]


def test_the_recorded_folder_keeps_its_own_arguments(tmp_path):
    source = ["--checkpoint", str(FOLDER / "ema.ckpt"), "--config", str(FOLDER / "ema.yaml")]
    assert main(["convert", "--from", "compvis", *source, "--out", str(tmp_path / "folder"), "--quiet"]) == 0
    theirs = yaml.safe_load((FOLDER / "ema.yaml").read_text())["model"]["params"]["unet_config"]["params"]
    ours = compvis_config(tmp_path / "folder")["model"]["params"]["unet_config"]["params"]
    assert {name: ours[name] for name in theirs if name.startswith("num_head")} == {
        name: value for name, value in theirs.items() if name.startswith("num_head")
    }

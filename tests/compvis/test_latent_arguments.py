"""Arguments of `LatentDiffusion` that `DDPM` lacks: what each becomes, or why it has no effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from helpers.conversion_cases import BASE, random_weights

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from diffusers_ddpm_ext.compvis import load_compvis, save_compvis
from diffusers_ddpm_ext.compvis.architecture import translate_unet
from diffusers_ddpm_ext.compvis.config.ddpm import CompVisConfig, read_compvis_config
from diffusers_ddpm_ext.compvis.save import compvis_config

STAGE = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}


def read(**params: Any) -> CompVisConfig:
    network = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": dict(BASE)}
    params = {"unet_config": network, "image_size": 8, "cond_stage_config": STAGE} | params
    return read_compvis_config({"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}})


def fate(config: CompVisConfig, name: str) -> tuple[str, str]:
    row = next(row for row in config.rows if row.key == f"model.params.{name}")
    return row.fate, row.note


def test_methods_of_a_stage_have_no_effect():
    plain, named = read(conditioning_key="crossattn"), read(conditioning_key="crossattn", cond_stage_forward="embed")
    assert fate(named, "cond_stage_forward")[0] == "without effect"
    assert (plain.conditioning_key, plain.schedule) == (named.conditioning_key, named.schedule)


def test_the_key_of_a_condition_is_a_column():
    action, note = fate(read(conditioning_key="crossattn", cond_stage_key="caption"), "cond_stage_key")
    assert action == "without effect"
    assert all(
        option in note for option in ("--class_column", "--caption_column", "--concat_column", "--context_column")
    )


@pytest.mark.parametrize(
    ("key", "force", "expected"),
    [("crossattn", True, "crossattn"), ("crossattn", False, None), (None, True, "concat"), (None, False, None)],
)
def test_a_forced_key_counts_without_a_stage(key, force, expected):
    """As stablediffusion's class resolves it: `conditioning_key` is dropped without a stage, unless it is forced."""
    config = read(conditioning_key=key, cond_stage_config="__is_unconditional__", force_null_conditioning=force)
    assert config.conditioning_key == expected


def saved(folder: Path, concat: bool = False) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Configuration and tensors of a model of latents in the original's format; its scale is 0.25."""
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    torch.manual_seed(0)
    vae = AutoencoderKL(**levels, block_out_channels=(32, 32), latent_channels=4, scaling_factor=0.25)
    unet = random_weights(translate_unet(BASE | {"in_channels": 8 if concat else 4, "out_channels": 4}).build())
    condition = {"conditioning_key": "concat", "concat_through_vae": "mode"} if concat else {}
    pipeline = DDPMExtPipeline(unet, DDPMExtScheduler(4, clip_sample=False), vae=vae, **condition)
    pipeline.save_pretrained(folder / "model")
    save_compvis(folder / "model", folder / "model.ckpt", use_ema=False)
    return compvis_config(folder / "model", False), torch.load(folder / "model.ckpt")["state_dict"]


def loaded(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> DDPMExtPipeline:
    torch.save({"state_dict": tensors}, folder / "other.ckpt")
    return load_compvis(folder / "other.ckpt", config=config)


def test_the_first_stage_goes_both_ways(tmp_path):
    config, tensors = saved(tmp_path)
    own = AutoencoderKL.from_pretrained(next((tmp_path / "model").glob("v*"))).state_dict()
    pipeline = loaded(tmp_path, config, tensors)
    assert config["model"]["params"]["first_stage_config"]["target"] == "ldm.models.autoencoder.AutoencoderKL"
    assert sum(name.startswith("first_stage_model.") for name in tensors) == len(own)
    assert all(torch.equal(tensor, own[name]) for name, tensor in pipeline.vae.state_dict().items())
    without = {name: tensor for name, tensor in tensors.items() if not name.startswith("first_stage_model.")}
    latents = loaded(tmp_path, config, without)
    assert latents.vae is None
    assert latents.config.latent_scaling_factor == 0.25


def test_the_first_stage_as_conditioning_stage(tmp_path):
    config, tensors = saved(tmp_path, concat=True)
    assert config["model"]["params"]["cond_stage_config"] == "__is_first_stage__"
    pairs = [(name, f"cond_stage_model.{name[18:]}") for name in tensors if name.startswith("first_stage_model.")]
    assert all(torch.equal(tensors[first], tensors[second]) for first, second in pairs), "it is in the file twice"
    pipeline = loaded(tmp_path, config, tensors)
    assert (pipeline.config.conditioning_key, pipeline.config.concat_through_vae) == ("concat", "mode")


def test_the_scale_is_written_into_the_autoencoder(tmp_path):
    """The configuration's, unless the file has one, which training has measured; it must where it says so."""
    config, tensors = saved(tmp_path)
    params = config["model"]["params"]
    assert (params["scale_factor"], params["scale_by_std"]) == (0.25, False)
    assert "scale_factor" not in tensors
    assert loaded(tmp_path, config, tensors).vae.config.scaling_factor == 0.25
    measured = tensors | {"scale_factor": torch.tensor(0.5)}
    for by_std in (True, False):
        params["scale_by_std"] = by_std
        assert loaded(tmp_path, config, measured).vae.config.scaling_factor == 0.5
    params["scale_by_std"] = True
    with pytest.raises(ValueError, match="scale_by_std is true, but the checkpoint has no scale_factor"):
        loaded(tmp_path, config, tensors)

"""A configuration with a first stage becomes a recipe that runs, from the converted checkpoint too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.accelerate_state import fresh_accelerate  # noqa: F401
from helpers.tiny import tiny_autoencoder
from PIL import Image

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from diffusers_ddpm_ext.cli import main
from diffusers_ddpm_ext.compvis.architecture import translate_unet
from diffusers_ddpm_ext.compvis.config.ddpm import read_compvis_config
from diffusers_ddpm_ext.compvis.config.recipe import recipe
from diffusers_ddpm_ext.compvis.save import compvis_config, save_compvis
from diffusers_ddpm_ext.training.config.train_config import TrainConfig

UNET = {
    "image_size": 4, "in_channels": 3, "out_channels": 3, "model_channels": 32, "num_res_blocks": 1,
    "attention_resolutions": [2], "channel_mult": [1, 2], "num_head_channels": 32,
}  # fmt: skip
STAGE = {"block_out_channels": (32, 32), "norm_num_groups": 32, "layers_per_block": 1, "sample_size": 8}
RUN = ("--max_train_steps", "1", "--train_batch_size", "4", "--num_preview_images", "1", "--report_to", "none")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a LatentDiffusion and its configuration, and pictures to train on."""
    folder = tmp_path_factory.mktemp("original")
    unet = translate_unet(UNET).build()
    scheduler = DDPMExtScheduler(num_train_timesteps=4, clip_sample=False)
    vae = tiny_autoencoder("kl", latent_channels=3, scaling_factor=0.7, **STAGE)
    pipeline = DDPMExtPipeline(unet, scheduler, vae=vae)
    save_compvis(pipeline, folder / "m.ckpt")
    (folder / "m.yaml").write_text(yaml.safe_dump(compvis_config(pipeline)))
    (folder / "images").mkdir()
    draw = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / "images" / f"{number}.png")
    source = ["--checkpoint", str(folder / "m.ckpt"), "--config", str(folder / "m.yaml")]
    assert main(["convert", "--from", "compvis", *source, "--out", str(folder / "converted")]) == 0
    return folder


def changed(original: Path, folder: Path, **params: Any) -> str:
    """The recipe of a configuration with other parameters of the model; its file."""
    content = yaml.safe_load((original / "m.yaml").read_text())
    content["model"]["params"] |= params
    (folder / "m.yaml").write_text(yaml.safe_dump(content))
    assert main(["convert-config", str(folder / "m.yaml"), "--out", str(folder / "run.yaml")]) == 0
    return str(folder / "run.yaml")


@pytest.mark.parametrize("start", [pytest.param("--vae", marks=pytest.mark.slow), "--ckpt_path"])
def test_the_recipe_runs_and_goes_on_with_the_first_stage(start, original, tmp_path):
    """With the images' size in pixels; from the checkpoint with its factor, though the recipe measures one."""
    run = changed(original, tmp_path, scale_by_std=True, scale_factor=1.0)
    out, images = tmp_path / "out", str(original / "images")
    line = ["train", "--config", run, start, str(original / "converted"), "--train_data_dir", images]
    assert main([*line, *RUN, "--output_dir", str(out)]) == 0
    converted, trained = (DDPMExtPipeline.from_pretrained(folder) for folder in (original / "converted", out))
    own, old = (pipeline.vae.config.scaling_factor for pipeline in (trained, converted))
    assert old == pytest.approx(0.7)
    assert (own == old) == (start == "--ckpt_path")
    assert trained.unet.config.sample_size == 4
    for name, tensor in converted.vae.state_dict().items():
        assert torch.equal(trained.vae.state_dict()[name], tensor)


def test_options_of_latents(original):
    """Size in pixels, scale, and conditions through the first stage, as LatentDiffusion has them."""
    content = yaml.safe_load((original / "m.yaml").read_text())
    params = content["model"]["params"]
    options = recipe(read_compvis_config(content))
    assert options["data"]["resolution"] == 8
    assert "channels" not in options["data"]
    assert options["latents"] == {"scale_factor": pytest.approx(0.7)}
    params |= {"cond_stage_config": "__is_first_stage__", "conditioning_key": "concat", "scale_by_std": True}
    params["unet_config"]["params"]["in_channels"] = 6
    assert recipe(read_compvis_config(content))["latents"] == {"scale_by_std": True, "concat_through_vae": "mode"}
    content["model"]["target"] = "ldm.models.diffusion.ddpm.LatentInpaintDiffusion"
    assert recipe(read_compvis_config(content))["latents"]["concat_through_vae"] == "sample"
    del params["first_stage_config"]["params"]["ddconfig"]["ch_mult"]
    assert "resolution" not in recipe(read_compvis_config(content)).get("data", {})


@pytest.mark.parametrize(("params", "classes"), [({"n_classes": 5, "embed_dim": 16}, 5), ({"embed_dim": 16}, 1000)])
def test_the_table_of_a_class_embedder_keeps_its_size(params, classes, original):
    content = yaml.safe_load((original / "m.yaml").read_text())
    content["model"]["params"] |= {
        "cond_stage_config": {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": params},
        "conditioning_key": "crossattn",
    }
    content["model"]["params"]["unet_config"]["params"] |= {"use_spatial_transformer": True, "context_dim": 16}
    options = recipe(read_compvis_config(content))
    assert options["model"]["num_class_embeds"] == classes
    run = TrainConfig.from_flat(
        {**options, "data": options["data"] | {"class_column": "kind", "train_data_dir": "/"}, "vae": "x/y"}
    )
    assert run.model.num_class_embeds == classes

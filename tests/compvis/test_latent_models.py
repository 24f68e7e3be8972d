"""Latents of an autoencoder are numbers: nothing makes images of them, and no run trains on images instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMPipeline, UNet2DModel
from helpers.conversion_cases import BASE, random_weights
from PIL import Image

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from diffusers_ddpm_ext.cli import main
from diffusers_ddpm_ext.compvis.architecture import translate_unet
from diffusers_ddpm_ext.compvis.weights import export_unet
from diffusers_ddpm_ext.training.config.train_config import parse_train_args

UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
VQ = {"target": "ldm.models.autoencoder.VQModelInterface", "params": {"embed_dim": 3}}


def write_source(
    folder: Path, channels: int, target: str = "LatentDiffusion", state: dict[str, Any] | None = None, **params: Any
) -> list[str]:
    """A checkpoint of a LatentDiffusion and its configuration, as options."""
    unet = BASE | {"in_channels": channels, "out_channels": channels}
    weights = export_unet(random_weights(translate_unet(unet).build()), unet)
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in weights.items()}
    torch.save({"state_dict": tensors | (state or {})}, folder / "m.ckpt")
    stages = {"first_stage_config": VQ, "cond_stage_config": "__is_unconditional__"}
    network = {"target": UNET, "params": unet}
    params = {"unet_config": network, "image_size": 8, "channels": channels, "timesteps": 4} | stages | params
    content = {"model": {"target": f"ldm.models.diffusion.ddpm.{target}", "params": params}}
    (folder / "m.yaml").write_text(yaml.safe_dump(content))
    return ["--checkpoint", str(folder / "m.ckpt"), "--config", str(folder / "m.yaml")]


@pytest.mark.parametrize(
    ("channels", "target"), [(4, "LatentDiffusion"), (3, "LatentFinetuneDiffusion"), (16, "LatentDiffusion")]
)
def test_latents_are_written_as_numbers_only(channels, target, tmp_path, capsys):
    source = write_source(tmp_path, channels, target=target, scale_factor=0.25)
    folder = str(tmp_path / "folder")
    assert main(["convert", "--from", "compvis", *source, "--out", folder]) == 0
    assert json.loads((tmp_path / "folder" / "model_index.json").read_text())["latent_scaling_factor"] == 0.25
    capsys.readouterr()
    for out in ("a.png", "grids", "a.gif", "a.jpg"):
        assert main(["sample", folder, "--out", str(tmp_path / out), "--num_images", "2"]) == 2
        assert "latents of an autoencoder" in capsys.readouterr().err
        assert not (tmp_path / out).exists()
    assert main(["sample", folder, "--out", str(tmp_path / "a.npz"), "--individual", str(tmp_path / "x")]) == 2
    assert main(["convert", "--from", "compvis", *source, "--out", f"{folder}2", "--samples", "2"]) == 2
    for out in ("a.npy", "a.npz"):
        assert main(["sample", folder, "--out", str(tmp_path / out), "--num_images", "2", "--seed", "5"]) == 0
    plain, packed = np.load(tmp_path / "a.npy"), np.load(tmp_path / "a.npz")["arr_0"]
    assert plain.dtype == packed.dtype == np.float32
    np.testing.assert_array_equal(plain, packed)
    assert plain.shape == (2, 8, 8, channels)
    assert plain.max() > 1, "not clipped"
    assert plain.min() < 0


def test_outputs_of_the_pipeline():
    def pipeline(factor: Any) -> DDPMExtPipeline:
        blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        unet = UNet2DModel(in_channels=4, out_channels=4, sample_size=8, block_out_channels=(32, 32), **blocks)
        scheduler = DDPMExtScheduler(num_train_timesteps=3, clip_sample=False)
        return DDPMExtPipeline(random_weights(unet), scheduler, latent_scaling_factor=factor)

    latent, image = pipeline(0.5), pipeline(None)
    outputs = {
        kind: latent(generator=torch.Generator().manual_seed(0), output_type=kind).images
        for kind in ("pt", "np", "latent")
    }
    assert torch.equal(outputs["pt"], outputs["latent"])
    np.testing.assert_array_equal(outputs["np"], outputs["pt"].permute(0, 2, 3, 1).numpy())
    with pytest.raises(ValueError, match="latents of an autoencoder"):
        latent()
    assert image().images[0].mode == "RGBA", "a model of RGBA images is still one"
    for wrong in (0, -1, float("nan"), "0.18", True):
        with pytest.raises(ValueError, match="latent_scaling_factor"):
            pipeline(wrong)


def test_stock_diffusers_and_other_pipelines_keep_the_mark(tmp_path):
    source = write_source(tmp_path, 4, state={"scale_factor": torch.tensor(0.25)})
    folder = tmp_path / "folder"
    assert main(["convert", "--from", "compvis", *source, "--out", str(folder)]) == 0
    pipe = DDPMExtPipeline.from_pretrained(folder)
    assert pipe.is_latent
    assert pipe.config.latent_scaling_factor == 0.25, "the file's, which may have been measured"
    assert DDPMExtPipeline.from_pipe(pipe).is_latent
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] != DDPMPipeline.__name__
    assert isinstance(UNet2DModel.from_pretrained(folder, subfolder="unet"), UNet2DModel), "to use with an autoencoder"
    assert main(["convert", "--check", str(folder), *source]) == 0
    index = json.loads((folder / "model_index.json").read_text())
    del index["latent_scaling_factor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert main(["convert", "--check", str(folder), *source]) == 1


@pytest.mark.parametrize("stage", [{"target": "ldm.models.autoencoder.IdentityFirstStage"}, None])
def test_without_an_autoencoder_the_samples_are_images(stage, tmp_path):
    source = write_source(tmp_path, 3, first_stage_config=stage)
    assert main(["convert", "--from", "compvis", *source, "--out", str(tmp_path / "folder"), "--samples", "2"]) == 0
    assert not DDPMExtPipeline.from_pretrained(tmp_path / "folder").is_latent


@pytest.mark.parametrize("channels", [3, 4, 8])
def test_no_run_trains_on_images_in_place_of_latents(channels, tmp_path, capsys):
    write_source(tmp_path, channels)
    run, out = tmp_path / "run.yaml", tmp_path / "run"
    assert main(["convert-config", str(tmp_path / "m.yaml"), "--out", str(run)]) == 0
    assert "name their first stage with --vae" in capsys.readouterr().out
    assert "name their first stage with --vae" in run.read_text()
    Image.new("RGBA", (8, 8)).save(tmp_path / "a.png")
    assert main(["train", "--config", str(run), "--train_data_dir", str(tmp_path), "--output_dir", str(out)]) == 2
    assert "network of latents" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("command", [["evaluate", "--split", "train"], ["fit-variance"]])
def test_latents_are_not_measured_on_images(command, tmp_path, capsys):
    source = write_source(tmp_path, 1)
    assert main(["convert", "--from", "compvis", *source, "--out", str(tmp_path / "folder")]) == 0
    (tmp_path / "images").mkdir()
    for index in range(4):
        Image.new("L", (8, 8), 60 * index).save(tmp_path / "images" / f"{index}.png")
    assert main([*command, str(tmp_path / "folder"), "--train_data_dir", str(tmp_path / "images")]) == 2
    assert "latents of an autoencoder" in capsys.readouterr().err


@pytest.mark.parametrize("channels", [2, 9, 16])
def test_a_model_of_arrays_names_its_command(channels, tmp_path, capsys):
    """Images of any number of channels, without an autoencoder."""
    write_source(tmp_path, channels, target="DDPM")
    content = yaml.safe_load((tmp_path / "m.yaml").read_text())
    del content["model"]["params"]["first_stage_config"], content["model"]["params"]["cond_stage_config"]
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(content))
    assert main(["convert-config", str(tmp_path / "m.yaml"), "--out", str(tmp_path / "run.yaml")]) == 0
    run, output = tmp_path / "run.yaml", capsys.readouterr().out
    assert f"ddpm-ext train --config {run} --train_data_dir FOLDER" in output
    network = parse_train_args(["--config", str(run), "--train_data_dir", str(tmp_path)]).model.model_config
    assert network["in_channels"] == channels

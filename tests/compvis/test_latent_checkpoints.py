"""Whole checkpoints with a first stage: recorded ones, and the released models at tiny width."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.paths import GOLDEN
from helpers.published_models import (
    BATCH,
    FOLDER,
    SEED,
    call_arguments,
    conditions,
    facts,
    seeded_state,
    some_pixels,
    stage_shapes,
)
from torch import Tensor

from diffusers_ddpm_ext import DDPMExtPipeline
from diffusers_ddpm_ext.cli import main
from diffusers_ddpm_ext.compvis import load_compvis, save_compvis
from diffusers_ddpm_ext.compvis.config.ddpm import read_compvis_config
from diffusers_ddpm_ext.compvis.convert import convert_compvis
from diffusers_ddpm_ext.compvis.reader.archive import read_tensors
from diffusers_ddpm_ext.compvis.save import compvis_config
from diffusers_ddpm_ext.models.first_stage import FirstStage, load_first_stage

MODELS = facts()
QUICK = (
    "latent-diffusion/inpainting_big",
    "latent-diffusion/layout2img-openimages256",
    "latent-diffusion/semantic_synthesis256",
    "stablediffusion/stable-diffusion/v2-1-stable-unclip-l-inference",
)
CONVERT = ["convert", "--from", "compvis", "--checkpoint"]


def arrays(name: str) -> dict[str, Tensor]:
    """Recorded numbers."""
    with np.load(FOLDER / f"{name}.npz") as loaded:
        return {key: torch.from_numpy(loaded[key]) for key in loaded}


def largest(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


def sample(pipeline: DDPMExtPipeline, seed: int, **arguments: Any) -> Tensor:
    """Latents, with noise from the global generator, as the original draws it."""
    pipeline.set_progress_bar_config(disable=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        latents: Tensor = pipeline(batch_size=BATCH, output_type="latent", **arguments).images
    return latents


def assert_is_back(path: Any, source: dict[str, Tensor]) -> None:
    back = torch.load(path, weights_only=True)["state_dict"]
    assert back.keys() == source.keys()
    assert [k for k in back if not torch.equal(back[k].float(), source[k].float())] == []


@pytest.mark.parametrize("place", ["memory", "folder"])
def test_a_codebook_and_classes(place, tmp_path):
    """Halves in the file; 64 codes, attention in the middle of the encoder, a ClassEmbedder."""
    path, config, truth = FOLDER / "vq_classes.ckpt", FOLDER / "vq_classes.yaml", arrays("vq_classes")
    if place == "memory":
        pipeline = source = load_compvis(path, config)
    else:
        converted = convert_compvis(path, config)
        converted.save(tmp_path / "folder")
        (tmp_path / "folder" / "conversion.json").write_text(json.dumps(converted.report.as_json()))
        assert converted.compare(tmp_path / "folder") == []
        pipeline, source = DDPMExtPipeline.from_pretrained(tmp_path / "folder"), tmp_path / "folder"
    latents = pipeline.first_stage.posterior(truth["x"])[0]
    assert largest(latents, truth["pre_quant"]) <= 1e-5
    assert torch.equal(pipeline.vae.quantize(latents)[2][2].flatten(), truth["codes"])
    assert largest(pipeline.encode_images(truth["x"]), truth["encoded"]) <= 1e-5
    assert largest(pipeline.decode_latents(truth["encoded"]), truth["decoded"]) <= 1e-5
    labels = truth["class_labels"].tolist()
    assert torch.equal(pipeline.class_embedder[labels][:, None], truth["context"])
    drawn = sample(pipeline, int(truth["sample_seed"]), class_labels=labels)
    assert largest(drawn, truth["sample_latent"]) <= 1e-5
    picture = pipeline.decode_latents(drawn)
    assert largest(picture, truth["sample_image"]) <= 1e-5
    ours, theirs = (((p / 2 + 0.5).clamp(0, 1) * 255).round() for p in (picture, truth["sample_image"]))
    assert float((ours == theirs).float().mean()) >= 0.999
    assert float((ours - theirs).abs().max()) <= 1
    save_compvis(source, tmp_path / "back.ckpt", use_ema=False)
    assert_is_back(tmp_path / "back.ckpt", read_tensors(path))


def test_mean_and_std_of_latents_go_back_inside_the_weights(tmp_path):
    """The original has one factor; a pipeline of ours may have more."""
    source = load_compvis(FOLDER / "vq_classes.ckpt", FOLDER / "vq_classes.yaml")
    stage = source.first_stage.with_scale(0.5, [0.1, 0.2, -0.1, 0.3], [2.0] * 4)
    pipeline = DDPMExtPipeline(source.unet, source.scheduler, vae=stage.autoencoder)
    pipeline.class_embedder = source.class_embedder
    save_compvis(pipeline, tmp_path / "m.ckpt", use_ema=False)
    config = compvis_config(pipeline, use_ema=False)
    assert config["model"]["params"]["scale_factor"] == 0.25
    assert config["model"]["params"]["cond_stage_config"]["params"]["n_classes"] == 5
    back = load_compvis(tmp_path / "m.ckpt", config)
    x = arrays("vq_classes")["x"]
    assert largest(back.encode_images(x), pipeline.encode_images(x)) <= 1e-5
    assert largest(back.decode_latents(pipeline.encode_images(x)), pipeline.decode_latents(stage.encode(x))) <= 1e-5
    uneven = source.first_stage.with_scale(None, [0.0] * 4, [1.0, 2.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="latents_mean"):
        save_compvis(DDPMExtPipeline(source.unet, source.scheduler, vae=uneven.autoencoder), tmp_path / "n.ckpt")


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_both_sets_of_weights_go_back_while_the_network_is_unchanged(weights, tmp_path):
    """A pipeline holds one set; `load_compvis` remembers where the other one is."""
    path, config = GOLDEN / "h_ckpt" / "ema.ckpt", GOLDEN / "h_ckpt" / "ema.yaml"
    pipeline = load_compvis(path, config, weights=weights)
    save_compvis(pipeline, tmp_path / "a.ckpt")
    assert_is_back(tmp_path / "a.ckpt", read_tensors(path))
    with torch.no_grad():
        pipeline.unet.conv_in.bias[0] += 1
    save_compvis(pipeline, tmp_path / "b.ckpt")
    changed = torch.load(tmp_path / "b.ckpt", weights_only=True)["state_dict"]
    key = "input_blocks.0.0.bias"
    ours = changed[f"model.diffusion_model.{key}"]
    assert torch.equal(ours, pipeline.unet.conv_in.bias)
    assert torch.equal(changed["model_ema.diffusion_model" + key.replace(".", "")], ours)


STAGE = "model.params.first_stage_config"


def changed_config(**changes: Any) -> dict[str, Any]:
    """The configuration of the recorded model, with other values by their last names."""
    content: dict[str, Any] = yaml.safe_load((FOLDER / "vq_classes.yaml").read_text())
    params = content["model"]["params"]
    for name, value in changes.items():
        place = params["first_stage_config"]["params"]["ddconfig"] if name not in params else params
        place[name] = value
    return content


def test_a_refused_first_stage_is_left_out_on_request(tmp_path):
    path = FOLDER / "vq_classes.ckpt"
    with pytest.raises(ValueError, match=rf"{STAGE}\..*tanh_out true.*; or leave the first stage out: ignore_keys"):
        load_compvis(path, changed_config(tanh_out=True))
    pipeline = load_compvis(path, changed_config(tanh_out=True), ignore_keys=["first_stage_model."])
    assert pipeline.vae is None
    assert pipeline.config.latent_scaling_factor == 1.0
    assert load_compvis(path, changed_config(tanh_out=True), load_only_unet=True).vae is None
    with pytest.raises(ValueError, match=r"lacks .* tensors of the first stage.*the whole first stage"):
        load_compvis(path, changed_config(), ignore_keys=["first_stage_model.decoder."])
    with pytest.raises(ValueError, match="do not belong to this configuration"):
        load_compvis(path, changed_config(attn_resolutions=[]))
    with pytest.raises(ValueError, match=r"lacks .* tensors of the first stage"):
        load_compvis(path, changed_config(attn_resolutions=[8, 16]))


def test_a_measured_factor_that_the_file_lacks(tmp_path):
    """With scale_by_std the configuration's factor is where training began, not what it measured."""
    with pytest.raises(ValueError, match=r"scale_by_std is true.*has no scale_factor"):
        load_compvis(FOLDER / "vq_classes.ckpt", changed_config(scale_by_std=True))
    tensors = dict(read_tensors(FOLDER / "vq_classes.ckpt"))
    torch.save({"state_dict": tensors | {"scale_factor": torch.tensor(0.75)}}, tmp_path / "m.ckpt")
    pipeline = load_compvis(tmp_path / "m.ckpt", changed_config(scale_by_std=True))
    assert pipeline.vae.config.scaling_factor == 0.75
    only = load_compvis(tmp_path / "m.ckpt", changed_config(scale_by_std=True), load_only_unet=True)
    assert only.config.latent_scaling_factor == 0.75
    save_compvis(pipeline, tmp_path / "back.ckpt", use_ema=False)
    assert torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"]["scale_factor"] == 0.75
    assert compvis_config(pipeline)["model"]["params"]["scale_by_std"] is True


def test_the_conditioning_stage_that_is_the_first_stage_again(tmp_path):
    name = "latent-diffusion/inpainting_big"
    state = seeded_state(MODELS[name])
    state["cond_stage_model.encoder.conv_in.bias"] = state["first_stage_model.encoder.conv_in.bias"] + 1
    torch.save({"state_dict": state}, tmp_path / "m.ckpt")
    with pytest.raises(ValueError, match=r"1 tensors of them differ.*cond_stage_model\.encoder\.conv_in\.bias"):
        load_compvis(tmp_path / "m.ckpt", MODELS[name])
    pipeline = load_compvis(tmp_path / "m.ckpt", MODELS[name], ignore_keys=["cond_stage_model."])
    assert pipeline.config.concat_through_vae == "mode"
    assert compvis_config(pipeline)["model"]["params"]["cond_stage_config"] == "__is_first_stage__"


def test_the_inpainting_class_takes_a_scaled_sample():
    name = "latent-diffusion/inpainting_big"
    params = MODELS[name]["model"]["params"]
    ways = {"ddpm.LatentInpaintDiffusion": "sample", "ddpm_edit.LatentDiffusion": "mode", "ddpm.LatentDiffusion": None}
    for target, way in ways.items():
        text = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}
        content = {
            "model": {"target": f"ldm.models.diffusion.{target}", "params": params | {"cond_stage_config": text}}
        }
        assert read_compvis_config(content, for_training=False).concat_through_vae == way


def test_an_autoencoder_alone(tmp_path, capsys):
    """A KL autoencoder in halves, with what its training leaves in the file; the folder is one for --vae."""
    source = dict(read_tensors(FOLDER / "kl_f2_first_stage.ckpt"))
    more = {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.tensor(0.9), "colorize": torch.ones(3, 2, 1, 1)}
    torch.save({"state_dict": source | more}, tmp_path / "m.ckpt")
    files = [str(tmp_path / "m.ckpt"), "--config", str(FOLDER / "kl_f2_first_stage.yaml")]
    folder, truth = tmp_path / "folder", arrays("kl_f2_first_stage")
    assert main([*CONVERT, *files, "--out", str(folder)]) == 0
    output = capsys.readouterr().out
    assert all(word in output for word in ("training loss", "EMA of the first stage", "segmentations", "--vae"))
    autoencoder = load_first_stage(folder)
    assert json.loads((folder / "config.json").read_text())["scaling_factor"] == 1.0
    stage = FirstStage(autoencoder)
    mean, std = stage.posterior(truth["x"])
    assert largest(mean, truth["moments"].chunk(2, dim=1)[0]) <= 1e-5
    encoded = stage.with_scale(0.18215).normalize(mean + std * truth["posterior_noise"])
    assert largest(encoded, truth["encoded"]) <= 1e-5
    assert largest(stage.with_scale(0.18215).decode(truth["encoded"]), truth["decoded"]) <= 1e-5
    assert main(["convert", "--check", str(folder), "--checkpoint", *files]) == 0
    assert main(["convert", "--to", "compvis", str(folder), "--out", str(tmp_path / "b.ckpt"),
                 "--config_out", str(tmp_path / "b.yaml")]) == 0  # fmt: skip
    assert_is_back(tmp_path / "b.ckpt", source)
    again = [str(tmp_path / "b.ckpt"), "--config", str(tmp_path / "b.yaml")]
    assert main(["convert", "--check", str(folder), "--checkpoint", *again]) == 0
    save_compvis(autoencoder, tmp_path / "c.ckpt", base=tmp_path / "m.ckpt")
    assert torch.load(tmp_path / "c.ckpt", weights_only=True)["state_dict"].keys() >= {"loss.logvar", "colorize"}
    assert main([*CONVERT, *files, "--out", f"{folder}2", "--samples", "2"]) == 2
    assert "draws no samples" in capsys.readouterr().err
    assert not (tmp_path / "folder2").exists()
    assert main([*CONVERT, *files, "--out", f"{folder}2", "--load_only_unet"]) == 2
    assert "for diffusion models" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is an autoencoder, not a diffusion model"):
        load_compvis(tmp_path / "m.ckpt", FOLDER / "kl_f2_first_stage.yaml")
    autoencoder.encoder.conv_in.bias.data[0] += 1
    autoencoder.save_pretrained(folder)
    assert main(["convert", "--check", str(folder), "--checkpoint", *files]) == 1


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_released_models_draw_the_originals_pictures(name, tmp_path):
    """The original class sampled the same weights with the same seed, down to the picture."""
    content, recorded = MODELS[name], arrays("models")
    truth = {key.removeprefix(f"{name} "): value for key, value in recorded.items() if key.startswith(f"{name} ")}
    shapes = stage_shapes().get(name, {})
    state = seeded_state(content, shapes)
    torch.save({"state_dict": state}, tmp_path / "m.ckpt")
    is_clip = "CLIP" in str(content["model"]["params"]["cond_stage_config"])  # whose heads no file tells
    pipeline = load_compvis(tmp_path / "m.ckpt", content, text_heads=1 if is_clip else None)
    mode = pipeline.first_stage.encode_condition(conditions(content)["picture"])
    assert largest(some_pixels(mode), truth.pop("mode")) <= 1e-5
    latents, picture = truth.pop("latents"), truth.pop("picture")
    if content["model"]["params"]["cond_stage_config"] == "__is_first_stage__":
        assert pipeline.config.concat_through_vae == "mode"
        assert largest(torch.cat([mode, conditions(content)["mask"]], dim=1), truth["concat_inputs"]) <= 1e-5
    else:
        is_inpainting = content["model"]["target"].endswith("LatentInpaintDiffusion")
        assert pipeline.config.get("concat_through_vae") == ("sample" if is_inpainting else None)
    drawn = sample(pipeline, SEED, **call_arguments(pipeline, content, truth))
    assert largest(drawn, latents) <= 1e-5
    assert largest(some_pixels(pipeline.decode_latents(drawn)), picture) <= 2e-5  # the rounding of another machine
    save_compvis(pipeline, tmp_path / "back.ckpt", base=tmp_path / "m.ckpt" if shapes else None, use_ema=False)
    back = torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"]
    assert state.keys() <= back.keys()
    assert [key for key in state if not torch.equal(back[key], state[key])] == []
    written = compvis_config(pipeline, use_ema=False, base=tmp_path / "m.ckpt" if shapes else None)
    assert written["model"]["target"] == content["model"]["target"]
    again = read_compvis_config(written, for_training=False)
    assert again.concat_through_vae == pipeline.config.get("concat_through_vae")
    for name in ("low_scale_config", "noise_aug_config", "depth_stage_config"):
        assert written["model"]["params"].get(name) == content["model"]["params"].get(name)
    assert ("finetune_keys" in written["model"]["params"]) == ("finetune_keys" in content["model"]["params"])


def test_the_stage_of_a_segmentation_map(tmp_path, caplog):
    """A rescaler without a convolution has no tensors; another method of a stage, or ignore_keys, leaves it out."""
    content = copy.deepcopy(MODELS["latent-diffusion/semantic_synthesis256"])
    params = content["model"]["params"]
    params["cond_stage_config"]["params"] = {"n_stages": 2}
    torch.save({"state_dict": seeded_state(content)}, tmp_path / "m.ckpt")
    pipeline = load_compvis(tmp_path / "m.ckpt", content)
    pictures = torch.rand(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    small = torch.nn.functional.avg_pool2d(torch.nn.functional.avg_pool2d(pictures, 2), 2)
    drawn = sample(pipeline, SEED, concat_images=pictures)
    assert largest(drawn, sample(pipeline, SEED, concat_inputs=small)) <= 1e-5
    pipeline.save_pretrained(tmp_path / "folder")
    assert torch.equal(
        sample(DDPMExtPipeline.from_pretrained(tmp_path / "folder"), SEED, concat_images=pictures), drawn
    )
    written = compvis_config(pipeline)["model"]["params"]["cond_stage_config"]
    assert written["params"]["out_channels"] is None
    assert load_compvis(tmp_path / "m.ckpt", content, ignore_keys=["cond_stage_model."]).concat_encoder is None
    params["cond_stage_forward"] = "embed"
    assert load_compvis(tmp_path / "m.ckpt", content).concat_encoder is None
    assert "SpatialRescaler is left out" in caplog.text
    assert "cond_stage_forward embed is another method" in caplog.text
    params["cond_stage_forward"] = "encode"
    params["cond_stage_config"]["params"] = {"n_stages": "2"}
    with pytest.raises(ValueError, match=r"n_stages takes a whole number.*or leave the stage out: ignore_keys"):
        load_compvis(tmp_path / "m.ckpt", content)

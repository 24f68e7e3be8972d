"""Loading and saving of original checkpoints, and the defects of the original's loading."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from helpers.conversion_cases import BASE, CASES, CASES_WITH_CHECKPOINT, FOLDER, content, random_weights, recorded, run

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, UNet2DExtModel
from diffusers_ddpm_ext.compvis import load_compvis, save_compvis
from diffusers_ddpm_ext.compvis.architecture import translate_unet
from diffusers_ddpm_ext.compvis.convert import convert_compvis
from diffusers_ddpm_ext.compvis.reader.archive import read_tensors
from diffusers_ddpm_ext.compvis.weights import export_unet
from diffusers_ddpm_ext.models.ema_metadata import load_ema_metadata

SAVED_TABLE_COUNT = 12


def converted_folder(case: str, place: Path) -> Path:
    converted = convert_compvis(FOLDER / f"{case}.ckpt", FOLDER / f"{case}.yaml")
    converted.save(place)
    (place / "conversion.json").write_text(json.dumps(converted.report.as_json()))
    assert converted.compare(place) == []
    return place


@pytest.mark.parametrize("case", CASES_WITH_CHECKPOINT)
def test_round_trip(case, tmp_path):
    """Every tensor of the source is bit-exact, under the source's own keys."""
    source = read_tensors(FOLDER / f"{case}.ckpt")
    folder = converted_folder(case, tmp_path / "folder")
    save_compvis(folder, tmp_path / "back.ckpt", use_ema=CASES[case]["ema"])
    back = torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"]
    assert back.keys() == source.keys()
    assert [name for name in back if not torch.equal(back[name].float(), source[name].float())] == []


def test_a_single_set_of_weights_is_saved_with_an_ema_of_zero_updates(tmp_path):
    pipeline = load_compvis(FOLDER / "latent_logvar.ckpt", FOLDER / "latent_logvar.yaml")
    save_compvis(pipeline, tmp_path / "a.ckpt")
    save_compvis(pipeline, tmp_path / "b.ckpt", use_ema=False)
    both, alone = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["state_dict"] for name in "ab")
    assert both.keys() - alone.keys() == {name for name in both if name.startswith("model_ema.")}
    assert int(both["model_ema.num_updates"]) == 0
    name = "input_blocks.0.0.weight"
    assert torch.equal(both["model_ema.diffusion_modelinput_blocks00weight"], both[f"model.diffusion_model.{name}"])


@pytest.mark.parametrize("weights", ["auto", "raw", "ema"])
def test_which_weights(weights, caplog):
    pipeline = load_compvis(FOLDER / "ema.ckpt", FOLDER / "ema.yaml", weights=weights)
    arrays = recorded("ema")
    truth = arrays["out_raw" if weights == "raw" else "out_ema"]
    assert float((run(pipeline.unet, arrays) - truth).abs().max()) <= 5e-6
    assert (weights == "auto") == ("EMA weights" in caplog.text), "auto logs its choice"


def test_requested_weights_that_the_file_does_not_have(tmp_path):
    with pytest.raises(ValueError, match='use weights="auto"'):
        load_compvis(FOLDER / "concat.ckpt", FOLDER / "concat.yaml", weights="ema")
    with pytest.raises(ValueError, match="auto, ema, raw"):
        load_compvis(FOLDER / "concat.ckpt", FOLDER / "concat.yaml", weights="both")
    only = {k: v for k, v in read_tensors(FOLDER / "ema.ckpt").items() if k.startswith("model_ema.")}
    torch.save({"state_dict": only}, tmp_path / "m.ckpt")
    arrays = recorded("ema")
    pipeline = load_compvis(tmp_path / "m.ckpt", FOLDER / "ema.yaml")
    assert float((run(pipeline.unet, arrays) - arrays["out_ema"]).abs().max()) <= 5e-6
    with pytest.raises(ValueError, match="EMA weights only"):
        load_compvis(tmp_path / "m.ckpt", FOLDER / "ema.yaml", weights="raw")


def test_a_learned_logvar_is_loaded():
    """D3: the original base class drops it silently."""
    pipeline = load_compvis(FOLDER / "latent_logvar.ckpt", FOLDER / "latent_logvar.yaml")
    assert torch.equal(pipeline.logvar, recorded("latent_logvar")["logvar"])
    assert pipeline.scheduler.config.clip_sample is False, "latents are never clipped"
    assert pipeline.scheduler.config.beta_start == 0.00085
    assert load_compvis(
        FOLDER / "latent_logvar.ckpt", FOLDER / "latent_logvar.yaml", load_only_unet=True
    ).logvar is None  # fmt: skip


def test_the_configurations_schedule_wins_with_a_warning_if_it_differs():
    """D4: in the original the file's tables win, except one."""
    other = content("ema")
    other["model"]["params"]["linear_end"] = 0.03
    with pytest.warns(UserWarning, match="schedule differs from the configuration's"):
        pipeline = load_compvis(FOLDER / "ema.ckpt", other)
    assert pipeline.scheduler.config.beta_end == 0.03
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = load_compvis(FOLDER / "ema.ckpt", FOLDER / "ema.yaml")
        held = load_compvis(FOLDER / "ema.ckpt", other, schedule_from="checkpoint")
    assert torch.equal(held.scheduler.betas, same.scheduler.betas)
    shorter = content("latent_logvar")
    shorter["model"]["params"]["timesteps"] = 500
    with pytest.raises(ValueError, match="logvar has"):
        load_compvis(FOLDER / "latent_logvar.ckpt", shorter)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", ""])
def test_load_only_unet(prefix, tmp_path):
    """D5, D6: every prefix works, and a file without a matching key is an error."""
    tensors = {
        prefix + name.removeprefix("model.diffusion_model."): tensor
        for name, tensor in read_tensors(FOLDER / "concat.ckpt").items()
        if name.startswith("model.diffusion_model.")
    }
    torch.save(tensors, tmp_path / "m.pt")
    pipeline = load_compvis(tmp_path / "m.pt", FOLDER / "concat.yaml", load_only_unet=True)
    arrays = recorded("concat")
    assert float((run(pipeline.unet, arrays) - arrays["out_raw"]).abs().max()) <= 5e-6
    torch.save({"other.weight": torch.zeros(2)}, tmp_path / "o.pt")
    with pytest.raises(ValueError, match=r"no network.*other\.weight"):
        load_compvis(tmp_path / "o.pt", FOLDER / "concat.yaml", load_only_unet=True)


def test_prefixes_to_ignore_may_overlap():
    """D7: the original deletes a key that two of them match twice."""
    keys = ("logvar", "log", "model_ema", "model_ema.")
    pipeline = load_compvis(FOLDER / "latent_logvar.ckpt", FOLDER / "latent_logvar.yaml", ignore_keys=keys)
    assert pipeline.logvar is None
    with pytest.warns(UserWarning, match=r"Re-initialized.*out\.2\.weight"):
        partly = load_compvis(
            FOLDER / "concat.ckpt", FOLDER / "concat.yaml", ignore_keys=["model.diffusion_model.out.2"]
        )
    with pytest.warns(UserWarning, match="Re-initialized"):
        again = load_compvis(
            FOLDER / "concat.ckpt", FOLDER / "concat.yaml", ignore_keys=["model.diffusion_model.out.2"]
        )
    truth = read_tensors(FOLDER / "concat.ckpt")["model.diffusion_model.out.0.weight"]
    assert torch.equal(partly.unet.conv_norm_out.weight, truth)
    assert torch.equal(partly.unet.conv_out.weight, again.unet.conv_out.weight), "initialized with a fixed seed"


def test_missing_and_unexpected_keys_are_listed(tmp_path):
    tensors = dict(read_tensors(FOLDER / "concat.ckpt"))
    tensors["model.diffusion_model.new.weight"] = torch.zeros(1)
    torch.save({"state_dict": tensors}, tmp_path / "m.ckpt")
    with pytest.raises(ValueError, match=r"new\.weight"):
        load_compvis(tmp_path / "m.ckpt", FOLDER / "concat.yaml")
    del tensors["model.diffusion_model.new.weight"], tensors["model.diffusion_model.out.2.bias"]
    torch.save({"state_dict": tensors}, tmp_path / "m.ckpt")
    with pytest.raises(ValueError, match=r"lacks 1 .*out\.2\.bias"):
        load_compvis(tmp_path / "m.ckpt", FOLDER / "concat.yaml")


def test_stages_are_left_out_and_restored_from_the_base(tmp_path):
    tensors = dict(read_tensors(FOLDER / "latent_logvar.ckpt"))
    stages = {"first_stage_model.encoder.weight": torch.randn(3), "scale_factor": torch.tensor(0.18)}
    torch.save({"state_dict": tensors | stages}, tmp_path / "m.ckpt")
    converted = convert_compvis(tmp_path / "m.ckpt", FOLDER / "latent_logvar.yaml")
    assert [left.source for left in converted.report.left_out] == ["first_stage_model.encoder.weight"]
    assert converted.report.facts["scale_factor"] == pytest.approx(0.18)
    save_compvis(converted.pipeline, tmp_path / "n.ckpt", base=tmp_path / "m.ckpt", use_ema=False)
    back = torch.load(tmp_path / "n.ckpt", weights_only=True)["state_dict"]
    assert back.keys() == (tensors | stages).keys()
    assert all(torch.equal(back[name], stages[name]) for name in stages)
    other = random_weights(translate_unet(BASE | {"num_res_blocks": 2, "channel_mult": [2 - 1, 3]}).build())
    with pytest.raises(ValueError, match="another model"):
        save_compvis(DDPMExtPipeline(other, DDPMExtScheduler()), tmp_path / "o.ckpt", base=tmp_path / "m.ckpt")


def test_a_class_embedder_becomes_tokens(tmp_path):
    """Class 3 through the pipeline is the network with row 3 as its context."""
    params = BASE | {"use_spatial_transformer": True, "context_dim": 6}
    network = random_weights(translate_unet(params).build())
    table = torch.randn(5, 6)
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in export_unet(network, params).items()}
    torch.save({"state_dict": tensors | {"cond_stage_model.embedding.weight": table}}, tmp_path / "m.ckpt")
    config = {
        "model": {
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                "unet_config": {"target": "openaimodel.UNetModel", "params": params},
                "first_stage_config": {"target": "ldm.models.autoencoder.VQModelInterface"},
                "cond_stage_config": {
                    "target": "ldm.modules.encoders.modules.ClassEmbedder",
                    "params": {"n_classes": 5},
                },
                "conditioning_key": "crossattn",
                "timesteps": 20,
            },
        }
    }
    pipeline = load_compvis(tmp_path / "m.ckpt", config)
    pipeline.save_pretrained(tmp_path / "folder")
    pipeline = DDPMExtPipeline.from_pretrained(tmp_path / "folder")
    assert torch.equal(pipeline.class_embedder, table)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 3, 8, 8)
    drawn = [
        pipeline(2, torch.Generator().manual_seed(0), 3, "latent", latents=noise, **how).images
        for how in ({"class_labels": [3, 1]}, {"encoder_hidden_states": table[[3, 1]][:, None]})
    ]
    assert torch.equal(*drawn)
    save_compvis(pipeline, tmp_path / "n.ckpt", use_ema=False)
    back = torch.load(tmp_path / "n.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(back["cond_stage_model.embedding.weight"], table)


def test_pipelines_that_cannot_be_exported(tmp_path):
    digits = DDPMExtPipeline(network_of_small_groups(), DDPMExtScheduler())
    with pytest.raises(ValueError, match="norm_num_groups"):
        save_compvis(digits, tmp_path / "m.ckpt")
    resampled = network_without_resampling_weights()
    with pytest.raises(ValueError, match="conv_resample"):
        save_compvis(DDPMExtPipeline(resampled, DDPMExtScheduler()), tmp_path / "m.ckpt")
    scaled = translate_unet(BASE, timestep_scale=0.25).build()
    assert isinstance(scaled, UNet2DExtModel)
    with pytest.raises(ValueError, match="timestep_scale"):
        save_compvis(DDPMExtPipeline(scaled, DDPMExtScheduler()), tmp_path / "m.ckpt")
    with pytest.raises(ValueError, match=r"\.ckpt"):
        save_compvis(digits, tmp_path / "m.bin")
    with pytest.raises(ValueError, match="model_index"):
        save_compvis(tmp_path, tmp_path / "m.ckpt")
    assert list(tmp_path.iterdir()) == []


def network_of_small_groups():
    from diffusers import UNet2DModel

    return UNet2DModel(**translate_unet(BASE).config | {"norm_num_groups": 8})


def network_without_resampling_weights():
    from diffusers_ddpm_ext.compvis.weights import convert_unet

    params = BASE | {"conv_resample": False}
    return convert_unet(export_unet(random_weights(translate_unet(params).build()), params), params)


def test_a_trained_folder_is_saved_with_its_ema(tmp_path):
    """Raw and EMA weights of a run's folder, decay and number of updates."""
    from diffusers_ddpm_ext.models.ema_metadata import EmaMetadata, save_ema_metadata

    raw, average = (random_weights(translate_unet(BASE).build(), seed) for seed in (1, 2))
    DDPMExtPipeline(average, DDPMExtScheduler()).save_pretrained(tmp_path / "run")
    raw.save_pretrained(tmp_path / "run" / "unet", variant="raw")
    save_ema_metadata(tmp_path / "run", EmaMetadata(0.999, 123))
    save_compvis(tmp_path / "run", tmp_path / "m.ckpt")
    back = torch.load(tmp_path / "m.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(back["model.diffusion_model.input_blocks.0.0.weight"], raw.conv_in.weight)
    assert torch.equal(back["model_ema.diffusion_modelinput_blocks00weight"], average.conv_in.weight)
    assert int(back["model_ema.num_updates"]) == 123
    assert back["model_ema.num_updates"].dtype == torch.int32
    assert float(back["model_ema.decay"]) == pytest.approx(0.999)
    assert load_ema_metadata(tmp_path / "run") == EmaMetadata(0.999, 123)
    assert sum(not name.startswith("model") for name in back) == SAVED_TABLE_COUNT

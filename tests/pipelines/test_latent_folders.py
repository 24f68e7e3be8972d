"""Saved folders of latent pipelines: in stock Diffusers without this package, and in ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, LDMPipeline
from helpers.hub_server import LoopbackHub
from helpers.latent_folder_cases import CASES, LATER, MEAN, STD, pictures_of
from helpers.paths import PYTHONPATH, TESTS
from helpers.tiny import tiny_autoencoder, tiny_unet

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from diffusers_ddpm_ext.models.first_stage import FirstStage

SOURCES, LOADERS = ("folder", "id"), ("LDMPipeline", "DiffusionPipeline")


def pipeline_with(vae: Any, **arguments: Any) -> DDPMExtPipeline:
    scheduler = DDPMExtScheduler(num_train_timesteps=50, clip_sample=False)
    pipeline = DDPMExtPipeline(arguments.pop("unet", None) or tiny_unet(4), scheduler, vae=vae, **arguments)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build(case: str) -> DDPMExtPipeline:
    kind, config = CASES[case]
    vae = tiny_autoencoder(kind, **config)
    vae.register_to_config(**LATER.get(case, {}))
    return pipeline_with(vae)


def names_in(folder: Path) -> dict[str, Any]:
    index = json.loads((folder / "model_index.json").read_text())
    return {key: value for key, value in index.items() if key != "_diffusers_version"}


@dataclass
class Results:
    """What three processes drew."""

    here: dict[str, np.ndarray]
    facts: dict[str, Any]
    stock: Any
    ours: Any
    folders: Path
    replaced: set[str]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    root = tmp_path_factory.mktemp("latent")
    pipelines = {case: build(case) for case in CASES}
    pipelines["ours"] = pipeline_with(tiny_autoencoder("tiny", scaling_factor=0.5, shift_factor=0.2))
    DDPMExtPipeline(tiny_unet(4), DDPMExtScheduler(50)).save_pretrained(root / "saved" / "pixels")
    for case, pipeline in pipelines.items():
        pipeline.save_pretrained(root / "saved" / case)
    with LoopbackHub() as hub:
        base = {**os.environ, "OMP_NUM_THREADS": "1"}
        base.pop("HF_HUB_OFFLINE", None)
        for script, environment in (
            ("latent_ours.py", hub.environment(str(root / "home_ours")) | {"PYTHONPATH": PYTHONPATH}),
            ("latent_stock.py", hub.environment(str(root / "home_stock"), token=None) | {"PYTHONPATH": ""}),
        ):
            command = [
                sys.executable,
                str(TESTS / "helpers" / script),
                str(root / "saved"),
                str(root / Path(script).stem),
            ]
            ran = subprocess.run(
                command, env=base | environment, capture_output=True, text=True, timeout=300, check=False
            )
            assert ran.returncode == 0, f"{script} failed:\n{ran.stderr[-4000:]}"
        replaced = set(hub.files("alice/replaced"))
    return Results(
        {case: pictures_of(pipeline) for case, pipeline in pipelines.items()},
        json.loads((root / "latent_stock.json").read_text()),
        np.load(root / "latent_stock.npz"),
        np.load(root / "latent_ours.npz"),
        root / "saved",
        replaced,
    )


# ------------------------------------------------------------------ stock Diffusers


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("case", CASES)
def test_stock_pipelines_draw_our_pictures_without_this_package(results, case, source, loader):
    name = f"{case}/{source}/{loader}"
    assert results.facts[name] == ["LDMPipeline", type(build(case).vae).__name__]
    assert np.abs(results.stock[name] - results.here[case]).max() <= 1e-5
    assert results.here[case].std() > 0.01


@pytest.mark.parametrize("case", [*CASES, "ours"])
def test_our_pipelines_draw_them_from_folder_and_repository(results, case):
    folder = DDPMExtPipeline.from_pretrained(results.folders / case)
    for pictures in (pictures_of(folder), results.ours[f"{case}/id"], results.ours[f"{case}/generic"]):
        assert np.abs(pictures - results.here[case]).max() <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_the_folder_names_ldm_pipeline(results, case):
    vae = type(build(case).vae).__name__
    assert names_in(results.folders / case) == {
        "_class_name": "LDMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
        "vqvae": ["diffusers", vae],
    }
    config = json.loads((results.folders / case / "vqvae" / "config.json").read_text())
    assert config["scaling_factor"]
    assert not any(config.get(key) for key in ("latents_mean", "latents_std", "shift_factor"))


@pytest.mark.parametrize("case", CASES)
def test_a_folder_read_and_saved_again_is_the_same(results, case, tmp_path):
    DDPMExtPipeline.from_pretrained(results.folders / case).save_pretrained(tmp_path)
    for file in (results.folders / case).rglob("*.*"):
        if file.is_file() and file.name != "model_index.json" and "config" not in file.name:
            assert (tmp_path / file.relative_to(results.folders / case)).read_bytes() == file.read_bytes()
    assert names_in(tmp_path) == names_in(results.folders / case)
    config = "vqvae/config.json"
    assert (tmp_path / config).read_bytes() == (results.folders / case / config).read_bytes()  # without a path in it


@pytest.mark.parametrize("case", ["kl_stats", "kl_shift", "vq_shift"])
def test_folding_keeps_the_encoder_too(results, case):
    before, after = build(case), DDPMExtPipeline.from_pretrained(results.folders / case)
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(4)) * 2 - 1
    one, other = (pipe.encode_images(pixels, torch.Generator().manual_seed(5)) for pipe in (before, after))
    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


def test_stock_ddpm_pipeline_drops_the_first_stage(results):
    for case in CASES:
        assert results.facts[f"{case}/DDPMPipeline"] == ["scheduler", "unet"]


# ------------------------------------------------------------------ what stock Diffusers must refuse


def test_stock_diffusers_refuses_our_folders(results):
    assert names_in(results.folders / "ours") == {
        "_class_name": "diffusers_ddpm_ext.DDPMExtPipeline",
        "scheduler": ["diffusers", "DDPMExtScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
        "vae": ["diffusers", "AutoencoderTiny"],
    }
    for loader in LOADERS:
        assert "Error" in results.facts[f"ours/{loader}"]


OURS = {
    "tiny_mean": lambda: with_stats("tiny"),
    "dc_std": lambda: with_stats("dc"),
    "vq_std": lambda: with_stats("vq"),
    "not_square": lambda: pipeline_with(tiny_autoencoder("kl"), unet=tiny_unet(4, size=(8, 12))),
    "learned": lambda: learned_pipeline(),
    "classes": lambda: pipeline_with(tiny_autoencoder("kl"), unet=class_unet(), conditioning_key="adm"),
    "concat": lambda: pipeline_with(
        tiny_autoencoder("kl"), unet=tiny_unet(8, 4), conditioning_key="concat", concat_through_vae="mode"
    ),
}


def with_stats(kind: str) -> DDPMExtPipeline:
    return pipeline_with(FirstStage(tiny_autoencoder(kind)).with_scale(None, MEAN, STD).autoencoder)


def learned_pipeline() -> DDPMExtPipeline:
    scheduler = DDPMExtScheduler(num_train_timesteps=50, variance_type="learned")
    return DDPMExtPipeline(tiny_unet(4, 8), scheduler, vae=tiny_autoencoder("kl"))


def class_unet() -> Any:
    unet = tiny_unet(4)
    return type(unet)(**unet.config | {"num_class_embeds": 3})


@pytest.mark.parametrize("case", OURS)
def test_everything_else_names_ours_and_keeps_its_scale(case, tmp_path):
    pipeline = OURS[case]()
    pipeline.save_pretrained(tmp_path)
    assert names_in(tmp_path)["_class_name"] == "diffusers_ddpm_ext.DDPMExtPipeline"
    assert "vqvae" not in names_in(tmp_path)
    again = DDPMExtPipeline.from_pretrained(tmp_path)
    assert again.first_stage.content_hash() == pipeline.first_stage.content_hash()
    assert torch.equal(again.first_stage.scale, pipeline.first_stage.scale)
    assert torch.equal(again.first_stage.shift, pipeline.first_stage.shift)
    assert again.config.get("concat_through_vae") == pipeline.config.get("concat_through_vae")


# ------------------------------------------------------------------ doors


def test_stock_latent_folders_open_in_ours(tmp_path):
    stock = LDMPipeline(tiny_autoencoder("vq", scaling_factor=0.6), tiny_unet(4), build("vq").scheduler)
    stock.save_pretrained(tmp_path)
    ours = DDPMExtPipeline.from_pretrained(tmp_path)
    assert np.abs(pictures_of(ours) - pictures_of(stock)).max() <= 1e-5
    assert DDPMExtPipeline.from_pipe(stock).vae is stock.vqvae


@pytest.mark.filterwarnings("ignore:.torch_dtype. is deprecated")
def test_a_dtype_is_that_of_the_network(results):
    half = DDPMExtPipeline.from_pretrained(results.folders / "kl", torch_dtype=torch.float16)
    assert (half.dtype, half.vae.dtype) == (torch.float16, torch.float32)
    assert half.first_stage.content_hash() == build("kl").first_stage.content_hash()
    chosen = DDPMExtPipeline.from_pretrained(results.folders / "kl", torch_dtype={"vqvae": torch.float16})
    assert (chosen.dtype, chosen.vae.dtype) == (torch.float32, torch.float16)


def test_another_first_stage_replaces_the_folders(results):
    other = tiny_autoencoder("tiny")
    for name in ("vae", "vqvae"):
        assert DDPMExtPipeline.from_pretrained(results.folders / "kl", **{name: other}).vae is other
        assert DDPMExtPipeline.from_pretrained(results.folders / "ours", **{name: other}).vae is other


def test_without_its_first_stage_a_pipeline_returns_latents(results):
    pipeline = DDPMExtPipeline.from_pretrained(results.folders / "kl", vae=None)
    assert pipeline.vae is None
    assert pipeline.is_latent
    assert pipeline.config.latent_scaling_factor == 0.18215
    with pytest.raises(ValueError, match="no first stage to decode"):
        pipeline(output_type="pil")
    assert DDPMExtPipeline.from_pipe(build("kl"), vae=None).is_latent
    with pytest.raises(ValueError, match="shift or a scale per channel"):
        DDPMExtPipeline.from_pretrained(results.folders / "ours", vae=None)


# ------------------------------------------------------------------ saving over another model


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_pixel_model_over_a_latent_one_and_back(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "notes.txt").write_text("mine")
    pixel = DDPMExtPipeline(tiny_unet(4), DDPMExtScheduler(num_train_timesteps=50))
    pixel.save_pretrained(tmp_path / "alone")
    for case, slot in (("kl", "vqvae"), ("vq_std", "vae")):
        (OURS[case]() if case in OURS else build(case)).save_pretrained(tmp_path)
        weights = f"{slot}/diffusion_pytorch_model.safetensors"
        assert {f"{slot}/config.json", weights} <= files_of(tmp_path)
    assert not any(name.startswith("vqvae/") for name in files_of(tmp_path))
    pixel.save_pretrained(tmp_path)
    left = {name for name in files_of(tmp_path) if not name.startswith("alone/")}
    assert left == files_of(tmp_path / "alone") | {"vae/notes.txt"}
    for name in files_of(tmp_path / "alone"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert type(DDPMPipeline.from_pretrained(tmp_path)).__name__ == "DDPMPipeline"


def test_a_folder_of_one_who_keeps_an_autoencoder_beside_a_pixel_model(tmp_path):
    """A ``vae`` folder that no model_index.json names is somebody else's."""
    tiny_autoencoder("kl").save_pretrained(tmp_path / "vae")
    before = files_of(tmp_path)
    for _ in range(2):
        DDPMExtPipeline(tiny_unet(4), DDPMExtScheduler(num_train_timesteps=50)).save_pretrained(tmp_path)
    assert before <= files_of(tmp_path)


def test_variants_and_results_stay_only_with_the_same_first_stage(tmp_path):
    pipeline = build("kl")
    pipeline.save_pretrained(tmp_path)
    pipeline.save_pretrained(tmp_path, variant="raw")
    (tmp_path / "proof.json").write_text("{}")
    (tmp_path / "vqvae" / "diffusion_pytorch_model.raw.safetensors").unlink()
    only_network = DDPMExtPipeline.from_pretrained(tmp_path, variant="raw")
    assert only_network.first_stage.content_hash() == pipeline.first_stage.content_hash()
    pipeline.save_pretrained(tmp_path, variant="raw")
    raw = {f"{part}/diffusion_pytorch_model.raw.safetensors" for part in ("unet", "vqvae")}
    pipeline.save_pretrained(tmp_path)
    assert raw | {"proof.json"} <= files_of(tmp_path)
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias.add_(1.0)
    pipeline.save_pretrained(tmp_path)
    assert {"proof.json", "vqvae/diffusion_pytorch_model.raw.safetensors"}.isdisjoint(files_of(tmp_path))
    assert "unet/diffusion_pytorch_model.raw.safetensors" in files_of(tmp_path)


def test_a_pixel_model_pushed_over_a_latent_one(results):
    pixels = files_of(results.folders / "pixels")
    assert results.replaced - {".gitattributes", "README.md"} == pixels


# ------------------------------------------------------------------ damaged folders


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vqvae": ["diffusers", "UNet2DModel"]}, "vqvae is .*UNet2DModel"),
        ({"vqvae": ["transformers", "CLIPTextModel"]}, "must be a list of diffusers and one of"),
        ({"vqvae": "x"}, "not a list"),
        ({"vae": ["diffusers", "AutoencoderKL"]}, "two names of the one first stage"),
    ],
)
def test_damaged_indexes(tmp_path, change, message):
    build("kl").save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | change))
    with pytest.raises(ValueError, match=message):
        DDPMExtPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scaling_factor": 0}, "scaling_factor"),
        ({"latent_channels": 3}, "."),
        ({"layers_per_block": 2}, "lack|missing"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "tensors, but the network of config.json"),
        ({"block_out_channels": [8, 10**9]}, "block_out_channels"),
        ({"latents_mean": [0, 0, 0, 0]}, "latents_std"),
    ],
)
def test_damaged_first_stages(tmp_path, change, message):
    build("kl").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "vqvae" / "config.json").read_text())
    (tmp_path / "vqvae" / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message) as error:
        DDPMExtPipeline.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)

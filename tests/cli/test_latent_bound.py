"""`ddpm-ext evaluate`, `fit-variance` and `plot` of a model of latents: the density of latents, under its own name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.latent_cases import tiny_first_stage
from helpers.runs import tiny_run

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, cli
from diffusers_ddpm_ext.diffusion.likelihood import bits_per_dim
from diffusers_ddpm_ext.diffusion.likelihood_estimate import half_width
from diffusers_ddpm_ext.models.first_stage import FirstStage
from diffusers_ddpm_ext.training.data.dataset import load_data
from diffusers_ddpm_ext.training.trainer import train
from diffusers_ddpm_ext.utils.random_keys import noise_of_steps

UNIT = "bits per latent dimension"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run on the digits in latents of 4 x 4 x 4."""
    root = tmp_path_factory.mktemp("run")
    tiny_first_stage("kl", channels=1).save_pretrained(root / "vae")
    settings = {"vae": str(root / "vae"), "scale_factor": "data", "latent_mode": True}
    folder = train(tiny_run(root / "run", **settings))
    assert folder is not None
    return folder


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def evaluated(folder: Path, *flags: str) -> dict:
    target = folder.parent / "bits.json"
    command = ["evaluate", str(folder), "--max_images", "6", "--device", "cpu", "--json", str(target), *flags]
    assert cli.main(command) == 0
    return json.loads(target.read_text())


def slot_of(folder: Path) -> Path:
    return next(folder / name for name in ("vae", "vqvae") if (folder / name).is_dir())


def error_line(capsys, *argv: str) -> str:
    assert cli.main([*argv, "--device", "cpu"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line


def test_the_bound_is_that_of_the_latents(folder, capsys):
    """Against `bits_per_dim` on latents that Diffusers' own autoencoder makes."""
    got = evaluated(folder)
    pipeline = DDPMExtPipeline.from_pretrained(folder)
    images = load_data(tiny_run(folder.parent / "other").data).validation
    chosen = torch.arange(6) * len(images) // 6
    scale = pipeline.vae.config.scaling_factor
    with torch.no_grad():
        x0 = pipeline.vae.encode(images.pixels(chosen)).latent_dist.mode().double() * scale
    noise = torch.stack([noise_of_steps("bound", 0, chosen.tolist(), [t] * 6, x0.shape[1:]) for t in range(50)])

    def denoiser(xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return pipeline.unet(xt.float(), t).sample

    expected = bits_per_dim(denoiser, pipeline.scheduler, x0, noise=noise.double(), decoder="continuous")
    assert got["bits_per_dim"] == pytest.approx(float(expected.total.mean()), rel=1e-4)
    assert got["high"] - got["low"] == pytest.approx(2 * half_width(expected.total.numpy()), rel=1e-3)
    assert (got["unit"], got["decoder_kind"], got["bin_width"]) == (UNIT, "continuous", None)
    stage = got["first_stage"]
    assert stage["sha256"] == FirstStage(tiny_first_stage("kl", channels=1)).content_hash()
    assert stage["scale"] == pytest.approx([1 / scale])
    printed = capsys.readouterr().out
    assert f"{UNIT} (of the density" in printed
    assert "comparable only for the same first stage" in printed
    assert stage["sha256"][:8] in printed
    assert cli.main(["plot", str(folder)]) == 0


def test_few_steps_need_fitted_variances(folder, capsys):
    pipeline = DDPMExtPipeline.from_pretrained(folder)
    pipeline.scheduler.set_timesteps(10)
    images = load_data(tiny_run(folder.parent / "other").data).validation
    x0 = pipeline.encode_images(images.pixels(torch.arange(6) * len(images) // 6)).double()
    unfitted = bits_per_dim(
        lambda xt, t: pipeline.unet(xt.float(), t).sample, pipeline.scheduler, x0, decoder="continuous"
    ).total.mean()
    line = error_line(capsys, "evaluate", str(folder), "--num_inference_steps", "10")
    assert f"ddpm-ext fit-variance {folder}" in line
    assert cli.main(["fit-variance", str(folder), "--draws", "4", "--max_steps", "12", "--device", "cpu"]) == 0
    record = json.loads((folder / "variance_fit.json").read_text())
    assert (record["decoder"], record["bin_width"]) == ("continuous", None)
    few = evaluated(folder, "--num_inference_steps", "10", "--optimal_timesteps")
    assert few["chain"] == 10
    assert few["bits_per_dim"] < float(unfitted)
    config = DDPMExtScheduler.from_pretrained(folder, subfolder="scheduler").config
    assert len(config.v_posterior) == 50


def test_latents_have_no_bins(folder, capsys):
    for flags in (["--decoder", "exact"], ["--decoder", "improved_diffusion"], ["--bin_width", "0.1"]):
        for command in ("evaluate", "fit-variance"):
            assert "without levels and bins" in error_line(capsys, command, str(folder), *flags)


def test_images_that_do_not_fit(folder, capsys):
    assert "multiples of 2" in error_line(capsys, "evaluate", str(folder), "--resolution", "9")
    line = error_line(capsys, "evaluate", str(folder), "--resolution", "16")
    assert "become latents of 8x8, and its network draws 4" in line
    tiny_first_stage("kl", channels=3).save_pretrained(
        folder / "vae" if (folder / "vae").is_dir() else folder / "vqvae"
    )
    assert "makes images of 3 channels, the data have 1" in error_line(capsys, "evaluate", str(folder))


def test_another_first_stage_is_another_measurement(folder):
    """Its cache is not used, and its name differs."""
    before = evaluated(folder, "--num_timesteps", "4")
    slot = slot_of(folder)
    config = json.loads((slot / "config.json").read_text())
    (slot / "config.json").write_text(json.dumps(config | {"scaling_factor": 2 * config["scaling_factor"]}))
    after = evaluated(folder, "--num_timesteps", "4")
    assert after["bits_per_dim"] != before["bits_per_dim"]
    assert after["first_stage"]["sha256"] == before["first_stage"]["sha256"]
    assert after["first_stage"]["scale"] == [value / 2 for value in before["first_stage"]["scale"]]


def test_what_report_and_doctor_say_of_the_first_stage(folder, capsys):
    scale = json.loads((slot_of(folder) / "config.json").read_text())["scaling_factor"]
    assert cli.main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert f"<td>AutoencoderKL: latents of 4 channels, 2x2 pixels each, scale {scale:.6g}</td>" in page
    for opening, found in (([], "is complete"), (["--open"], "can be opened")):
        cli.main(["doctor", str(folder), "--offline", *opening])
        lines = [line for line in capsys.readouterr().out.splitlines() if "first stage" in line]
        assert len(lines) == 1
        assert f"{found}: AutoencoderKL, " in lines[0]
        assert "latents of 4 channels, 2x2 pixels each" in lines[0]
    (slot_of(folder) / "config.json").write_text("{")
    assert cli.main(["doctor", str(folder), "--offline"]) == 1
    assert "config.json" in capsys.readouterr().out
    assert cli.main(["report", str(folder)]) == 0
    assert "config.json" in (folder / "report.html").read_text().split("<h2>Left out")[1]

"""`ddpm-ext evaluate`, `fit-variance` and `plot` on a tiny run, as a user types them."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from helpers.runs import rows, tiny_run
from PIL import Image

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, cli
from diffusers_ddpm_ext.diffusion.likelihood import bits_per_dim
from diffusers_ddpm_ext.diffusion.likelihood_estimate import half_width
from diffusers_ddpm_ext.training.data.dataset import load_data
from diffusers_ddpm_ext.training.trainer import train
from diffusers_ddpm_ext.utils.random_keys import noise_of_steps

LIMIT = ["--max_images", "12", "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = train(tiny_run(tmp_path_factory.mktemp("run") / "run", learn_logvar=True, prediction_type="v_prediction"))
    assert folder is not None
    return folder


@pytest.fixture(scope="module")
def fitted(trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fitted") / "run"
    shutil.copytree(trained, folder)
    assert cli.main(["fit-variance", str(folder), "--draws", "4", "--max_steps", "12", "--device", "cpu"]) == 0
    return folder


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def evaluated(folder: Path, *flags: str) -> dict:
    target = folder.parent / "bits.json"
    assert cli.main(["evaluate", str(folder), *LIMIT, "--json", str(target), *flags]) == 0
    return json.loads(target.read_text())


def error_line(capsys, *argv: str) -> str:
    """The error line of a command that fails with exit status 2."""
    assert cli.main(list(argv)) == 2
    printed = capsys.readouterr().err
    lines = [line for line in printed.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


def test_all_steps_give_the_bound_of_bits_per_dim(folder):
    """The command against `bits_per_dim` on the same images and noise."""
    got = evaluated(folder)
    pipeline = DDPMExtPipeline.from_pretrained(folder)
    images = load_data(tiny_run(folder.parent / "other").data).validation
    chosen = torch.arange(12) * len(images) // 12
    x0 = images.pixels(chosen).double()
    steps = range(50)
    noise = torch.stack([noise_of_steps("bound", 0, chosen.tolist(), [t] * 12, x0.shape[1:]) for t in steps])

    def denoiser(xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return pipeline.unet(xt.float(), t).sample

    expected = bits_per_dim(denoiser, pipeline.scheduler, x0, noise=noise.double(), bin_width=1 / 8)
    assert got["bits_per_dim"] == pytest.approx(float(expected.total.mean()), rel=1e-5)
    assert got["prior"] == pytest.approx(float(expected.prior.mean()), rel=1e-9)
    assert got["decoder"] == pytest.approx(float(expected.steps[:, 0].mean()), rel=1e-5)
    half = half_width(expected.total.numpy())
    assert got["high"] - got["low"] == pytest.approx(2 * half, rel=1e-4)
    assert (got["num_images"], got["num_timesteps"], got["bin_width"]) == (12, 50, 0.125)
    with (folder / "evaluation" / "steps.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [int(row["timestep"]) for row in table] == list(steps)
    np.testing.assert_allclose(
        [float(row["bits_per_dim"]) for row in table], expected.steps.mean(0).numpy(), rtol=1e-4, atol=1e-7
    )
    with Image.open(folder / "evaluation" / "steps.png") as image:
        assert image.size[0] > 800
    assert json.loads((folder / "evaluation" / "evaluation.json").read_text()) == got


def test_sixteen_bits_have_the_bound_of_eight_in_bins_of_eight(folder, tmp_path):
    """Level v of 8 bits is level 257 v of 16; their own bins are 257 times as narrow, which costs some 8 bits more."""
    rng = np.random.default_rng(0)
    for place in ("eight", "sixteen"):
        (tmp_path / place).mkdir()
    for index in range(20):
        levels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(levels).save(tmp_path / "eight" / f"{index}.png")
        Image.fromarray(levels.astype(np.uint16) * 257).save(tmp_path / "sixteen" / f"{index}.png")
    eight = evaluated(folder, "--train_data_dir", str(tmp_path / "eight"))
    deep = ["--train_data_dir", str(tmp_path / "sixteen")]
    same = evaluated(folder, *deep, "--bin_width", str(2 / 255))
    assert same["bits_per_dim"] == pytest.approx(eight["bits_per_dim"], rel=1e-6)
    own = evaluated(folder, *deep)
    assert (eight["bin_width"], own["bin_width"]) == (2 / 255, 2 / 65535)
    assert own["decoder"] - eight["decoder"] == pytest.approx(np.log2(257), rel=0.1)


def test_few_steps_agree_with_all_within_their_interval(folder):
    all_steps = evaluated(folder)
    few = evaluated(folder, "--num_timesteps", "10", "--confidence", "0.9999")
    assert few["low"] < all_steps["bits_per_dim"] < few["high"]
    assert few["num_timesteps"] == 10
    assert few["prior"] == pytest.approx(all_steps["prior"])
    assert few["decoder"] == pytest.approx(all_steps["decoder"], rel=1e-5)  # a separate stratum: the same draws


def test_it_is_a_function_of_the_seed_and_not_of_the_batch(folder):
    first = evaluated(folder, "--num_timesteps", "5")
    assert evaluated(folder, "--num_timesteps", "5") == first
    other = evaluated(folder, "--num_timesteps", "5", "--batch_size", "7")
    assert other["bits_per_dim"] == pytest.approx(first["bits_per_dim"], rel=1e-5)
    assert evaluated(folder, "--num_timesteps", "5", "--seed", "1")["bits_per_dim"] != first["bits_per_dim"]


def test_weights_dtypes_and_splits(folder):
    results = [
        evaluated(folder, "--num_timesteps", "5", *flags)["bits_per_dim"]
        for flags in ([], ["--weights", "ema"], ["--weights", "raw"], ["--dtype", "float64"], ["--split", "train"])
    ]
    assert results[0] == results[1]
    assert results[2] != results[0]
    assert results[3] == pytest.approx(results[0], rel=1e-4)
    assert results[3] != results[0]
    assert results[4] != results[0]


def test_decoders_and_clipping(folder):
    exact = evaluated(folder)
    approximate = evaluated(folder, "--decoder", "improved_diffusion")
    assert approximate["steps"] == exact["steps"]
    assert approximate["decoder"] != exact["decoder"]
    density = evaluated(folder, "--decoder", "continuous")
    assert density["bin_width"] is None
    clipped = evaluated(folder, "--clip_denoised")
    assert clipped["steps"] < exact["steps"]  # an untrained network predicts far beyond the data
    eight = evaluated(folder, "--bin_width", str(2 / 255))
    assert eight["decoder"] > exact["decoder"]


def test_an_interrupted_command_resumes(folder, monkeypatch):
    from diffusers_ddpm_ext.training.evaluation import bound, cache

    all_steps = evaluated(folder, "--num_timesteps", "5", "--batch_size", "8")
    monkeypatch.setattr(cache, "SECONDS_BETWEEN_SAVES", -1.0)
    real, calls = bound._evaluate_rows, []

    def dying(*args):
        calls.append(args[2])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(bound, "_evaluate_rows", dying)
    argv = ["evaluate", str(folder), *LIMIT, "--num_timesteps", "5", "--batch_size", "8"]
    assert cli.main(argv) == 130
    assert list((folder / "evaluation").glob(".rows-*"))
    before = len(calls)
    assert evaluated(folder, "--num_timesteps", "5", "--batch_size", "8") == all_steps
    assert len(calls) - before == 8 - 3
    assert not list((folder / "evaluation").glob(".rows-*"))
    assert evaluated(folder, "--num_timesteps", "5", "--seed", "3")["bits_per_dim"] != all_steps["bits_per_dim"]


def test_the_bound_of_a_shorter_chain(fitted):
    even = evaluated(fitted, "--num_inference_steps", "5")
    assert (even["chain"], even["num_timesteps"]) == (5, 5)
    best = evaluated(fitted, "--num_inference_steps", "5", "--optimal_timesteps")
    assert best["chain_timesteps"] != even["chain_timesteps"]
    assert best["bits_per_dim"] < even["bits_per_dim"]


def test_a_fitted_folder_is_loaded_by_our_and_the_stock_pipeline(trained, fitted):
    scheduler = DDPMExtScheduler.from_pretrained(fitted, subfolder="scheduler")
    config = scheduler.config
    assert len(config.v_posterior) == len(config.v_decoder) == 50
    assert sorted(map(int, config.optimal_timesteps)) == list(range(1, 13))
    assert all(len(steps) == int(count) for count, steps in config.optimal_timesteps.items())
    assert evaluated(fitted)["bits_per_dim"] < evaluated(trained, "--out", str(fitted.parent / "e"))["bits_per_dim"]
    pipeline = DDPMExtPipeline.from_pretrained(fitted)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(2, generator=torch.Generator().manual_seed(0), num_inference_steps=5, optimal_timesteps=True)
    assert len(images.images) == 2
    assert pipeline.scheduler.timesteps.tolist() == config.optimal_timesteps["5"]
    stock = DDPMPipeline.from_pretrained(fitted)
    stock.set_progress_bar_config(disable=True)
    assert len(stock(2, num_inference_steps=5).images) == 2
    assert stock.scheduler.config.variance_type in ("fixed_small", "fixed_large")


def test_unknown_optimal_steps_are_refused(trained, fitted):
    pipeline = DDPMExtPipeline.from_pretrained(trained)
    pipeline.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match=r"none are known; find them with `ddpm-ext fit-variance"):
        pipeline(num_inference_steps=5, optimal_timesteps=True)
    with pytest.raises(ValueError, match="optimal_timesteps needs num_inference_steps"):
        pipeline(optimal_timesteps=True)
    with pytest.raises(ValueError, match=r"known are those for 1-12 steps"):
        DDPMExtPipeline.from_pretrained(fitted)(num_inference_steps=20, optimal_timesteps=True)


def test_fitting_again_and_undoing(folder):
    before = (folder / "scheduler" / "scheduler_config.json").read_text()
    argv = ["fit-variance", str(folder), "--draws", "2", "--max_steps", "3", "--device", "cpu"]
    assert cli.main(argv) == 0
    first = (folder / "scheduler" / "scheduler_config.json").read_text()
    assert cli.main(argv) == 0
    assert (folder / "scheduler" / "scheduler_config.json").read_text() == first
    assert cli.main([*argv, "--source", "logvar", "--first_step", "0"]) == 0
    other = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert other["v_posterior"] != json.loads(first)["v_posterior"]
    assert all(steps[-1] == 0 for steps in other["optimal_timesteps"].values())
    assert cli.main(["fit-variance", str(folder), "--undo"]) == 0
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text()) == json.loads(before)
    assert cli.main(["fit-variance", str(folder), "--undo"]) == 2


def test_log_variances_of_another_loss_are_refused(folder, capsys):
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("loss_type: l2", "loss_type: huber"))
    line = error_line(capsys, "fit-variance", str(folder), "--source", "logvar", "--device", "cpu")
    assert "--source logvar" in line
    assert "huber" in line


def test_every_plot_is_written(fitted, trained, tmp_path, capsys):
    evaluated(fitted)
    capsys.readouterr()
    assert cli.main(["plot", str(fitted)]) == 0
    names = {"schedule", "weights", "logvar", "steps", "variance", "timesteps"}
    assert {path.stem for path in (fitted / "plots").glob("*.png")} == names
    for path in (fitted / "plots").glob("*.png"):
        with Image.open(path) as image:
            assert image.size[0] > 800
            assert len(set(np.asarray(image.convert("L")).ravel().tolist())) > 20
    assert "schedule.png, weights.png" in capsys.readouterr().out
    assert cli.main(["plot", str(trained), "--out", str(tmp_path / "here")]) == 0
    assert {path.stem for path in (tmp_path / "here").glob("*.png")} >= {"schedule", "weights", "logvar"}


BAD = {
    "all or a number": (["--num_timesteps", "half"], ["--num_timesteps", "all or a whole number"]),
    "too few steps": (["--num_timesteps", "1"], ["--num_timesteps", "[2, 50]"]),
    "too many steps": (["--num_timesteps", "51"], ["--num_timesteps", "[2, 50]"]),
    "longer than the chain": (["--num_inference_steps", "51"], ["--num_inference_steps", "51"]),
    "optimal without a number": (["--optimal_timesteps"], ["--optimal_timesteps", "--num_inference_steps"]),
    "optimal unknown": (["--optimal_timesteps", "--num_inference_steps", "5"], ["fit-variance"]),
    "split": (["--split", "test"], ["--split", "validation, train"]),
    "weights": (["--weights", "best"], ["--weights", "ema, raw"]),
    "decoder": (["--decoder", "tanh"], ["--decoder", "improved_diffusion"]),
    "confidence": (["--confidence", "95"], ["--confidence", "above 0 and below 1"]),
    "bins": (["--bin_width", "3"], ["--bin_width", "at most 2"]),
    "bins of a density": (["--bin_width", "0.1", "--decoder", "continuous"], ["--bin_width", "no effect"]),
    "device": (["--device", "tpu"], ["--device", "cpu"]),
    "dtype": (["--dtype", "int8"], ["--dtype", "float64"]),
    "typing error": (["--num_timestep", "5"], ["did you mean --num_timesteps"]),
    "no images there": (["--train_data_dir", "nowhere"], ["--train_data_dir", "nowhere"]),
    "held out without images": (["--validation_data_dir", "nowhere"], ["--validation_data_dir", "--train_data_dir"]),
    "folder as file": (["--json", "."], ["--json", "name a file"]),
    "resolution": (["--resolution", "0"], ["--resolution", "at least 1"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_of_evaluate(case, trained, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags, expected = BAD[case]
    line = error_line(capsys, "evaluate", str(trained), "--out", str(tmp_path / "out"), *flags)
    for text in expected:
        assert text in line
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


BAD_FITS = {
    "draws": (["--draws", "0"], ["--draws", "at least 1"]),
    "source": (["--source", "guess"], ["--source", "measured, logvar"]),
    "first step": (["--first_step", "50"], ["--first_step", "below T"]),
    "decoder": (["--decoder", "tanh"], ["--decoder"]),
    "not fitted yet": (["--undo"], ["--undo", "variance_fit.json"]),
}


@pytest.mark.parametrize("case", BAD_FITS)
def test_bad_options_of_fit_variance(case, trained, capsys):
    before = (trained / "scheduler" / "scheduler_config.json").read_bytes()
    flags, expected = BAD_FITS[case]
    line = error_line(capsys, "fit-variance", str(trained), "--device", "cpu", *flags)
    for text in expected:
        assert text in line
    assert (trained / "scheduler" / "scheduler_config.json").read_bytes() == before


@pytest.mark.parametrize("command", ["evaluate", "fit-variance", "plot"])
def test_missing_and_empty_folders_are_refused(command, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "no model_index.json" in error_line(capsys, command, str(tmp_path / "empty"))
    assert "does not exist" in error_line(capsys, command, str(tmp_path / "missing"))


def test_a_pipeline_without_a_config_needs_a_data_option(tmp_path, capsys):
    from helpers.tiny import tiny_unet

    DDPMExtPipeline(tiny_unet(), DDPMExtScheduler(5)).save_pretrained(tmp_path / "bare")
    assert "--train_data_dir" in error_line(capsys, "evaluate", str(tmp_path / "bare"), "--device", "cpu")
    DDPMExtPipeline(tiny_unet(1), DDPMExtScheduler(5)).save_pretrained(tmp_path / "digits")
    got = evaluated(tmp_path / "digits")  # of the digits' shape, which are the default
    assert got["bin_width"] == 0.125


def test_a_learned_variance_end_to_end(tmp_path, capsys):
    """Trained by the bound, monitored by it, evaluated, sampled here and by stock; nothing to fit."""
    options = {
        "loss_type": "hybrid",
        "variance_type": "learned_range",
        "validation_bpd": True,
        "validation_bpd_steps": 5,
        "monitor": "val/bpd_ema",
        "timestep_sampler": "loss_second_moment",
    }
    folder = train(tiny_run(tmp_path / "run", **options))
    assert folder is not None
    logged = rows(folder)
    assert all("train/loss_bound" in row for row in logged if "train/loss" in row)
    bounds = [row["val/bpd_ema"] for row in logged if "val/bpd_ema" in row]
    assert len(bounds) == 2
    assert json.loads((folder / "best" / "monitor.json").read_text())["value"] == min(bounds)
    got = evaluated(folder)
    assert np.isfinite(got["bits_per_dim"])
    stock = DDPMPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    drawn = stock(2, num_inference_steps=5, output_type="np").images
    assert drawn.shape == (2, 8, 8, 1)
    assert np.isfinite(drawn).all()
    assert "predicts its own variance" in error_line(capsys, "fit-variance", str(folder), "--device", "cpu")


def test_a_learned_variance_is_saved_as_our_pipeline_class(tmp_path):
    folder = train(tiny_run(tmp_path / "run", loss_type="hybrid", variance_type="learned"))
    assert folder is not None
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "diffusers_ddpm_ext.DDPMExtPipeline"
    assert json.loads((folder / "unet" / "config.json").read_text())["_class_name"] == "UNet2DExtModel"
    pipeline = DDPMExtPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert np.isfinite(pipeline(2, num_inference_steps=5, output_type="np").images).all()

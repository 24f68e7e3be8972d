"""Metrics of samples at the validations of a run: monitored, bit-exact on resume, without effect on the weights."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.accelerate_state import fresh_accelerate, reset_accelerate  # noqa: F401
from helpers.runs import rows, tiny_run
from sklearn.datasets import load_digits

from diffusers_ddpm_ext import cli
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.metrics.frechet import frechet_distance
from diffusers_ddpm_ext.training import trainer
from diffusers_ddpm_ext.training.evaluation.validation_loss import evenly_spaced
from diffusers_ddpm_ext.training.loop import sample_metrics

MEASURED = {
    "max_train_steps": 4,
    "validation_steps": 2,
    "checkpointing_steps": 2,
    "validation_metrics": ("fd", "prdc"),
    "validation_samples": 16,
    "validation_max_images": 40,
    "feature_extractor": "pixels",
    "ddpm_num_inference_steps": 3,
    "monitor": "val/precision_ema",
}


def run_once(folder: Path, **options: Any) -> Path | None:
    reset_accelerate()
    return trainer.train(tiny_run(folder, **(MEASURED | options)))


def validations(folder: Path) -> list[dict[str, float]]:
    return [row for row in rows(folder) if "val/num_samples" in row]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    run_once(folder)
    return folder


def test_each_number_has_its_interval_and_its_number_of_samples(straight, capsys):
    logged = validations(straight)
    assert [row["step"] for row in logged] == [2, 4]
    for row in logged:
        assert row["val/num_samples"] == 16
        for name in ("fd", "fd_extrapolated", "precision", "recall", "density", "coverage"):
            low, value, high = (row[f"val/{name}{end}_ema"] for end in ("_low", "", "_high"))
            assert low <= value <= high
            assert (straight / "samples" / f"{name}.png").is_file()


def test_it_is_the_number_of_the_samples_that_the_saved_pipeline_draws(straight, tmp_path):
    """Against `ddpm-ext sample` of the finished run, rounded to the data's 17 levels, and the formula."""
    file, argv = tmp_path / "samples.npy", ["--num_images", "16", "--num_inference_steps", "3", "--device", "cpu"]
    assert cli.main(["sample", str(straight), "--out", str(file), *argv]) == 0
    samples = np.round(np.load(file) * 16).reshape(16, -1) / 8 - 1
    held_out = load_digits().images[1617:].reshape(180, -1) / 8 - 1
    value = frechet_distance(samples, held_out[evenly_spaced(180, 40).numpy()])
    assert validations(straight)[-1]["val/fd_ema"] == pytest.approx(value, rel=1e-4)


def test_a_resumed_run_has_the_same_numbers(straight, tmp_path):
    """Killed within the last validation: metrics equal to the byte."""
    folder = tmp_path / "run"

    class Killed(BaseException):
        pass

    count, measure = itertools.count(), sample_metrics._measure

    def killed_at_second(*arguments: Any) -> Any:
        if next(count) == 1:
            raise Killed
        return measure(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_metrics, "_measure", killed_at_second)
        with pytest.raises(Killed):
            run_once(folder)
    run_once(folder, resume_from_checkpoint="latest")
    assert (folder / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    for weights in straight.rglob("*.safetensors"):
        assert (folder / weights.relative_to(straight)).read_bytes() == weights.read_bytes(), weights


def test_measuring_changes_no_weight(straight, tmp_path):
    """Without the metrics the same weights come out: nothing drew from the run's random numbers."""
    run_once(tmp_path / "run", validation_metrics=None, monitor=None, feature_extractor=None)
    ours = (tmp_path / "run" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert ours == (straight / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_metrics": ("fid",), "monitor": None}, "must be some of fd, kid, prdc"),
        ({"validation_metrics": ("kid",)}, "--monitor val/precision_ema is not logged in this run: choose one of"),
        ({"validation_fraction": 0.004}, "needs at least 12 validation images, and there are 7"),
        ({"validation_fraction": 0, "monitor": None}, "needs images that are held out"),
        ({"feature_extractor": "no/model"}, "is neither pixels, digits, a file nor a folder"),
        ({"trust_feature_extractor": True}, "is for a TorchScript file"),
    ],
)
def test_bad_options_end_before_the_run(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run_once(tmp_path / "run", **options)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_options_without_the_metrics_are_refused(tmp_path, capsys):
    assert cli.main(["train", "--validation_samples", "100", "--output_dir", str(tmp_path / "run")]) == 2
    assert "--validation_samples has no effect without --validation_metrics" in capsys.readouterr().err

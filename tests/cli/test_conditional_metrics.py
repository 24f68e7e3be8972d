"""Metrics of samples of models with conditions: the samples get the conditions of the images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.accelerate_state import reset_accelerate
from helpers.caption_runs import caption_inputs, train
from helpers.runs import tiny_run

from diffusers_ddpm_ext import cli
from diffusers_ddpm_ext.training import trainer
from diffusers_ddpm_ext.training.evaluation.samples import SampleDraws

FLAGS = ["--metrics", "kid", "--num_samples", "24", "--num_inference_steps", "2", "--device", "cpu"]


@pytest.fixture
def arguments(monkeypatch) -> list[dict]:
    """The conditions of each batch that is drawn."""
    calls: list[dict] = []
    real = SampleDraws._conditions

    def recorded(self, indices):
        calls.append(real(self, indices))
        return calls[-1]

    monkeypatch.setattr(SampleDraws, "_conditions", recorded)
    return calls


def measure(folder: Path, *flags: str) -> dict:
    assert cli.main(["evaluate", str(folder), *FLAGS, *flags]) == 0
    return json.loads((folder / "evaluation" / "sample_metrics.json").read_text())


def test_classes_have_the_shares_of_the_held_out_images(tmp_path, arguments):
    options = {"conditioning_key": "adm", "class_column": "digit", "conditioning_dropout": {"class_labels": 0.2}}
    reset_accelerate()
    folder = trainer.train(tiny_run(tmp_path / "run", max_train_steps=1, validation_steps=0, **options))
    result = measure(folder, "--guidance_scale", "2")
    assert result["samples"]["guidance_scale"] == 2
    labels = [label for call in arguments for label in call["class_labels"].tolist()]
    assert len(labels) == 24
    assert len(set(labels)) > 5  # not the first images, which a folder of classes would sort


@pytest.mark.slow
def test_captions_are_those_of_the_held_out_images(tmp_path, arguments):
    folder = train(
        tmp_path / "run",
        caption_inputs(tmp_path),
        validation_metrics=("kid",),
        validation_samples=12,
        feature_extractor="pixels",
        monitor="val/kid_ema",
    )
    in_training = [prompt for call in arguments for prompt in call["prompt"]]
    assert set(in_training) <= {"red", "green", "blue"}
    arguments.clear()
    measure(folder, "--memorization")
    assert {prompt for call in arguments for prompt in call["prompt"]} <= {"red", "green", "blue"}

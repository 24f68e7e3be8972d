"""Metrics of samples in the card: with their intervals and all that they depend on, whatever a name holds."""

from __future__ import annotations

import json

import pytest
import yaml
from helpers.tiny import tiny_unet

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.hub.card import make_card
from diffusers_ddpm_ext.hub.sample_scores import read_sample_scores
from diffusers_ddpm_ext.utils.input_files import JsonObject

RECORD = {
    "format": 1,
    "samples": {"source": "drawn", "scheduler": "DDIMScheduler", "num_inference_steps": 20, "guidance_scale": 2.0},
    "split": "validation",
    "confidence": 0.95,
    "features": {"name": "models/a|b"},
    "metrics": {
        "precision": {"value": 0.8, "low": 0.75, "high": 0.84},
        "kid": {"value": 0.0123456, "low": -0.001, "high": 0.02},
    },
    "num_samples": 2000,
    "num_reference": 180,
    "memorization": {"rate": {"value": 0.01, "low": 0.0, "high": 0.02}},
}
CONDITIONS = "2,000 samples, 180 images of validation, features: models/a|b, DDIMScheduler, 20 steps, guidance 2"


def test_the_card_has_each_number_with_its_interval_and_conditions(tmp_path):
    DDPMExtPipeline(tiny_unet(1), DDPMExtScheduler(20)).save_pretrained(tmp_path)
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "sample_metrics.json").write_text(json.dumps(RECORD))
    card = make_card(tmp_path, "me/x")
    of = CONDITIONS.replace("|", "\\|")
    assert f"| kernel distance, `{of}` | 0.01235 (-0.001 to 0.02) |" in card
    assert f"| precision, `{of}` | 0.8 (0.75 to 0.84) |" in card
    assert f"| share of copies of training images, `{of}` | 0.01 (0 to 0.02) |" in card
    results = yaml.safe_load(card.split("---")[1])["model-index"][0]["results"]
    metrics = {metric["type"]: metric for result in results for metric in result["metrics"]}
    assert metrics["kid"]["value"] == 0.012346
    assert metrics["kid"]["name"] == f"kernel distance ({CONDITIONS})"
    assert set(metrics) == {"kid", "precision", "copies"}


@pytest.mark.parametrize("missing", ["samples", "split", "confidence", "features", "num_samples"])
def test_a_record_that_lacks_what_its_numbers_depend_on_is_refused(missing):
    record = {name: value for name, value in RECORD.items() if name != missing}
    with pytest.raises(ConfigError, match=missing):
        read_sample_scores(JsonObject("record", record))


def test_fitted_timesteps_are_a_condition():
    record = RECORD | {"samples": RECORD["samples"] | {"timesteps": "samples"}}
    scores = read_sample_scores(JsonObject("record", record))
    assert scores.conditions == CONDITIONS.replace("20 steps", "20 steps (samples)")

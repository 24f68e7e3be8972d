"""A scheduler's config without torch: what Diffusers' own reading of the same file gives."""

from __future__ import annotations

import json

import diffusers
import numpy as np
import pytest

from diffusers_ddpm_ext import DDPMExtScheduler
from diffusers_ddpm_ext.diffusion.schedule import TABLE_NAMES
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.schedulers.live_config import constructor_defaults
from diffusers_ddpm_ext.schedulers.resolved_config import DEFAULTS, read_scheduler_config

OURS = [
    {},
    {"v_posterior": 0.3},
    {"beta_schedule": "squaredcos_cap_v2", "cosine_s": 0.01},
    {"variance_type": "learned_range", "beta_schedule": "sqrt"},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    {"v_posterior": [0.1] * 20, "v_decoder": [0.5] * 20, "optimal_timesteps": {"3": [19, 9, 0]}},
]
STOCK = ["DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"]
DROPPED = ["beta_start", "clip_sample", "steps_offset", "prediction_type"]
WRONG = [
    {"beta_start": "x"},
    {"num_train_timesteps": 10**9},
    {"v_posterior": 2},
    {"v_posterior": 0.5, "variance_type": "learned"},
    {"clip_sample": "yes"},
    {"optimal_timesteps": {"2": [0, 1]}},
    {"trained_betas": [0.1, 2]},
    {"beta_starts": 0.1},
    {"linear_start": 0.1},
    {"_use_default_values": 3},
]


def write(folder, content):
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(content))


def contents():
    own = [json.loads(DDPMExtScheduler(20, **kwargs).to_json_string()) for kwargs in OURS]
    stock = [json.loads(getattr(diffusers, name)(num_train_timesteps=20).to_json_string()) for name in STOCK]
    return [*own, *stock, *(content | {"_use_default_values": DROPPED} for content in stock), {}]


def test_the_defaults_are_those_of_the_constructor():
    assert constructor_defaults(DDPMExtScheduler) == DEFAULTS


@pytest.mark.parametrize("content", contents())
def test_the_same_as_the_scheduler(content, tmp_path):
    write(tmp_path, content)
    ours = read_scheduler_config(tmp_path)
    scheduler = DDPMExtScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    for name in TABLE_NAMES:
        np.testing.assert_array_equal(getattr(ours.schedule, name), getattr(scheduler.schedule, name))
    assert json.dumps(ours.values) == json.dumps({name: scheduler.config[name] for name in DEFAULTS})


@pytest.mark.parametrize("change", WRONG)
def test_the_same_refusal(change, tmp_path):
    write(tmp_path, json.loads(DDPMExtScheduler(20).to_json_string()) | change)
    with pytest.raises((ValueError, TypeError)) as expected:
        DDPMExtScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    with pytest.raises(ConfigError) as refused:
        read_scheduler_config(tmp_path)
    assert str(refused.value).endswith(f"scheduler_config.json cannot be used: {expected.value}")


def test_a_class_name_that_is_none(tmp_path):
    write(tmp_path, {"_class_name": 3})
    with pytest.raises(ConfigError, match="_class_name=3 must be the name of a class"):
        read_scheduler_config(tmp_path)

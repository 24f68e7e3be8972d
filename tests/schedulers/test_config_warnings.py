"""Exchanging schedulers prints nothing about our keys, and still what Diffusers has to say about others."""

from __future__ import annotations

import logging

import diffusers
import pytest
from diffusers import DDPMScheduler

from diffusers_ddpm_ext import DDPMExtScheduler

FITTED = {"v_posterior": [0.5] * 1000, "v_decoder": [0.25] * 1000, "optimal_timesteps": {"2": [500, 3], "1": [400]}}


@pytest.fixture
def printed(caplog):
    """What Diffusers logs; its own loggers do not propagate."""
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


NAMES = ["DPMSolverMultistepScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "DDPMScheduler", "PNDMScheduler"]


@pytest.mark.parametrize("first", NAMES)
@pytest.mark.parametrize("second", NAMES)
def test_exchanges_after_a_fit_are_quiet(first, second, printed, tmp_path):
    DDPMExtScheduler(**FITTED).save_pretrained(tmp_path)
    loaded = getattr(diffusers, first).from_pretrained(tmp_path)  # as stock Diffusers opens a folder of ours
    for scheduler in (DDPMExtScheduler(**FITTED), loaded):
        once = getattr(diffusers, first).from_config(scheduler.config)
        twice = getattr(diffusers, second).from_config(once.config)
        assert len(DDPMExtScheduler.from_config(twice.config).config.v_posterior) == 1000
    assert "were passed to" not in printed.text


def test_other_keys_are_still_named(printed):
    config = {**DDPMScheduler().config, **FITTED, "beta_strat": 0.1}
    config.pop("_class_name", None)
    diffusers.DDIMScheduler.from_config(config)
    warnings = [record.getMessage() for record in printed.records if "were passed to" in record.getMessage()]
    assert len(warnings) == 1
    assert "'beta_strat': 0.1" in warnings[0]
    assert "v_posterior" not in warnings[0]
    assert len(warnings[0]) < 1000

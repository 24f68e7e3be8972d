"""A scheduler's config is obeyed however it is changed. Oracles: a new scheduler of that config; stock Diffusers."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from diffusers.configuration_utils import FrozenDict
from helpers.draws import draws, seeded
from helpers.tiny import tiny_unet

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler

T = 60
CHANGES = {
    "prediction_type": {"prediction_type": "v_prediction"},
    "sample": {"prediction_type": "sample", "clip_sample": False},
    "variance_type": {"variance_type": "fixed_large"},
    "learned_range": {"variance_type": "learned_range"},
    "v_posterior": {"v_posterior": 0.3},
    "v_posterior per step": {"v_posterior": np.linspace(0, 1, T)},
    "clip_sample": {"clip_sample": False},
    "clip_sample_range": {"clip_sample_range": 0.5},
    "thresholding": {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.5},
    "timestep_spacing": {"timestep_spacing": "trailing"},
    "steps_offset": {"steps_offset": 1},
    "beta_schedule": {"beta_schedule": "squaredcos_cap_v2", "cosine_s": 0.02},
    "explicit betas": {"beta_schedule": "sigmoid"},
    "beta_start": {"beta_start": 0.01, "beta_end": 0.1},
    "trained_betas": {"trained_betas": torch.linspace(0.01, 0.2, 30)},
    "num_train_timesteps": {"num_train_timesteps": 45},
    "zero terminal SNR": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "v_decoder": {"v_decoder": [0.5] * T},
    "optimal_timesteps": {"optimal_timesteps": {"2": [50, 3]}},
}


def registered(scheduler, change):
    scheduler.register_to_config(**change)
    return scheduler


def assigned_config(scheduler, change):
    """As `StableDiffusionPipeline` corrects the configs of old folders."""
    scheduler._internal_dict = FrozenDict({**scheduler.config, **change})
    return scheduler


WAYS = {
    "register_to_config": registered,
    "_internal_dict": assigned_config,
    "from_config": lambda scheduler, change: DDPMExtScheduler.from_config(scheduler.config, **change),
    "a deep copy": lambda scheduler, change: registered(copy.deepcopy(scheduler), change),
    "a pickled copy": lambda scheduler, change: registered(pickle.loads(pickle.dumps(scheduler)), change),
}


def behavior(scheduler) -> list[torch.Tensor]:
    """What a scheduler does: its steps, its tables and its reverse steps."""
    x, out = draws(2, 4)
    if scheduler.config.variance_type.startswith("learned"):
        out = torch.cat([out, out], 1)
    results = [scheduler.timesteps, scheduler.alphas_cumprod, scheduler.lvlb_weights, scheduler.add_noise(x, x, 3)]
    for t in scheduler.timesteps[:3].tolist():
        results += scheduler.step(out, t, x, seeded(), return_dict=False)
    return results


def public(config) -> dict:
    return {key: value for key, value in config.items() if not key.startswith("_")}


@pytest.mark.parametrize("steps", [None, 10])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CHANGES)
def test_every_key_is_obeyed_as_a_new_scheduler_obeys_it(case, way, steps):
    length = {} if case == "trained_betas" else {"num_train_timesteps": T}
    scheduler, new = DDPMExtScheduler(T), DDPMExtScheduler(**length | CHANGES[case])
    assert scheduler.betas is scheduler.betas  # cached tables are those of the old config
    if steps:
        scheduler.set_timesteps(steps)
        new.set_timesteps(steps)
    changed = WAYS[way](scheduler, CHANGES[case])
    if steps and way == "from_config":
        changed.set_timesteps(steps)
    assert public(changed.config) == public(new.config)
    for got, want in zip(behavior(changed), behavior(new), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("case", ["prediction_type", "sample", "clip_sample", "clip_sample_range", "thresholding"])
def test_what_stock_obeys_is_obeyed_as_stock_obeys_it(case):
    x, out = draws(2, 3, 4, 4)
    results = []
    for scheduler in (DDPMScheduler(), DDPMExtScheduler()):
        scheduler.set_timesteps(10)
        scheduler.register_to_config(**CHANGES[case])
        results.append(scheduler.step(out, 500, x, generator=seeded()).prev_sample)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=2e-5)


def test_attributes_that_are_keys_reach_the_config():
    scheduler = DDPMExtScheduler(T)
    scheduler.clip_sample = False
    scheduler.variance_type = "fixed_large"
    assert public(scheduler.config) == public(
        DDPMExtScheduler(T, clip_sample=False, variance_type="fixed_large").config
    )


def test_a_change_back_leaves_no_trace():
    scheduler, before = DDPMExtScheduler(T), DDPMExtScheduler(T)
    for value in ("sigmoid", "sqrt", "linear"):
        scheduler.register_to_config(beta_schedule=value)
    assert public(scheduler.config) == public(before.config)
    assert scheduler.schedule.betas.tobytes() == before.schedule.betas.tobytes()


@pytest.mark.parametrize(
    ("made", "change", "message"),
    [
        (
            {"v_posterior": 1.0},
            {"variance_type": "fixed_small"},
            "variance_type='fixed_small' is overridden by v_post",
        ),
        ({"v_posterior": 1.0}, {"variance_type": "learned"}, "contradicts variance_type='learned'"),
        ({"v_posterior": [0.5] * T}, {"num_train_timesteps": 30}, "v_posterior=of shape"),
        ({"trained_betas": [0.1] * T}, {"num_train_timesteps": 30}, "contradicts the 60 trained_betas"),
        ({"trained_betas": [0.1] * T}, {"num_train_timesteps": 1000}, "num_train_timesteps=1000 is overridden by"),
        ({}, {"prediction_type": "eps"}, "prediction_type='eps'"),
        ({}, {"timestep_spacing": 3}, "timestep_spacing=3"),
        ({}, {"clip_sample": "no"}, "clip_sample='no' must be True or False"),
        ({}, {"clip_sample_range": float("nan")}, "clip_sample_range=nan"),
        ({}, {"thresholding": None}, "thresholding=None"),
        ({}, {"dynamic_thresholding_ratio": 99.5}, "dynamic_thresholding_ratio=99.5"),
        ({}, {"sample_max_value": -1}, "sample_max_value=-1"),
        ({}, {"steps_offset": 0.5}, "steps_offset=0.5"),
        ({}, {"beta_start": "0.0001"}, "beta_start='0.0001'"),
        ({}, {"rescale_betas_zero_snr": "yes"}, "rescale_betas_zero_snr='yes'"),
        ({}, {"num_train_timesteps": 10**9}, "at most 100000"),
        ({}, {"trained_betas": np.broadcast_to(0.1, 10**9)}, "1000000000 entries"),
        ({}, {"optimal_timesteps": {"2": 7}}, "must be a list of steps"),
    ],
)
def test_a_change_that_cannot_be_obeyed_is_refused_and_changes_nothing(made, change, message):
    scheduler = DDPMExtScheduler(**({} if "trained_betas" in made else {"num_train_timesteps": T}) | made)
    before, was = behavior(scheduler), dict(scheduler.config)
    for way in (registered, assigned_config, lambda s, c: DDPMExtScheduler.from_config(s.config, **c)):
        with pytest.raises(ValueError, match=message.replace("[", r"\[")):
            way(scheduler, change)
    assert dict(scheduler.config) == was
    for got, want in zip(behavior(scheduler), before, strict=True):
        assert torch.equal(got, want)


def test_steps_in_use_that_do_not_fit_the_new_config_are_named():
    scheduler = DDPMExtScheduler(T)
    scheduler.set_timesteps(timesteps=[50, 3])
    with pytest.raises(ValueError, match="steps in use do not fit the new config; call set_timesteps first"):
        scheduler.register_to_config(num_train_timesteps=40)
    assert len(scheduler) == T
    scheduler.register_to_config(v_posterior=1.0)
    assert scheduler.timesteps.tolist() == [50, 3]


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.__setitem__("prediction_type", "sample"),
        lambda config: setattr(config, "prediction_type", "sample"),
        lambda config: config.update(prediction_type="sample"),
        lambda config: config.pop("prediction_type"),
        lambda config: config.clear(),
        lambda config: config.__ior__({"prediction_type": "sample"}),
    ],
)
def test_the_config_cannot_be_changed_in_place(change):
    """Stock's can, with no effect or with one: its guard looks for a name that Python mangles."""
    scheduler = DDPMExtScheduler()
    with pytest.raises(ValueError, match=r"use scheduler\.register_to_config"):
        change(scheduler.config)
    assert scheduler.config["prediction_type"] == scheduler.config.prediction_type == "epsilon"


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_a_config_is_copied_and_merged_as_a_dict(copied):
    config = DDPMExtScheduler(v_posterior=0.3, optimal_timesteps={"2": [9, 3]}).config
    assert copied(config) == config
    assert (config | {"v_posterior": 1})["v_posterior"] == 1
    assert ({"v_posterior": 1} | config)["v_posterior"] == 0.3


def test_keys_of_other_schedulers_are_kept_through_a_change():
    scheduler = DDPMExtScheduler.from_config({"num_train_timesteps": T, "solver_order": 3})
    scheduler.register_to_config(prediction_type="sample")
    assert scheduler.config.solver_order == 3


def test_a_shallow_copy_has_its_own_steps():
    """What a call sets on its copy does not reach the scheduler, which two threads may share."""
    scheduler = DDPMExtScheduler(T)
    scheduler.set_timesteps(7)
    before = behavior(scheduler)
    other = copy.copy(scheduler)
    other.set_timesteps(3)
    other.register_to_config(prediction_type="sample")
    for got, want in zip(behavior(scheduler), before, strict=True):
        assert torch.equal(got, want)


def images(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return torch.tensor(pipeline(generator=seeded(), num_inference_steps=6, output_type="np").images)


@pytest.mark.parametrize(
    "case",
    [
        "prediction_type",
        "v_posterior",
        "timestep_spacing",
        "num_train_timesteps",
        "explicit betas",
        "zero terminal SNR",
    ],
)
def test_a_loaded_pipeline_samples_as_its_config_says(case, tmp_path):
    """Also after a first call, whose steps were set, and after saving and loading."""
    unet = tiny_unet()
    DDPMExtPipeline(unet, DDPMExtScheduler(T)).save_pretrained(tmp_path / "before")
    pipeline = DDPMExtPipeline.from_pretrained(tmp_path / "before")
    images(pipeline)
    pipeline.scheduler.register_to_config(**CHANGES[case])
    want = images(DDPMExtPipeline(unet, DDPMExtScheduler(**{"num_train_timesteps": T} | CHANGES[case])))
    pipeline.save_pretrained(tmp_path / "after")
    for changed in (pipeline, DDPMExtPipeline.from_pretrained(tmp_path / "after")):
        torch.testing.assert_close(images(changed), want, rtol=0, atol=1e-5)


def test_stock_pipelines_see_the_change():
    unet, stock = tiny_unet(), DDPMScheduler(T, prediction_type="v_prediction")
    pipeline = DDPMPipeline(unet, DDPMExtScheduler(T))
    pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    torch.testing.assert_close(images(pipeline), images(DDPMPipeline(unet, stock)), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("parameterization", "prediction_type"),
        ("linear_start", "beta_start"),
        ("predction_type", "prediction_type"),
        ("clip_samples", "clip_sample"),
        ("vposterior", "v_posterior"),
        ("beta_shedule", "beta_schedule"),
    ],
)
def test_a_name_that_would_be_ignored_is_refused(name, meant):
    scheduler = DDPMExtScheduler(T)
    for way in (registered, lambda s, c: DDPMExtScheduler.from_config(s.config, **c)):
        with pytest.raises(ValueError, match=f"{name} is no key .* use {meant}"):
            way(scheduler, {name: "v"})
    assert name not in scheduler.config


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of Diffusers' other classes
def test_keys_of_every_other_scheduler_are_kept():
    for other in DDPMExtScheduler(T).compatibles:
        config = other.from_config(DDPMExtScheduler(T).config).config
        scheduler = DDPMExtScheduler.from_config({**config, "_use_default_values": []})
        scheduler.register_to_config(clip_sample=False)
        assert config.keys() <= scheduler.config.keys()

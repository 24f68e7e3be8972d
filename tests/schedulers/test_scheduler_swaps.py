"""Configs passed between scheduler classes, in memory and on disk, keep the betas and our keys."""

from __future__ import annotations

import json
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler
from diffusers.utils.dummy_torch_and_torchsde_objects import DPMSolverSDEScheduler as NeedsTorchsde

from diffusers_ddpm_ext import DDPMExtScheduler
from diffusers_ddpm_ext.diffusion.schedule import make_betas

STOCK = sorted(
    name
    for name in DDPMExtScheduler._compatibles
    if name != "EDMEulerScheduler" and getattr(diffusers, name).__module__ != NeedsTorchsde.__module__  # no betas
)
LONG = np.linspace(1e-3, 0.03, 200)
SCHEDULES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "latent": {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195, "clip_sample": False},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "v_posterior": 0.4},
    "other cosine": {"beta_schedule": "squaredcos_cap_v2", "cosine_s": 0.02, "num_train_timesteps": 100},
    "sqrt": {"beta_schedule": "sqrt", "num_train_timesteps": 300, "beta_end": 0.01, "v_posterior": 1.0},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "laplace": {"beta_schedule": "laplace", "num_train_timesteps": 500},
    "given": {"trained_betas": LONG, "v_posterior": 0.9, "prediction_type": "sample"},
}
# Some stock schedulers hand their tensors to numpy in ways that numpy 2 deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]


def plain(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("kwargs", SCHEDULES.values(), ids=SCHEDULES)
def test_conversion_to_another_class_and_back(name, kwargs):
    """In memory, with every compatible class: its alphas are ours, and ours come back bit-exact."""
    ours = DDPMExtScheduler(**kwargs)
    other = getattr(diffusers, name).from_config(ours.config)
    abar = other.alphas_cumprod.double().numpy()
    # Stock's cumulative product is float32: 1 - beta rounds by 6e-8 of itself, T times.
    np.testing.assert_allclose(abar, ours.schedule.alphas_cumprod, rtol=2e-4, atol=1e-6)
    back = DDPMExtScheduler.from_config(other.config)
    assert back.schedule.betas.tobytes() == ours.schedule.betas.tobytes()
    assert {key: back.config[key] for key in plain(ours.config)} == plain(ours.config)


@pytest.mark.parametrize("name", STOCK)
def test_conversion_to_another_class_and_back_on_disk(name, tmp_path):
    ours = DDPMExtScheduler(**SCHEDULES["sqrt"])
    ours.save_pretrained(tmp_path / "ours")
    getattr(diffusers, name).from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "other")
    back = DDPMExtScheduler.from_pretrained(tmp_path / "other")
    assert back.schedule.betas.tobytes() == ours.schedule.betas.tobytes()
    assert plain(back.config) | plain(ours.config) == plain(back.config)


@pytest.mark.parametrize("name", STOCK)
def test_from_another_class_and_back(name):
    """A class's own defaults describe the network as much as what was spelled out."""
    other = getattr(diffusers, name)()
    ours = DDPMExtScheduler.from_config(other.config)
    np.testing.assert_allclose(ours.betas.numpy(), other.betas.numpy(), rtol=1e-5)
    again = getattr(diffusers, name).from_config(ours.config)
    np.testing.assert_array_equal(again.betas.numpy(), other.betas.numpy())


def test_defaults_of_heun_are_not_ours():
    assert HeunDiscreteScheduler().config.beta_start == 0.00085
    assert DDPMExtScheduler.from_config(HeunDiscreteScheduler().config).config.beta_start == 0.00085


def test_sampler_options_follow_the_class_as_everywhere_in_diffusers():
    assert DDPMExtScheduler.from_config(HeunDiscreteScheduler().config).config.timestep_spacing == "leading"
    explicit = HeunDiscreteScheduler(timestep_spacing="trailing")
    assert DDPMExtScheduler.from_config(explicit.config).config.timestep_spacing == "trailing"


def test_null_variance_type_of_a_multistep_solver(tmp_path):
    DPMSolverMultistepScheduler().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["variance_type"] is None
    assert DDPMExtScheduler.from_pretrained(tmp_path).config.variance_type == "fixed_small"


@pytest.mark.parametrize("kwargs", SCHEDULES.values(), ids=SCHEDULES)
def test_saving_keeps_everything(kwargs, tmp_path):
    ours = DDPMExtScheduler(**kwargs)
    ours.save_pretrained(tmp_path)
    loaded = DDPMExtScheduler.from_pretrained(tmp_path)
    assert plain(loaded.config) == plain(ours.config)
    assert loaded.schedule.posterior_variance.tobytes() == ours.schedule.posterior_variance.tobytes()


def test_keys_of_the_config():
    """A file format: names of the keys are for ever."""
    assert set(plain(DDPMExtScheduler().config)) == set(plain(DDPMScheduler().config)) | {
        "v_posterior",
        "cosine_s",
        "v_decoder",
        "optimal_timesteps",
    }


@pytest.mark.parametrize(
    ("kwargs", "carried"),
    [
        ({}, False),
        ({"beta_schedule": "scaled_linear"}, False),
        ({"beta_schedule": "squaredcos_cap_v2"}, False),
        ({"beta_schedule": "linear", "cosine_s": 0.02}, False),
        ({"beta_schedule": "squaredcos_cap_v2", "cosine_s": 0.02}, True),
        ({"beta_schedule": "sqrt"}, True),
        ({"beta_schedule": "sigmoid"}, True),
        ({"beta_schedule": "laplace"}, True),
    ],
)
def test_betas_without_a_common_name_are_in_the_config(kwargs, carried):
    config = DDPMExtScheduler(num_train_timesteps=40, **kwargs).config
    assert config.beta_schedule == kwargs.get("beta_schedule", "linear")
    if not carried:
        assert config.trained_betas is None
        return
    assert isinstance(config.trained_betas, list)
    want = make_betas(config.beta_schedule, 40, cosine_s=config.cosine_s)
    assert np.array(config.trained_betas).tobytes() == want.tobytes()


def test_new_arguments_replace_explicit_betas():
    """They follow from the name, so what changes the name's arguments changes them; betas of one's own stay."""
    sqrt = DDPMExtScheduler(beta_schedule="sqrt").config
    shorter = DDPMExtScheduler.from_config(sqrt, num_train_timesteps=50)
    assert shorter.schedule.betas.tobytes() == make_betas("sqrt", 50).tobytes()
    linear = DDPMExtScheduler.from_config(sqrt, beta_schedule="linear")
    assert linear.config.trained_betas is None
    assert linear.schedule.betas.tobytes() == make_betas("linear", 1000).tobytes()
    given = DDPMExtScheduler.from_config(DDPMExtScheduler(trained_betas=LONG).config, beta_end=0.5)
    assert given.schedule.betas.tobytes() == LONG.tobytes()


@pytest.mark.parametrize(
    ("v", "stock"), [(0.0, "fixed_small"), (0.49, "fixed_small"), (0.5, "fixed_large"), (1, "fixed_large")]
)
def test_v_posterior_for_stock_readers(v, stock, tmp_path):
    ours = DDPMExtScheduler(v_posterior=v)
    assert ours.config.variance_type == ours.variance_type == stock
    ours.save_pretrained(tmp_path)
    assert DDPMScheduler.from_pretrained(tmp_path).variance_type == stock
    assert DDPMExtScheduler.from_pretrained(tmp_path).config.v_posterior == v


def test_unset_v_posterior_stays_unset(tmp_path):
    for variance_type in ("fixed_small", "fixed_large", "learned_range"):
        ours = DDPMExtScheduler(variance_type=variance_type)
        assert ours.config.v_posterior is None
        ours.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "scheduler_config.json").read_text())
        assert saved["v_posterior"] is None
        assert saved["variance_type"] == variance_type
        assert DDPMExtScheduler.from_pretrained(tmp_path).config.v_posterior is None


@pytest.mark.parametrize("of", [list, tuple, np.array, torch.tensor, lambda b: torch.tensor(b, dtype=torch.float32)])
def test_trained_betas_of_any_kind_are_saved(of, tmp_path):
    betas = of([0.1, 0.25, 0.3])
    ours = DDPMExtScheduler(trained_betas=betas)
    assert isinstance(ours.config.trained_betas, list)
    assert ours.config.num_train_timesteps == len(ours) == len(ours.timesteps) == 3
    ours.save_pretrained(tmp_path)
    loaded = DDPMExtScheduler.from_pretrained(tmp_path)
    exact = np.asarray([float(b) for b in betas])
    assert loaded.schedule.betas.tobytes() == exact.tobytes()
    stock = DDPMScheduler.from_pretrained(tmp_path)
    assert len(stock) == 3  # stock alone would keep num_train_timesteps at 1000


def test_zero_terminal_snr_survives_explicit_betas(tmp_path):
    ours = DDPMExtScheduler(beta_schedule="sqrt", rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert ours.schedule.betas[-1] == 1
    back = DDPMExtScheduler.from_config(DDIMScheduler.from_config(ours.config).config)
    assert back.schedule.betas.tobytes() == ours.schedule.betas.tobytes()
    ours.save_pretrained(tmp_path)
    assert DDPMExtScheduler.from_pretrained(tmp_path).schedule.betas.tobytes() == ours.schedule.betas.tobytes()


def test_register_schedule_is_saved_with_diffusers_names(tmp_path):
    ours = DDPMExtScheduler(rescale_betas_zero_snr=True)
    ours.register_schedule(beta_schedule="linear", timesteps=100, linear_start=0.0015, linear_end=0.0195)
    assert ours.config.beta_schedule == "scaled_linear"
    assert ours.config.rescale_betas_zero_snr is False
    stock = DDPMScheduler.from_config(ours.config)
    np.testing.assert_allclose(stock.betas.numpy(), ours.betas.numpy(), rtol=1e-6)
    ours.register_schedule(beta_schedule="sqrt", timesteps=10)
    assert len(ours.config.trained_betas) == 10
    ours.register_schedule(beta_schedule="sqrt_linear", timesteps=20)
    assert ours.config.trained_betas is None
    assert ours.config.beta_schedule == "linear"
    ours.save_pretrained(tmp_path)
    assert DDPMExtScheduler.from_pretrained(tmp_path).schedule.betas.tobytes() == make_betas("linear", 20).tobytes()


def test_unused_arguments_are_returned(tmp_path):
    DDPMExtScheduler(v_posterior=0.3).save_pretrained(tmp_path)
    scheduler, unused = DDPMExtScheduler.from_pretrained(tmp_path, return_unused_kwargs=True, colour="red")
    assert scheduler.config.v_posterior == 0.3
    assert unused["colour"] == "red"
    assert "_use_default_values" not in scheduler.config


def test_a_loaded_scheduler_is_converted_correctly(tmp_path):
    DDPMExtScheduler(**SCHEDULES["latent"]).save_pretrained(tmp_path)
    other = DDIMScheduler.from_config(DDPMExtScheduler.from_pretrained(tmp_path).config)
    assert other.config.beta_schedule == "scaled_linear"
    assert other.config.clip_sample is False


def test_arguments_override_a_loaded_config(tmp_path):
    DDPMExtScheduler(v_posterior=0.9).save_pretrained(tmp_path)
    assert DDPMExtScheduler.from_pretrained(tmp_path, v_posterior=0.1).config.variance_type == "fixed_small"
    assert DDPMExtScheduler.from_pretrained(tmp_path, v_posterior=None).config.variance_type == "fixed_large"
    with pytest.raises(ValueError, match="leave v_posterior out"):
        DDPMExtScheduler.from_pretrained(tmp_path, variance_type="learned")

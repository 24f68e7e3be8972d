"""From options to the parts of a run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.models.conditioning import Conditioning
from diffusers_ddpm_ext.training.config.options import EmaOptions, ModelOptions, ObjectiveOptions, ScheduleOptions
from diffusers_ddpm_ext.training.config.train_config import TrainConfig
from diffusers_ddpm_ext.training.data.image_set import ImageSet
from diffusers_ddpm_ext.training.data.image_store import PackedImages
from diffusers_ddpm_ext.training.factory import denoiser, parts
from diffusers_ddpm_ext.training.factory.denoiser_shape import DenoiserShape
from diffusers_ddpm_ext.training.factory.parts import build_ema, build_objective, build_parts, build_scheduler


def build_denoiser(model: ModelOptions, size: tuple[int, int], channels: int, seed: int) -> UNet2DModel:
    return denoiser.build_denoiser(model, DenoiserShape(size, channels, Conditioning()), seed)


SMALL = ModelOptions(block_out_channels=(8, 16), layers_per_block=1, attention_levels=(1,), norm_num_groups=4)
UNET: dict[str, Any] = {
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
}


def test_default_network_is_that_of_train_unconditional():
    """113,673,219 weights: the count that the published DDPM checkpoints of this architecture have."""
    options = replace(ModelOptions(), attention_levels=(4,))
    network = build_denoiser(options, (64, 64), 3, seed=0)
    assert sum(parameter.numel() for parameter in network.parameters()) == 113_673_219
    assert network.config.down_block_types == [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"]
    assert network.config.up_block_types == ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4]
    assert network.config.sample_size == 64


def test_weights_follow_from_the_seed_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_denoiser(SMALL, (8, 8), 1, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before), "the program's own random numbers are not touched"
    torch.manual_seed(2)
    again, other = (build_denoiser(SMALL, (8, 8), 1, seed=seed).state_dict() for seed in (5, 6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv_in.weight"], other["conv_in.weight"])


def test_images_that_are_not_square():
    network = build_denoiser(SMALL, (8, 12), 3, seed=0)
    assert network.config.sample_size == [8, 12]
    assert network.training


@pytest.mark.parametrize("place", ["unet.json", "config.json", "unet/config.json"])
def test_configuration_from_a_json_file_a_model_folder_or_a_pipeline_folder(tmp_path: Path, place: str):
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(UNET | {"_class_name": "UNet2DModel", "sample_size": 32}))
    named = path if place == "unet.json" else tmp_path
    network = build_denoiser(ModelOptions(model_config_name_or_path=str(named)), (8, 8), 1, seed=0)
    assert isinstance(network, UNet2DModel)
    assert network.config.block_out_channels == [8, 8]
    assert network.config.sample_size == 8, "the images decide"


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        ({"in_channels": 3}, ["in_channels is 3", "--channels"]),
        ({"out_channels": 2}, ["learned variance"]),
        ({"out_channels": 5}, ["out_channels is 5"]),
        ({"_class_name": "UNet2DConditionModel"}, ["UNet2DConditionModel"]),
        ({"block_out_chanels": [8]}, ["block_out_chanels"]),
        ({"num_class_embeds": 10}, ["conditioned on classes", "--conditioning_key adm"]),
        ({"up_block_types": ["UpBlock2D"]}, []),
        ({"down_block_types": ["DownBlock2D", "NoBlock2D"]}, []),
        ({"norm_num_groups": 3}, []),
        ({"block_out_channels": [8] * 5, "down_block_types": ["DownBlock2D"] * 5, "up_block_types": ["UpBlock2D"] * 5},
         ["--resolution 8 8", "too small"]),
    ],
)  # fmt: skip
def test_networks_that_do_not_match_the_images_raise(tmp_path: Path, change: dict[str, Any], messages: list[str]):
    path = tmp_path / "unet.json"
    path.write_text(json.dumps(UNET | change))
    with pytest.raises(ConfigError) as raised:
        build_denoiser(ModelOptions(model_config_name_or_path=str(path)), (8, 8), 1, seed=0)
    for message in ["--model_config_name_or_path", *messages]:
        assert message in str(raised.value)


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_files_that_are_not_a_configuration_raise(tmp_path: Path, text: str):
    path = tmp_path / "unet.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="--model_config_name_or_path"):
        build_denoiser(ModelOptions(model_config_name_or_path=str(path)), (8, 8), 1, seed=0)


def test_a_folder_without_a_configuration_raises(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"unet/config\.json"):
        build_denoiser(ModelOptions(model_config_name_or_path=str(tmp_path)), (8, 8), 1, seed=0)


def test_images_that_cannot_be_halved():
    with pytest.raises(ConfigError, match=r"--resolution 10 9 is not divisible by 2.*--resolution 10 10"):
        build_denoiser(SMALL, (10, 9), 1, seed=0)


@pytest.mark.parametrize(
    ("schedule", "objective"),
    [
        ({}, {"original_elbo_weight": math.nan}),
        ({}, {"l_simple_weight": math.nan}),
        ({}, {"logvar_init": math.inf}),
        ({"beta_end": 1.5}, {}),
        ({"num_train_timesteps": 0}, {}),
        ({"v_posterior": 1.5}, {}),
        ({"rescale_betas_zero_snr": True}, {}),
        ({"variance_type": "learned_range"}, {}),
    ],
)
def test_values_that_the_library_rejects_are_config_errors(schedule: dict[str, Any], objective: dict[str, Any]):
    name = next(iter(schedule | objective))
    message = "prediction_type" if name == "rescale_betas_zero_snr" else name
    config = TrainConfig(model=SMALL, schedule=ScheduleOptions(**schedule), objective=ObjectiveOptions(**objective))
    images = ImageSet(PackedImages([torch.zeros(1, 8, 8, dtype=torch.uint8)]), torch.arange(1), (8, 8))
    with pytest.raises(ConfigError, match=message):
        build_parts(config, images)


def record_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[dict[str, Any]]:
    """The keyword arguments of every call of a class that `parts` builds."""
    calls: list[dict[str, Any]] = []
    real = getattr(parts, name)

    def build(*args: Any, **values: Any) -> Any:
        calls.append(values)
        return real(*args, **values)

    monkeypatch.setattr(parts, name, build)
    return calls


def test_every_option_of_the_schedule_is_passed_to_the_scheduler(monkeypatch):
    calls = record_calls(monkeypatch, "DDPMExtScheduler")
    options = ScheduleOptions(num_train_timesteps=7, beta_schedule="sqrt", v_posterior=0.3, clip_sample=False)
    build_scheduler(options)
    assert calls == [vars(options)]


def test_every_option_of_the_objective_is_passed_but_those_of_others(monkeypatch):
    """The optimizer takes one, the timestep sampler three; two are converted."""
    scheduler = build_scheduler(ScheduleOptions(num_train_timesteps=7))
    calls = record_calls(monkeypatch, "DDPMObjective")
    options = ObjectiveOptions(learn_logvar=True, logvar_init=-1.0, l_simple_weight=2.0)
    build_objective(options, scheduler, levels=17)
    others = {"logvar_learning_rate", "timestep_sampler", "log_snr_mean", "log_snr_std", "perceptual_model"}
    passed = {name: value for name, value in vars(options).items() if name not in others}
    assert calls == [passed | {"bin_width": 2 / 16, "features": None}]


def test_options_reach_scheduler_and_objective():
    """Every option that the scheduler and the objective know by name is the one that was given."""
    options = ScheduleOptions(
        num_train_timesteps=7, beta_schedule="sqrt", prediction_type="v_prediction", v_posterior=0.3, clip_sample=False
    )
    scheduler = build_scheduler(options)
    for name in ("num_train_timesteps", "beta_schedule", "prediction_type", "v_posterior", "clip_sample"):
        assert scheduler.config[name] == getattr(options, name)
    objective = build_objective(ObjectiveOptions(learn_logvar=True, logvar_init=-1.0, l_simple_weight=2.0), scheduler)
    assert torch.equal(objective.logvar.detach(), torch.full((7,), -1.0))
    assert isinstance(objective.logvar, torch.nn.Parameter)
    assert objective.l_simple_weight == 2.0


def test_trained_betas_set_the_number_of_steps():
    scheduler = build_scheduler(ScheduleOptions(trained_betas=(0.1, 0.2, 0.3), num_train_timesteps=3))
    assert len(scheduler.schedule) == 3


def test_ema_is_optional():
    network = build_denoiser(SMALL, (8, 8), 1, seed=0)
    assert build_ema(EmaOptions(use_ema=False), network) is None
    ema = build_ema(EmaOptions(ema_decay=0.5, ema_use_num_updates=False), network)
    assert ema is not None
    assert (ema.decay, ema.use_num_updates) == (0.5, False)
    with pytest.raises(ConfigError, match="--ema_decay"):
        build_ema(EmaOptions(ema_decay=2.0), network)

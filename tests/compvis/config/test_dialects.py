"""Configurations as forks and old versions write them: what does not concern the samples never stops a conversion."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from helpers.conversion_cases import BASE

from diffusers_ddpm_ext.compvis.config.ddpm import read_compvis_config
from diffusers_ddpm_ext.compvis.config.references import resolve_references

UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
IDENTITY = {"target": "ldm.models.autoencoder.IdentityFirstStage"}


def config(latent: bool = False, **params: Any) -> dict[str, Any]:
    target = "ldm.models.diffusion.ddpm." + ("LatentDiffusion" if latent else "DDPM")
    stages = {"first_stage_config": IDENTITY, "cond_stage_config": "__is_unconditional__"} if latent else {}
    network = {"target": UNET, "params": dict(BASE)}
    return {"model": {"target": target, "params": {"unet_config": network, "image_size": 8} | stages | params}}


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("params", "monitor", "val/ppl"),
        ("params", "monitor", 3),
        ("params", "scheduler_config", {"target": "torch.optim.lr_scheduler.StepLR", "params": {"step_size": 3}}),
        ("params", "scheduler_config", {"target": "ldm.lr_scheduler.LambdaLinearScheduler", "params": {"gamma": 1}}),
        ("params", "scheduler_config", "cosine"),
        ("params", "loss_type", "huber"),
        ("params", "l_simple_weight", "lots"),
        ("params", "original_elbo_weight", [1]),
        ("params", "p2_gamma", 1.0),
        ("params", "finetune_keys", ["a"]),
        ("params", "ckpt_path", 5),
        ("params", "ucg_training", {"txt": {"probability": 0.1}}),
        ("model", "base_learning_rate", -1),
        ("model", "scale_lr", "sometimes"),
        ("model", "seed", 23),
        ("unet", "frozen", True),
        ("top", "trainer", {"devices": 8}),
        ("top", "optimizer", ["adam", {"lr": 1}]),
        ("top", 3, 4),
    ],
)
def test_keys_of_training_alone_never_stop_a_conversion(section, key, value):
    content = config()
    sections = {
        "params": content["model"]["params"],
        "model": content["model"],
        "unet": content["model"]["params"]["unet_config"],
        "top": content,
    }
    sections[section][key] = value
    rows = read_compvis_config(content, for_training=False).rows
    matching = [row for row in rows if str(key) in row.key]
    assert matching
    assert all(row.fate == "without effect" for row in matching)
    assert read_compvis_config(content, for_training=False).unet_params == BASE
    try:
        for_a_run = read_compvis_config(content, strict=False).rows
    except ValueError:
        return
    told = {row.fate for row in for_a_run if str(key) in row.key}
    assert told & {"refused", "without effect"}, "a run is never made of it silently"


@pytest.mark.parametrize("key", ["timesteps", "v_posterior", "parameterization", "learn_logvar", "use_ema"])
def test_keys_of_sampling_are_still_checked(key):
    with pytest.raises(ValueError, match=key):
        read_compvis_config(config(**{key: "wrong"}), for_training=False)


def test_references_are_followed_where_they_lead_to_a_value():
    content = config(image_size="${sizes.small}", timesteps="${model.params.linear.steps}", linear={"steps": "${t}"})
    content |= {"sizes": {"small": 16}, "t": 50}
    resolved = resolve_references(content)["model"]["params"]
    assert (resolved["image_size"], resolved["timesteps"]) == (16, 50)
    assert content["model"]["params"]["image_size"] == "${sizes.small}", "the argument is unchanged"
    del content["model"]["params"]["linear"]
    content["model"]["params"]["timesteps"] = "${t}"
    read = read_compvis_config(content, for_training=False)
    assert read.samples.image_size == 16
    assert read.schedule["num_train_timesteps"] == 50


@pytest.mark.parametrize(
    "reference", ["${missing}", "${model}", "${oc.env:HOME}", "${a}", "${..sibling}", "x${a}y", "${"]
)
def test_references_matter_only_where_a_value_is_needed(reference):
    """``a`` refers to itself, ``model`` is a section, the others lead nowhere or are OmegaConf's other forms."""
    ignored = config(True, first_stage_config={"target": "x.AutoencoderKL", "params": {"ckpt": reference}})
    ignored |= {"data": {"params": {"train": {"size": reference}}}, "a": "${a}"}
    assert read_compvis_config(ignored, for_training=False).unet_params == BASE
    needed = config(v_posterior=reference) | {"a": "${a}"}
    with pytest.raises(ValueError, match=r"v_posterior .*refers to another key"):
        read_compvis_config(needed)
    needed = config() | {"a": "${a}"}
    needed["model"]["params"]["unet_config"]["params"]["dropout"] = reference
    with pytest.raises(ValueError, match=r"dropout .*refers to another key"):
        read_compvis_config(needed)


@pytest.mark.parametrize("key", ["None", "none", "NULL", "~", ""])
def test_no_condition_as_a_text(key):
    assert read_compvis_config(config(conditioning_key=key)).conditioning_key is None
    assert read_compvis_config(config(True, conditioning_key=key)).conditioning_key is None
    with pytest.raises(ValueError, match="conditioning_key"):
        read_compvis_config(config(True, conditioning_key=key, cond_stage_config={"target": "a.FrozenCLIPEmbedder"}))


@pytest.mark.parametrize(("key", "expected"), [(None, None), ("crossattn", "crossattn"), ("None", None)])
def test_an_empty_stage_is_no_stage(key, expected):
    read = read_compvis_config(config(True, cond_stage_config=None, conditioning_key=key))
    assert read.conditioning_key == expected
    assert not read_compvis_config(config(True, first_stage_config=None)).samples.latent


def test_noised_conditions_are_refused_where_there_is_a_condition():
    for count in (None, 1):
        assert read_compvis_config(config(True, num_timesteps_cond=count)).conditioning_key is None
    read_compvis_config(config(True, num_timesteps_cond=7))
    conditional = config(True, num_timesteps_cond=7, conditioning_key="concat", cond_stage_config={"target": "a.B"})
    for for_training in (True, False):
        with pytest.raises(ValueError, match=r"num_timesteps_cond 7 .*only 1"):
            read_compvis_config(conditional, for_training=for_training)
    unchanged = copy.deepcopy(conditional)
    read_compvis_config(conditional, strict=False)
    assert conditional == unchanged

"""Checkpoints of wrapped models, of forks with other channels, and with a logvar that was not learned."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import yaml
from helpers.conversion_cases import BASE, FOLDER, random_weights

from diffusers_ddpm_ext.cli import main
from diffusers_ddpm_ext.compvis import load_compvis, save_compvis
from diffusers_ddpm_ext.compvis.architecture import translate_unet
from diffusers_ddpm_ext.compvis.convert import convert_compvis, convert_openai
from diffusers_ddpm_ext.compvis.reader.archive import read_tensors
from diffusers_ddpm_ext.compvis.weights import convert_unet, export_unet
from diffusers_ddpm_ext.compvis.wrapper_names import plain_keys


def inside(key: str, wrapper: str) -> str:
    """A key of a checkpoint whose network alone was wrapped."""
    if key.startswith("model_ema.diffusion_model"):
        return key.replace("model_ema.diffusion_model", f"model_ema.diffusion_model{wrapper}")
    return key.replace("model.diffusion_model.", f"model.diffusion_model.{wrapper}.")


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: f"module.{key}",
        lambda key: f"_orig_mod.{key}",
        lambda key: f"_forward_module.module.{key}",
        lambda key: f"module._orig_mod.module.{key}",
        lambda key: f"model.{key}",
        lambda key: f"module.model.model.{key}",
        lambda key: inside(key, "_orig_mod"),
        lambda key: inside(key, "module"),
        lambda key: "_forward_module." + inside(key, "_fsdp_wrapped_module"),
        lambda key: key.replace("model.diffusion_model.", "model._orig_mod.diffusion_model."),
    ],
)
def test_prefixes_of_wrappers(rename, tmp_path):
    source = read_tensors(FOLDER / "ema.ckpt")
    torch.save({"state_dict": {rename(key): tensor for key, tensor in source.items()}}, tmp_path / "m.ckpt")
    wrapped = convert_compvis(tmp_path / "m.ckpt", FOLDER / "ema.yaml")
    plain = convert_compvis(FOLDER / "ema.ckpt", FOLDER / "ema.yaml")
    for ours, theirs in ((wrapped.pipeline.unet, plain.pipeline.unet), (wrapped.raw, plain.raw)):
        assert ours is not None
        assert theirs is not None
        assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())
    assert wrapped.ema == plain.ema
    assert wrapped.report.left_out == plain.report.left_out


def test_two_keys_of_one_name_are_refused():
    assert plain_keys(["a", "module.b"]) == {"a": "a", "b": "module.b"}
    with pytest.raises(ValueError, match=r"contains x\.y twice, as x\.y and as module\.x\.y"):
        plain_keys(["x.y", "module.x.y"])


def write_openai(path: Any, inputs: int, outputs: int, prefix: str = "") -> None:
    params = BASE | {"in_channels": inputs, "out_channels": outputs, "use_scale_shift_norm": True, "num_heads": 4}
    weights = export_unet(random_weights(translate_unet(params).build()), params)
    torch.save({prefix + key: tensor for key, tensor in weights.items()}, path)


FLAGS = {"family": "guided", "image_size": 32, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2",
         "attention_resolutions": "16", "num_heads": 4}  # fmt: skip


@pytest.mark.parametrize(
    "prefix", ["", "module.", "model.", "_orig_mod.", "module.model.", "diffusion_model.", "unet."]
)
def test_prefixes_of_openai_files(prefix, tmp_path):
    write_openai(tmp_path / "m.pt", 3, 3, prefix)
    assert convert_openai(tmp_path / "m.pt", FLAGS).pipeline.unet.config.in_channels == 3


@pytest.mark.parametrize(
    ("inputs", "outputs", "more", "learned"),
    [(1, 1, {}, False), (2, 4, {}, True), (4, 4, {"in_channels": 4}, False), (5, 10, {"learn_sigma": True}, True),
     (1, 2, {"learn_sigma": "True"}, True), (3, 6, {}, True)],
)  # fmt: skip
def test_channels_are_read_off_the_file(inputs, outputs, more, learned, tmp_path):
    write_openai(tmp_path / "m.pt", inputs, outputs)
    pipeline = convert_openai(tmp_path / "m.pt", FLAGS | more).pipeline
    assert pipeline.channels == inputs
    assert (pipeline.scheduler.config.variance_type == "learned_range") == learned


@pytest.mark.parametrize(
    ("inputs", "outputs", "more"),
    [(4, 2, {}), (3, 3, {"learn_sigma": True}), (3, 6, {"learn_sigma": False}), (1, 1, {"in_channels": 3}),
     (1, 1, {"out_channels": 2}), (3, 3, {"in_channels": "3"}), (3, 3, {"in_channels": True})],
)  # fmt: skip
def test_channels_that_contradict_the_flags(inputs, outputs, more, tmp_path):
    write_openai(tmp_path / "m.pt", inputs, outputs)
    with pytest.raises(ValueError, match=r"channels|learn_sigma"):
        convert_openai(tmp_path / "m.pt", FLAGS | more)


def logvar_source(folder: Any, logvar: torch.Tensor | None, **params: Any) -> list[str]:
    content = yaml.safe_load((FOLDER / "concat.yaml").read_text())
    content["model"]["params"] |= params
    (folder / "m.yaml").write_text(yaml.safe_dump(content))
    state = dict(read_tensors(FOLDER / "concat.ckpt"))
    torch.save({"state_dict": state | ({} if logvar is None else {"logvar": logvar})}, folder / "m.ckpt")
    return ["--checkpoint", str(folder / "m.ckpt"), "--config", str(folder / "m.yaml")]


@pytest.mark.parametrize(
    ("values", "params"),
    [(0.0, {}), (-1.5, {"logvar_init": -1.5}), (0.25, {"learn_logvar": False}), ("rising", {"learn_logvar": None})],
)
def test_a_logvar_that_is_not_learned(values, params, tmp_path):
    """Forks keep it as a buffer, which the class wants back; the configuration decides whether it was learned."""
    steps = yaml.safe_load((FOLDER / "concat.yaml").read_text())["model"]["params"].get("timesteps", 1000)
    logvar = torch.linspace(0, 1, steps) if values == "rising" else torch.full((steps,), values)
    source = logvar_source(tmp_path, logvar, **params)
    assert main(["convert", "--from", "compvis", *source, "--out", str(tmp_path / "folder")]) == 0
    facts = json.loads((tmp_path / "folder" / "conversion.json").read_text())["facts"]
    assert "logvar" not in facts
    assert not (tmp_path / "folder" / "logvar").exists()
    noted = values != params.get("logvar_init", 0.0)
    save_compvis(tmp_path / "folder", tmp_path / "back.ckpt", use_ema=False)
    back = torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(back["logvar"], logvar), "where the class keeps it"
    if noted:
        with pytest.warns(UserWarning, match="learn_logvar: true"):
            pipeline = load_compvis(tmp_path / "m.ckpt", tmp_path / "m.yaml")
    else:
        pipeline = load_compvis(tmp_path / "m.ckpt", tmp_path / "m.yaml")
    assert pipeline.logvar is None
    save_compvis(pipeline, tmp_path / "direct.ckpt", use_ema=False)
    assert torch.equal(torch.load(tmp_path / "direct.ckpt", weights_only=True)["state_dict"]["logvar"], logvar)


def test_a_class_outside_of_ldm_is_named(tmp_path):
    source = logvar_source(tmp_path, None)
    content = yaml.safe_load((tmp_path / "m.yaml").read_text())
    content["model"]["target"] = "my_fork.models.DDPM"
    content["model"]["params"]["unet_config"]["target"] = "guided.unet.UNetModel"
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(content))
    assert main(["convert", "--from", "compvis", *source, "--out", str(tmp_path / "folder")]) == 0
    notes = json.loads((tmp_path / "folder" / "conversion.json").read_text())["notes"]
    assert [note for note in notes if "my_fork.models.DDPM" in note]
    assert [note for note in notes if "guided.unet.UNetModel" in note]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    """A run that diverged leaves such files; their pipeline would draw nothing."""
    params = {
        "image_size": 8, "in_channels": 1, "out_channels": 1, "model_channels": 32, "attention_resolutions": [],
        "num_res_blocks": 1, "channel_mult": [1], "num_heads": 1,
    }  # fmt: skip
    weights = export_unet(translate_unet(params).build(), params)
    next(iter(weights.values())).view(-1)[0] = value
    with pytest.raises(ValueError, match=r"NaN or infinity \(1 tensors"):
        convert_unet(weights, params)

"""Initial weights from a CompVis checkpoint or a folder, their report and their errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.accelerate_state import fresh_accelerate, reset_accelerate  # noqa: F401
from helpers.conversion_cases import random_weights
from helpers.paths import TESTS
from helpers.runs import TINY, tiny_run
from torch import Tensor

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from diffusers_ddpm_ext.compvis import save_compvis
from diffusers_ddpm_ext.compvis.architecture import translate_unet
from diffusers_ddpm_ext.compvis.weights import export_unet
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.models.ema_metadata import EmaMetadata, save_ema_metadata
from diffusers_ddpm_ext.training import trainer
from diffusers_ddpm_ext.training.config.train_config import TrainConfig
from diffusers_ddpm_ext.training.factory.warm_start import fit_weight
from diffusers_ddpm_ext.training.loop.setup import Setup, build_setup

PARAMS = {
    "image_size": 8, "in_channels": 1, "out_channels": 1, "model_channels": 32, "num_res_blocks": 1,
    "attention_resolutions": [2], "channel_mult": [1, 2], "num_heads": -1, "num_head_channels": 16,
}  # fmt: skip
SIZES = ("block_out_channels", "layers_per_block", "attention_levels", "attention_head_dim", "norm_num_groups")


def config(folder: Path, params: dict[str, Any] | None = None, **options: Any) -> TrainConfig:
    """A run of a network that the original's classes have, too."""
    network = translate_unet(params or PARAMS)
    flat = {name: value for name, value in TINY.items() if name not in SIZES}
    model = {"model_config": {"_class_name": network.class_name} | network.config}
    return TrainConfig.from_flat(flat | model | {"output_dir": str(folder), "learn_logvar": True} | options)


@pytest.fixture
def original(tmp_path) -> Path:
    """A folder with raw and averaged weights and a logvar, and the same as an original checkpoint."""
    raw, average = (random_weights(translate_unet(PARAMS).build(), seed) for seed in (1, 2))
    scheduler = DDPMExtScheduler(num_train_timesteps=50, beta_schedule="linear", prediction_type="v_prediction")
    pipeline = DDPMExtPipeline(average, scheduler)
    pipeline.logvar = torch.linspace(-1, 1, 50)
    folder = tmp_path / "original"
    pipeline.save_pretrained(folder)
    raw.save_pretrained(folder / "unet", variant="raw")
    save_ema_metadata(folder, EmaMetadata(0.999, 77))
    save_compvis(folder, tmp_path / "model.ckpt")
    return folder


def built(settings: TrainConfig) -> Setup:
    """A run before its first step."""
    reset_accelerate()
    return build_setup(settings)


def weights(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("kind", ["folder", "checkpoint"])
def test_weights_average_and_logvar(kind, original, tmp_path, capsys):
    path = original if kind == "folder" else tmp_path / "model.ckpt"
    run = built(config(tmp_path / "run", ckpt_path=str(path)))
    raw = DDPMExtPipeline.from_pretrained(original, variant="raw")
    average = DDPMExtPipeline.from_pretrained(original)
    assert equal(weights(run.denoiser), weights(raw.unet))
    assert equal(run.ema.shadow, weights(average.unet))
    assert run.ema.num_updates == 77
    assert torch.equal(run.parts.objective.logvar.detach(), average.logvar)
    output = capsys.readouterr().out
    count = len(run.ema.shadow)
    assert f"{count} of {count} tensors" in output
    assert "EMA of the file, 77 updates" in output
    assert "log-variances of the file" in output


@pytest.mark.parametrize(
    ("options", "shadow", "updates"),
    [({"reset_ema": True}, "raw", 0), ({"reset_num_ema_updates": True}, "average", 0), ({}, "average", 77)],
)
def test_resets(options, shadow, updates, original, tmp_path):
    run = built(config(tmp_path / "run", ckpt_path=str(tmp_path / "model.ckpt"), **options))
    raw = DDPMExtPipeline.from_pretrained(original, variant="raw")
    average = DDPMExtPipeline.from_pretrained(original)
    assert equal(run.ema.shadow, weights((raw if shadow == "raw" else average).unet))
    assert run.ema.num_updates == updates


def test_an_average_that_the_file_lacks_starts_from_the_weights(original, tmp_path, capsys):
    """D14: there it stays at random weights."""
    save_compvis(original, tmp_path / "raw.ckpt", use_ema=False)
    run = built(config(tmp_path / "run", ckpt_path=str(tmp_path / "raw.ckpt")))
    assert equal(run.ema.shadow, weights(run.denoiser))
    assert "the file has none" in capsys.readouterr().out


def test_ignored_keys_and_the_network_alone(original, tmp_path, capsys):
    """D5, D6, D7: prefixes may overlap; what is ignored keeps its initial weights; the rest is reported."""
    path = str(tmp_path / "model.ckpt")
    plain = weights(built(config(tmp_path / "a")).denoiser)
    keys = ["model.diffusion_model.out", "model.diffusion_model.out.2", "model_ema"]
    run = built(config(tmp_path / "b", ckpt_path=path, ignore_keys=keys, load_only_unet=True))
    raw = weights(DDPMExtPipeline.from_pretrained(original, variant="raw").unet)
    own = weights(run.denoiser)
    assert torch.equal(own["conv_out.weight"], plain["conv_out.weight"])
    assert torch.equal(own["conv_in.weight"], raw["conv_in.weight"])
    assert float(run.parts.objective.logvar.detach().abs().max()) == 0
    output = capsys.readouterr().out
    assert "re-initialized: " in output
    assert "in ignore_keys" in output
    assert "--load_only_unet" in output


def test_grown_inputs_and_outputs(original, tmp_path):
    """D8: a repeated input is divided by its uses; by one more than that under the original's name."""
    wide = PARAMS | {"in_channels": 3, "out_channels": 3}
    path = str(tmp_path / "model.ckpt")
    colour = {"channels": 3, "resolution": [8, 8]}
    with pytest.raises(ConfigError, match=r"other shapes.*--make_it_fit"):
        built(config(tmp_path / "x", wide, ckpt_path=path, **colour))
    raw = export_unet(DDPMExtPipeline.from_pretrained(original, variant="raw").unet, PARAMS)
    for how, uses in (("correct", 3), ("compvis", 4)):
        run = built(config(tmp_path / how, wide, ckpt_path=path, make_it_fit=how, **colour))
        new = export_unet(run.denoiser, wide)
        assert torch.allclose(new["input_blocks.0.0.weight"], raw["input_blocks.0.0.weight"].repeat(1, 3, 1, 1) / uses)
        divided = 1 if how == "correct" else 2  # there even an unchanged number of inputs is divided
        assert torch.allclose(new["out.2.weight"], raw["out.2.weight"].repeat(3, 1, 1, 1) / divided)
        assert torch.equal(new["out.2.bias"], raw["out.2.bias"].repeat(3))
        assert torch.equal(new["middle_block.1.qkv.weight"], raw["middle_block.1.qkv.weight"])


@pytest.mark.parametrize("shape", [(6, 3), (3, 6), (4, 5), (2, 2), (3, 3)])
def test_fit_against_loops(shape):
    """Entry by entry, as the published code's loops go."""
    old = torch.arange(1.0, 10).reshape(3, 3)
    uses = [sum(1 for j in range(shape[1]) if j % 3 == column) for column in range(3)]
    for how, more in (("correct", 0), ("compvis", 1)):
        expected = [
            [float(old[i % 3, j % 3]) / (uses[j % 3] + more) for j in range(shape[1])] for i in range(shape[0])
        ]
        assert torch.allclose(fit_weight(old, shape, how), torch.tensor(expected))
    with pytest.raises(ConfigError, match="two axes"):
        fit_weight(torch.zeros(2, 2, 3), (2, 2, 1), "correct")


def test_the_order_of_heads_is_that_of_the_file(tmp_path):
    params = PARAMS | {"use_new_attention_order": True}
    network = random_weights(translate_unet(params).build())
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in export_unet(network, params).items()}
    torch.save({"state_dict": tensors}, tmp_path / "m.ckpt")
    import yaml

    unet = {"target": "openaimodel.UNetModel", "params": params}
    content = {"model": {"target": "ddpm.DDPM", "params": {"unet_config": unet, "timesteps": 50}}}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(content))
    settings = {"ckpt_path": str(tmp_path / "m.ckpt")}
    with_file = built(config(tmp_path / "a", ckpt_config=str(tmp_path / "m.yaml"), **settings))
    without = built(config(tmp_path / "b", **settings))
    assert equal(weights(with_file.denoiser), weights(network))
    assert not equal(weights(without.denoiser), weights(network))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ckpt_path": "nowhere.ckpt"}, "does not exist"),
        ({"ckpt_path": __file__}, "text file"),
        ({"ckpt_path": str(TESTS)}, "holds no weights"),
    ],
)
def test_unreadable_files_raise(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        trainer.train(config(tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_networks_that_compvis_does_not_have_raise(original, tmp_path):
    with pytest.raises(ConfigError, match="norm_num_groups"):
        built(tiny_run(tmp_path / "run", ckpt_path=str(tmp_path / "model.ckpt")))


def test_a_resumed_run_does_not_need_the_file(original, tmp_path):
    """Its own checkpoint has the weights; a new run still needs them."""
    path = tmp_path / "model.ckpt"
    options = {"ckpt_path": str(path), "resume_from_checkpoint": "auto", "checkpointing_steps": 2}
    trainer.train(config(tmp_path / "run", max_train_minutes=1e-9, **options))
    path.unlink()
    reset_accelerate()
    assert trainer.train(config(tmp_path / "run", **options)) is not None
    with pytest.raises(ConfigError, match="does not exist"):
        trainer.train(config(tmp_path / "other", **options))

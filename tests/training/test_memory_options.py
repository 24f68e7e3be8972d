"""Options that save memory: what the plan says is what is held, and checkpoints with and without them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.accelerate_state import fresh_accelerate  # noqa: F401
from helpers.runs import tiny_run, tiny_vae_run
from safetensors.torch import load_file
from torch import Tensor

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.pipelines.pipeline_ddpm_ext import DDPMExtPipeline
from diffusers_ddpm_ext.training import trainer
from diffusers_ddpm_ext.training.checkpoints.identity import check_resume
from diffusers_ddpm_ext.training.loop.batches import open_batches
from diffusers_ddpm_ext.training.loop.description import state_sizes
from diffusers_ddpm_ext.training.loop.setup import build_setup, check_sharding
from diffusers_ddpm_ext.training.loop.step import forward_backward, train_step
from diffusers_ddpm_ext.training.tracking.plan import StateSizes, describe_memory


def held(tensors: Iterable[Any]) -> int:
    """Bytes of the storages of tensors, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


CASES: dict[str, dict[str, Any]] = {
    "default": {"learn_logvar": True},
    "average in half": {"ema_dtype": "bfloat16"},
    "no average": {"use_ema": False},
    "8 bits": {"use_8bit_adam": True, "block_out_channels": [32, 64]},
}


@pytest.mark.parametrize("case", CASES)
def test_the_plan_has_the_bytes_that_are_held(case, tmp_path):
    if case == "8 bits" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    setup = build_setup(tiny_run(tmp_path, **CASES[case]))
    planned = state_sizes(setup)
    batches = open_batches(setup, 0)
    train_step(setup, 0, batches)
    forward_backward(setup, 1, 0, next(batches))
    parameters = list(setup.task.parameters())
    state = [value for slots in setup.optimizer.state.values() for value in slots.values()]
    assert planned == state_sizes(setup)
    assert planned.weights == held(parameters)
    assert planned.gradients == held(parameter.grad for parameter in parameters)
    assert planned.optimizer == held(state)
    assert planned.average == (0 if setup.ema is None else held(setup.ema.shadow.values()))
    assert planned.frozen == held(setup.task.buffers())
    everything = [*parameters, *(parameter.grad for parameter in parameters), *state, *setup.task.buffers()]
    assert planned.on_device == held([*everything, *([] if setup.ema is None else setup.ema.shadow.values())])


@pytest.mark.slow
def test_a_network_that_is_not_trained_is_counted(tmp_path):
    first_stage = trainer.train(tiny_vae_run(tmp_path / "vae", max_train_steps=1, save_model_epochs=1))
    setup = build_setup(tiny_run(tmp_path / "run", vae=str(first_stage)))
    tables = held(setup.task.buffers())
    assert state_sizes(setup).frozen == tables + held(setup.latents.stage.autoencoder.parameters())
    assert "frozen" in describe_memory(state_sizes(setup), 1)


def test_the_row_of_the_plan_adds_up():
    sizes = StateSizes(10**6, 4 * 10**6, 4 * 10**6, 8 * 10**6, 4 * 10**6, 0, is_offloaded=False)
    text = "4 MB weights + 4 MB gradients + 8 MB optimizer"
    assert describe_memory(sizes, 1) == f"{text} + 4 MB EMA = 20 MB (20 bytes per parameter), and activations"
    assert "= 20 MB, sharded over 4 processes: 5 MB each (20 bytes" in describe_memory(sizes, 4)
    away = StateSizes(10**6, 4 * 10**6, 4 * 10**6, 8 * 10**6, 4 * 10**6, 0, is_offloaded=True)
    assert describe_memory(away, 1) == (
        f"{text} = 16 MB (16 bytes per parameter), and activations; 4 MB EMA in main memory"
    )


def run(folder: Path, **options: Any) -> Path:
    defaults = {
        "max_train_steps": 2,
        "checkpointing_steps": 1,
        "validation_fraction": 0.0,
        "lr_scheduler": "constant_with_warmup",
    }
    trainer.train(tiny_run(folder, **defaults | options))
    return folder


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an average in bfloat16."""
    return run(tmp_path_factory.mktemp("runs") / "half", ema_dtype="bfloat16")


def test_checkpoint_and_pipeline_of_an_average_in_half(half):
    stored = load_file(half / "checkpoint-2" / "ema.safetensors")
    saved = DDPMExtPipeline.from_pretrained(half).unet.state_dict()
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert all(torch.equal(saved[name], tensor.float()) for name, tensor in stored.items())


def test_another_precision_is_refused(half):
    with pytest.raises(ConfigError, match=r"--ema_dtype is float32 and was bfloat16.*--allow_config_change"):
        check_resume(tiny_run(half, resume_from_checkpoint="latest", lr_scheduler="constant_with_warmup"))


@pytest.mark.slow
def test_another_precision_is_converted_if_allowed(half):
    again = {"resume_from_checkpoint": "latest", "max_train_steps": 3}
    run(half, **again, ema_dtype="float32", allow_config_change=True)
    widened = load_file(half / "checkpoint-3" / "ema.safetensors")
    assert {tensor.dtype for tensor in widened.values()} == {torch.float32}
    run(half, **again | {"max_train_steps": 4}, ema_dtype="bfloat16", allow_config_change=True)
    narrowed = load_file(half / "checkpoint-4" / "ema.safetensors")
    assert {tensor.dtype for tensor in narrowed.values()} == {torch.bfloat16}


@pytest.mark.slow
def test_where_the_average_is_kept_may_change(tmp_path, capsys):
    straight = run(tmp_path / "straight", max_train_steps=3)
    run(tmp_path / "moved", offload_ema=True)
    assert "--offload_ema has no effect on a CPU" in capsys.readouterr().err
    moved = run(tmp_path / "moved", max_train_steps=3, resume_from_checkpoint="latest")
    for name in ("ema", "model", "optimizer"):
        path = f"checkpoint-3/{name}.safetensors"
        assert (straight / path).read_bytes() == (moved / path).read_bytes()


@pytest.mark.parametrize("option", ["use_8bit_adam", "offload_ema"])
def test_what_cannot_be_sharded_is_refused(option, tmp_path):
    config = tiny_run(tmp_path, **{option: True})
    check_sharding(config, is_sharded=False)
    with pytest.raises(ConfigError, match=f"--{option} has no sharded .* leave it out"):
        check_sharding(config, is_sharded=True)

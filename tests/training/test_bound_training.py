"""Training with bounds, samplers and functions of the log-SNR: bit-exact resume, and saving."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers.runs import losses, rows, tiny_run
from safetensors.torch import load_file

from diffusers_ddpm_ext import DDPMExtPipeline
from diffusers_ddpm_ext.training.trainer import train

RUNS = {
    "second moment": {"timestep_sampler": "loss_second_moment", "num_train_timesteps": 5},
    "stratified": {"timestep_sampler": "stratified"},
    "normal": {"timestep_sampler": "log_snr_normal", "log_snr_mean": 1.0, "log_snr_std": 1.5},
    "hybrid": {"loss_type": "hybrid", "variance_type": "learned_range"},
    "bound": {"loss_type": "vlb", "variance_type": "learned"},
    "continuous": {"learn_logvar": True, "logvar_kind": "continuous", "loss_weighting": "p2", "p2_k": 2.0},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_equals_an_uninterrupted_one(name, tmp_path):
    """Stopped halfway and resumed: bit-exact weights, average and sampler history."""
    options = RUNS[name] | {"train_batch_size": 16, "max_train_steps": 8, "validation_steps": 0}
    options |= {"lr_scheduler": "constant", "lr_warmup_steps": 0, "checkpointing_steps": 4}
    straight = train(tiny_run(tmp_path / "straight", **options))
    train(tiny_run(tmp_path / "halves", **options | {"max_train_steps": 4}))
    resumed = train(tiny_run(tmp_path / "halves", **options, resume_from_checkpoint="latest"))
    assert losses(straight) == losses(resumed)
    for file in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(folder / "checkpoint-8" / file) for folder in (straight, resumed))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    if options.get("timestep_sampler") == "loss_second_moment":
        state = load_file(straight / "checkpoint-8" / "model.safetensors")
        assert int(state["timestep_sampler.counts"].sum()) > 40  # 128 losses on 5 steps that keep 10 each


def test_samplers_change_the_steps_and_not_the_noise(tmp_path):
    """The first loss of each sampler differs, since the timesteps do."""
    firsts = {
        name: losses(train(tiny_run(tmp_path / name, timestep_sampler=name, max_train_steps=1)))[0]
        for name in ("uniform", "stratified", "log_snr_normal", "log_snr_uniform")
    }
    assert len(set(firsts.values())) == 4
    second = losses(train(tiny_run(tmp_path / "cold", timestep_sampler="loss_second_moment", max_train_steps=1)))[0]
    assert second == firsts["uniform"]  # until it has seen every timestep


def test_a_continuous_logvar_is_saved_and_loaded(tmp_path):
    folder = train(tiny_run(tmp_path / "run", learn_logvar=True, logvar_kind="continuous"))
    pipeline = DDPMExtPipeline.from_pretrained(folder)
    assert pipeline.logvar_network is not None
    torch.testing.assert_close(pipeline.logvar_network.table().detach(), pipeline.logvar, rtol=0, atol=0)
    pipeline.save_pretrained(tmp_path / "again")
    again = DDPMExtPipeline.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again.logvar_network.table(), pipeline.logvar_network.table(), rtol=0, atol=0)
    assert json.loads((folder / "logvar" / "config.json").read_text())["kind"] == "continuous"
    assert (folder / "samples" / "logvar.png").is_file()
    logged = [row["logvar"] for row in rows(folder) if "logvar" in row]
    assert np.isfinite(logged).all()
    assert len(set(logged)) > 1

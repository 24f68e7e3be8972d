"""The loop of an accelerator, run on the CPU: it reads nothing between two logging intervals, and follows every rule.

Values of fake tensors do not exist, so that every way of reading one (`item`, `bool`, `tolist`, `numpy`, an output
whose shape depends on values) raises an error. What is queued for an accelerator is a fake tensor here.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.accelerate_state import fresh_accelerate, reset_accelerate  # noqa: F401
from helpers.caption_runs import caption_inputs
from helpers.latent_cases import tiny_first_stage, write_pictures
from helpers.runs import rows, tiny_run, tiny_vae_run
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from diffusers_ddpm_ext.diffusion import timesteps
from diffusers_ddpm_ext.diffusion.timesteps import make_sampler
from diffusers_ddpm_ext.training import trainer
from diffusers_ddpm_ext.training.factory import optimizer
from diffusers_ddpm_ext.training.loop import nonfinite, step, verdict
from diffusers_ddpm_ext.training.loop.batches import open_batches
from diffusers_ddpm_ext.training.loop.setup import Setup, build_setup
from diffusers_ddpm_ext.training.loop.step import train_step
from diffusers_ddpm_ext.training.loop.verdict import Verdict
from diffusers_ddpm_ext.training.tracking.step_losses import LossMeter
from diffusers_ddpm_ext.utils import host_reads

SMALLEST = {"block_out_channels": [4], "attention_levels": [], "norm_num_groups": 4}
SAMPLERS = ("uniform", "stratified", "loss_second_moment", "log_snr_normal")
RULES = ("stop", "skip", "rollback")
CONDITIONS = (
    "none", "classes", "concat", "tokens", "captions", "latents", "concat through a first stage",
    "average in bfloat16",
)  # fmt: skip


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the CPU as a device on which reads are not free."""
    monkeypatch.setattr(host_reads, "FREE", frozenset())


def condition_options(kind: str, folder: Path) -> dict[str, Any]:
    """The options of a run with a kind of conditions, whose files are written into a folder."""
    simple = {"none": {}, "classes": {"conditioning_key": "adm"}, "average in bfloat16": {"ema_dtype": "bfloat16"}}
    if kind in simple:
        return simple[kind]
    if kind == "captions":
        return caption_inputs(folder) | {"attention_levels": [0]}
    write_pictures(folder / "images", [f"{number}.png" for number in range(12)], (16, 16))
    options: dict[str, Any] = {"train_data_dir": str(folder / "images"), "validation_fraction": 0.2}
    if kind in ("concat", "tokens", "concat through a first stage"):
        column = {"tokens": "context"}.get(kind, "concat")
        (folder / "images" / ".conditions").mkdir()
        np.save(folder / "images" / ".conditions" / "tokens.npy", np.ones((3, 6), np.float32))
        cell = ".conditions/tokens.npy" if kind == "tokens" else "{}.png"
        rows = [f"{number}.png,{cell.format(number)}" for number in range(12)]
        (folder / "images" / "metadata.csv").write_text("\n".join(["file_name,condition", *rows]))
        options |= {"conditioning_key": "crossattn" if kind == "tokens" else "concat", f"{column}_column": "condition"}
    if kind == "tokens":
        options["attention_levels"] = [0]
    if "first stage" in kind or kind == "latents":
        tiny_first_stage().save_pretrained(folder / "stage")
        options |= {"vae": str(folder / "stage"), "resolution": 16, "scale_factor": 1.0}
    if "first stage" in kind:
        options["concat_through_vae"] = "sample"
    return options


def steps_without_values(setup: Setup, mode: FakeTensorMode | None = None) -> None:
    """Take a step in which no value exists, as between two logging intervals."""
    batches = list(itertools.islice(open_batches(setup, 0), setup.plan.accumulation))
    if setup.captions is not None:  # an embedding is kept once it was encoded, which reads tokens on the host
        for batch in batches:
            setup.captions.encode_conditions(batch.conditions)
    setup.task.train()
    with mode or FakeTensorMode(allow_non_fake_inputs=True):
        LossMeter().add(train_step(setup, 0, iter(batches)))


def test_a_step_reads_nothing(tmp_path, on_device):
    options = {"timestep_sampler": "loss_second_moment", "on_nonfinite": "skip", "learn_logvar": True}
    steps_without_values(build_setup(tiny_run(tmp_path / "run", **SMALLEST, **options)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONDITIONS)
def test_no_combination_reads_anything(kind, tmp_path, on_device):
    """Steps of two micro-batches, with and without log-variances, and an average of each micro-batch."""
    inputs = SMALLEST | condition_options(kind, tmp_path) | {"gradient_accumulation_steps": 2}
    for learned in (False, True):
        options = {"learn_logvar": learned, "ema_every": "micro_batch" if learned else "step"}
        reset_accelerate()
        setup = build_setup(tiny_run(tmp_path / "run", **inputs | options))
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        for sampler, rule in itertools.product(SAMPLERS, RULES):
            config = replace(setup.config, loop=replace(setup.config.loop, on_nonfinite=rule))
            trained = replace(setup.parts, sampler=make_sampler(sampler, setup.parts.objective.schedule))
            steps_without_values(replace(setup, config=config, trained=trained), mode)


@pytest.mark.slow
def test_the_autoencoder_reads_nothing(tmp_path, on_device):
    for kind in ("kl", "vq"):
        reset_accelerate()
        steps_without_values(build_setup(tiny_vae_run(tmp_path / kind, first_stage_type=kind, on_nonfinite="skip")))


@pytest.mark.parametrize(
    ("module", "options"),
    [(verdict, {"on_nonfinite": "skip"}), (timesteps, {"timestep_sampler": "loss_second_moment"}), (optimizer, {})],
)
@pytest.mark.slow
def test_a_read_would_be_noticed(module, options, tmp_path, on_device, monkeypatch):
    """Each of the three places that a CPU reads in: verdicts, the history of a learning sampler, and norms."""
    setup = build_setup(tiny_run(tmp_path / "run", **SMALLEST, **options))
    monkeypatch.setattr(module, "reads_are_free", lambda device: True)
    with pytest.raises(DataDependentOutputException):
        steps_without_values(setup)


OPTIONS = {"max_train_steps": 7, "checkpointing_steps": 3, "validation_steps": 0, "seed": 5, "logging_steps": 3}


def run_once(folder: Path, **options: Any) -> None:
    reset_accelerate()
    trainer.train(tiny_run(folder, **(OPTIONS | options)))


def break_steps(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Make a gradient of the network infinite in some steps, counted from 1."""
    real_step, real_norms, at = trainer.train_step, step.gradient_norms, {"step": 0}

    def recording(setup: Any, number: int, batches: Any) -> Any:
        at["step"] = number + 1
        return real_step(setup, number, batches)

    def norms(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
        if at["step"] in steps and len(parameters) > 1:
            parameters[0].grad[0] = float("inf")
        return real_norms(parameters)

    monkeypatch.setattr(trainer, "train_step", recording)
    monkeypatch.setattr(step, "gradient_norms", norms)


def read_each_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the host know each verdict at once, as on a CPU."""
    real = step.judge

    def judged(*arguments: Any) -> Verdict:
        late = real(*arguments)
        assert late.skipped is not None, "only the device knows"
        return Verdict(applied=not bool(late.skipped))

    monkeypatch.setattr(step, "judge", judged)


def state(folder: Path) -> dict[str, torch.Tensor]:
    files = ("model", "ema", "optimizer")
    tensors = {name: load_file(folder / "checkpoint-7" / f"{name}.safetensors") for name in files}
    return {f"{name}/{key}": value for name in files for key, value in tensors[name].items()}


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "stream"), [("skip", False), ("rollback", False), ("rollback", True)])
def test_verdicts_read_late_give_the_run_of_verdicts_read_at_once(
    rule, stream, tmp_path, monkeypatch, on_device, capsys
):
    """Two broken steps, one in the middle of a logging interval, one at its end."""
    options = {"on_nonfinite": rule, "timestep_sampler": "loss_second_moment", "num_train_timesteps": 4}
    options |= {"ddpm_num_inference_steps": 4}
    if stream:
        write_pictures(tmp_path / "images", [f"{number}.png" for number in range(30)], (8, 8))
        options |= {"train_data_dir": str(tmp_path / "images"), "streaming": True, "shuffle_buffer": 7}
        options |= {"validation_examples": 4}
    messages = []
    for folder in ("late", "at once"):
        with monkeypatch.context() as patch:
            break_steps(patch, 2, 6)
            if folder == "at once":
                read_each_verdict(patch)
            run_once(tmp_path / folder, **options)
        messages.append([line.split(", see")[0] for line in capsys.readouterr().err.splitlines() if "non" in line])
    assert messages[0] == messages[1]
    assert len(messages[0]) == 2
    late, once = state(tmp_path / "late"), state(tmp_path / "at once")
    assert late.keys() == once.keys()
    assert all(torch.equal(late[name], once[name]) for name in late)
    assert rows(tmp_path / "late") == rows(tmp_path / "at once")
    assert sorted(p.name for p in (tmp_path / "late" / "crash").iterdir()) == ["step-2", "step-6"]
    numbers = [(tmp_path / folder / "checkpoint-7" / "state.json").read_text() for folder in ("late", "at once")]
    assert numbers[0].split('"progress"')[0] == numbers[1].split('"progress"')[0]


@pytest.mark.slow
def test_skips_in_a_row_end_the_run_though_they_are_read_late(tmp_path, monkeypatch, on_device):
    monkeypatch.setattr(nonfinite, "MAX_SKIPS_IN_A_ROW", 1)
    break_steps(monkeypatch, 4, 5)
    with pytest.raises(Exception, match="1 before it in a row"):
        run_once(tmp_path / "run", on_nonfinite="skip")


@pytest.mark.slow
def test_the_draws_of_a_device_are_the_same_for_every_split(tmp_path, on_device):
    """1 x 8 against 4 micro-batches of 2: the same losses up to the order of additions."""
    losses = []
    for batch, accumulation in ((8, 1), (2, 4)):
        options = {"train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_train_steps": 3}
        run_once(tmp_path / str(batch), **options, timestep_sampler="stratified")
        losses.append([row["train/loss"] for row in rows(tmp_path / str(batch)) if "train/loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) == 3

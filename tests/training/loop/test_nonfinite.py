"""Non-finite losses and gradients: the rules of ``--on_nonfinite``, the message, and the folder of the event."""

from __future__ import annotations

import csv
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.accelerate_state import fresh_accelerate, reset_accelerate  # noqa: F401
from helpers.runs import rows, tiny_run
from safetensors.torch import load_file

from diffusers_ddpm_ext.errors import RunError
from diffusers_ddpm_ext.training import trainer
from diffusers_ddpm_ext.training.config.train_config import parse_train_args
from diffusers_ddpm_ext.training.factory.task import DenoisingTask
from diffusers_ddpm_ext.training.loop import nonfinite, step
from diffusers_ddpm_ext.training.loop.verdict import Verdict

OPTIONS = {"max_train_steps": 7, "checkpointing_steps": 3, "validation_steps": 0, "seed": 5, "logging_steps": 2}


def run_once(folder: Path, **options: Any) -> None:
    reset_accelerate()
    trainer.train(tiny_run(folder, **(OPTIONS | options)))


def break_steps(monkeypatch: pytest.MonkeyPatch, *steps: int, where: str = "loss") -> None:
    """Make the loss of the third sample, or a gradient of the network, non-finite in some steps."""
    real_step, real_forward, real_norms = trainer.train_step, DenoisingTask.forward, step.gradient_norms
    at = {"step": 0}

    def recording(setup: Any, number: int, batches: Any) -> Any:
        at["step"] = number + 1
        return real_step(setup, number, batches)

    def forward(task: DenoisingTask, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> Any:
        if where == "loss" and at["step"] in steps and task.training:
            x0 = x0.clone()
            x0[2] = math.nan
        return real_forward(task, x0, noise, t)

    def norms(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
        if where == "gradient" and at["step"] in steps and len(parameters) > 1:
            parameters[0].grad[0] = math.inf
        return real_norms(parameters)

    monkeypatch.setattr(trainer, "train_step", recording)
    monkeypatch.setattr(DenoisingTask, "forward", forward)
    monkeypatch.setattr(step, "gradient_norms", norms)


def weights(folder: Path, number: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint-{number}" / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_stop_keeps_the_older_checkpoint_and_reports_the_step(where, tmp_path, monkeypatch):
    break_steps(monkeypatch, 5, where=where)
    with pytest.raises(RunError, match=r"step 5: the (loss|gradient) was n") as error:
        run_once(tmp_path / "run")
    assert "--learning_rate" in str(error.value)
    assert "\n" not in str(error.value)
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4]
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "run", 3).values())


def test_the_crash_folder_lists_samples_and_gradients(tmp_path, monkeypatch):
    break_steps(monkeypatch, 2)
    with pytest.raises(RunError, match="crash/step-2"):
        run_once(tmp_path / "run", train_batch_size=4, gradient_accumulation_steps=2)
    folder = tmp_path / "run" / "crash" / "step-2"
    with (folder / "samples.csv").open() as file:
        samples = list(csv.DictReader(file))
    assert len(samples) == 8
    # Two micro-batches of four: the third sample of each is broken.
    assert [place for place, row in enumerate(samples) if not math.isfinite(float(row["loss"]))] == [2, 6]
    assert all(0 <= int(row["timestep"]) < 50 and 0 <= int(row["image"]) < 1617 for row in samples)
    with (folder / "gradients.csv").open() as file:
        modules = {row["module"]: row["norm_before_clipping"] for row in csv.DictReader(file)}
    assert {"conv_in", "down_blocks.0.resnets.0.conv1", "conv_out"} <= modules.keys()
    assert math.isnan(float(modules["conv_out"]))
    event = json.loads((folder / "event.json").read_text())
    assert event["step"] == 2
    assert event["format"] == 1
    assert parse_train_args(["--config", str(folder / "config.yaml")]).loop.seed == 5
    assert (folder / "inputs.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_skip_skips_the_step(where, tmp_path, monkeypatch, capsys):
    """Against a run whose optimizer and average simply do not move in that step."""
    with monkeypatch.context() as patch:
        break_steps(patch, 5, where=where)
        run_once(tmp_path / "run", on_nonfinite="skip")
    assert "--on_nonfinite skip" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        count = itertools.count(1)
        patch.setattr(step, "judge", lambda *_: Verdict(applied=next(count) != 5))
        run_once(tmp_path / "expected", on_nonfinite="skip")
    assert same(weights(tmp_path / "run", 7), weights(tmp_path / "expected", 7))
    assert not same(weights(tmp_path / "run", 7), weights(tmp_path / "run", 6))
    ours = rows(tmp_path / "run")
    assert [row["step"] for row in ours] == [1, 2, 3, 4, 5, 6, 7, 7], "one row per step, and the last validation's"
    assert ours[4].keys() == {"step", "train/skipped", "lr"}
    assert ours[4]["lr"] > ours[5]["lr"], "the learning rate advances"


def test_skip_changes_nothing_while_losses_are_finite(tmp_path):
    run_once(tmp_path / "stop")
    run_once(tmp_path / "skip", on_nonfinite="skip")
    assert same(weights(tmp_path / "stop", 7), weights(tmp_path / "skip", 7))


def test_skipping_ends_at_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(nonfinite, "MAX_SKIPS_IN_A_ROW", 2)
    break_steps(monkeypatch, 3, 4, 5, 6)
    with pytest.raises(RunError, match="2 before it in a row"):
        run_once(tmp_path / "run", on_nonfinite="skip")


def test_rollback_loads_the_checkpoint_and_continues_with_the_next_batch(tmp_path, monkeypatch, capsys):
    """Steps 4 and 5 are undone: step 6 starts from the weights after step 3."""
    seen: dict[int, list[torch.Tensor]] = {}
    real = trainer.train_step

    def recording(setup: Any, number: int, batches: Any) -> Any:
        weights = [p.detach().clone() for p in setup.network_parameters]
        seen[number + 1] = weights + [s.clone() for s in setup.ema.shadow.values()]
        return real(setup, number, batches)

    monkeypatch.setattr(trainer, "train_step", recording)
    break_steps(monkeypatch, 5)
    run_once(tmp_path / "run", on_nonfinite="rollback", checkpointing_steps=3)
    assert "checkpoint-3 again, the next batch is step 6's" in capsys.readouterr().err
    assert all(torch.equal(a, b) for a, b in zip(seen[6], seen[4], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[5], seen[4], strict=True))
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6, 7, 7]


def test_rollback_before_the_first_checkpoint_goes_back_to_the_start(tmp_path, monkeypatch, capsys):
    break_steps(monkeypatch, 2)
    run_once(tmp_path / "run", on_nonfinite="rollback")
    assert "checkpoint-0 again" in capsys.readouterr().err


def test_rollback_ends_at_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(nonfinite, "MAX_ROLLBACKS_TO_A_CHECKPOINT", 2)
    break_steps(monkeypatch, 4, 5, 6)
    with pytest.raises(RunError, match="2 before it to the same checkpoint"):
        run_once(tmp_path / "run", on_nonfinite="rollback")


@pytest.mark.parametrize("rule", ["skip", "rollback"])
@pytest.mark.parametrize("killed_at", [5, 6])
def test_a_run_that_recovered_resumes_bit_exactly(rule, killed_at, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        break_steps(patch, 5)
        run_once(tmp_path / "straight", on_nonfinite=rule)
    count = itertools.count(1)
    with monkeypatch.context() as patch:
        break_steps(patch, 5)
        real = trainer.train_step

        def killed(*arguments: Any) -> Any:
            if next(count) == killed_at + 1:
                raise KeyboardInterrupt
            return real(*arguments)

        patch.setattr(trainer, "train_step", killed)
        with pytest.raises(KeyboardInterrupt):
            run_once(tmp_path / "run", on_nonfinite=rule)
    with monkeypatch.context() as patch:
        break_steps(patch, 5)
        run_once(tmp_path / "run", on_nonfinite=rule, resume_from_checkpoint="latest")
    assert same(weights(tmp_path / "run", 7), weights(tmp_path / "straight", 7))
    assert rows(tmp_path / "run") == rows(tmp_path / "straight")

"""Bit-exact resume: an interrupted run against the uninterrupted run, byte for byte."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.accelerate_state import fresh_accelerate, reset_accelerate  # noqa: F401
from helpers.runs import rows, tiny_run

from diffusers_ddpm_ext import DDPMExtPipeline
from diffusers_ddpm_ext.errors import ConfigError, RunError
from diffusers_ddpm_ext.training import trainer
from diffusers_ddpm_ext.training.checkpoints.folders import checkpoint_step, list_checkpoints
from diffusers_ddpm_ext.training.checkpoints.manifest import verify
from diffusers_ddpm_ext.training.checkpoints.writer import CheckpointNotWritten
from diffusers_ddpm_ext.training.loop import previews, saving, tasks, workload
from diffusers_ddpm_ext.utils.folder_lock import FolderLock

EVERY = {"checkpointing_steps": 2, "max_train_steps": 7, "validation_steps": 3, "save_images_steps": 4, "seed": 5}
RUNS = itertools.count()


class Killed(BaseException):
    """Stands for `kill -9`: no code runs between here and the next start of the same command."""


def run_once(folder: Path, **options: Any) -> Path | None:
    """One start of the same command."""
    reset_accelerate()
    return trainer.train(tiny_run(folder, **(EVERY | {"resume_from_checkpoint": "auto"} | options)))


def kill_at_call(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, before: bool = True) -> None:
    """End the run at the n-th call of a function."""
    real, count = getattr(owner, name), itertools.count(1)

    def last(*arguments: Any, **named: Any) -> Any:
        if next(count) < call:
            return real(*arguments, **named)
        if not before:
            real(*arguments, **named)
        raise Killed

    monkeypatch.setattr(owner, name, last)


def run_until_killed(folder: Path, owner: Any, name: str, call: int, before: bool = True, **options: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        kill_at_call(patch, owner, name, call, before)
        with pytest.raises(Killed):
            run_once(folder, **options)


def contents(folder: Path) -> dict[str, bytes]:
    """Files of a run that must not depend on how often it was interrupted."""
    names = ["metrics.jsonl", "finished.json", "samples.png"]
    paths = [*(folder / name for name in names), *folder.rglob("*.safetensors"), *folder.glob("samples/*.png")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def assert_same(interrupted_run: Path, straight: Path) -> None:
    ours, theirs = contents(interrupted_run), contents(straight)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    run_once(folder)
    return folder


def test_the_uninterrupted_run_is_complete(straight: Path):
    steps = [row["step"] for row in rows(straight) if "train/loss" in row]
    assert steps == list(range(1, 8))
    assert [row["step"] for row in rows(straight) if "val/loss" in row] == [3, 6, 7]
    assert json.loads((straight / "finished.json").read_text())["step"] == 7


MOMENTS: dict[str, tuple[Any, str, int, bool]] = {
    "before any checkpoint": (trainer, "train_step", 2, True),
    "between checkpoints": (trainer, "train_step", 6, True),
    "while a checkpoint is written": (saving.snapshots, "write_snapshot", 2, True),
    "just after a checkpoint": (trainer, "save_checkpoint", 2, False),
    "before the old checkpoint goes": (saving, "delete_old_checkpoints", 2, True),
    "in a validation": (workload, "validation_metrics", 2, True),
    "between validation and its row": (workload, "validation_metrics", 1, False),
    "while images are drawn": (previews, "make_preview", 2, True),
    "while the best is written": (saving, "_write_best", 1, True),
    "while the best of all is written": (saving, "_write_best", 3, True),  # each of the three is better
    "just before the best of all is written": (tasks, "save_best_pipeline", 3, True),
    "at the end, before the pipeline": (workload, "save_pipeline", 1, True),
    "at the end, while the last images are drawn": (previews, "draw_final_samples", 1, True),
    "just before the end is noted": (trainer, "mark_finished", 1, True),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at(moment, straight, tmp_path):
    owner, name, call, before = MOMENTS[moment]
    folder = tmp_path / "run"
    run_until_killed(folder, owner, name, call, before)
    run_once(folder)
    assert_same(folder, straight)


def test_killed_again_and_again(straight, tmp_path):
    folder = tmp_path / "run"
    for call in (3, 2, 2, 1, 3):
        run_until_killed(folder, trainer, "train_step", call)
    run_once(folder)
    assert_same(folder, straight)


SPECIAL = [
    {"snr_gamma": 5.0, "random_flip": True, "dropout": 0.1, "original_elbo_weight": 0.001},
    {"lr_scheduler": "polynomial", "use_ema": False},
    {
        "lr_scheduler": "LambdaLinearScheduler",
        "lr_warmup_steps": 0,
        "lr_scheduler_args": {
            "warm_up_steps": [2], "f_start": [0.1], "f_max": [1.0], "f_min": [0.1], "cycle_lengths": [5],
        },
    },
    {"train_batch_size": 700, "random_flip": True},  # a step is half an epoch
    {"gradient_accumulation_steps": 2, "dataloader_num_workers": 1, "ema_every": "micro_batch"},
    {"ema_dtype": "bfloat16", "offload_ema": True, "ema_use_num_updates": False},
]  # fmt: skip


@pytest.mark.parametrize("options", SPECIAL, ids=lambda options: "-".join(map(str, options.values()))[:40])
def test_every_option_resumes(options, tmp_path):
    options = {"max_train_steps": 4, "save_images_steps": None} | options
    run_once(tmp_path / "straight", **options)
    run_until_killed(tmp_path / "run", trainer, "train_step", 4, **options)
    run_once(tmp_path / "run", **options)
    assert_same(tmp_path / "run", tmp_path / "straight")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("place", ["train_step", "validation_metrics", "make_preview"])
def test_a_signal_writes_a_checkpoint_and_stops(number, status, place, straight, tmp_path, monkeypatch, capsys):
    owner = {"train_step": trainer, "validation_metrics": workload, "make_preview": previews}[place]
    real, count = getattr(owner, place), itertools.count(1)

    def interrupted(*arguments: Any) -> Any:
        if next(count) == 2:
            os.kill(os.getpid(), number)
        return real(*arguments)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(owner, place, interrupted)
        with pytest.raises(SystemExit) as stopped:
            run_once(folder)
    assert stopped.value.code == status
    assert "--resume_from_checkpoint latest" in capsys.readouterr().out
    assert list_checkpoints(folder)
    run_once(folder, resume_from_checkpoint="latest")
    extra = {checkpoint_step(path) for path in list_checkpoints(folder)} - {
        checkpoint_step(path) for path in list_checkpoints(straight)
    }
    for step in extra:  # the one that the signal requested
        for path in sorted((folder / f"checkpoint-{step}").iterdir()):
            path.unlink()
        (folder / f"checkpoint-{step}").rmdir()
    assert_same(folder, straight)


def test_usr1_writes_a_checkpoint_and_continues(straight, tmp_path, monkeypatch):
    real, count = trainer.train_step, itertools.count(1)

    def asking(*arguments: Any) -> Any:
        if next(count) == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(*arguments)

    monkeypatch.setattr(trainer, "train_step", asking)
    run_once(tmp_path / "run", checkpoints_total_limit=9)
    assert (tmp_path / "run" / "checkpoint-1").is_dir()
    assert rows(tmp_path / "run") == rows(straight)


def test_the_time_limit_writes_a_checkpoint_and_stops(straight, tmp_path, capsys):
    folder = tmp_path / "run"
    assert run_once(folder, max_train_minutes=1e-9) == folder
    assert "--max_train_minutes" in capsys.readouterr().out
    assert [checkpoint_step(path) for path in list_checkpoints(folder)] == [1]
    assert not (folder / "model_index.json").exists()
    run_once(folder)
    assert rows(folder) == rows(straight)


def test_a_finished_run_is_reported(straight, tmp_path, capsys):
    before = contents(straight)
    assert run_once(straight) == straight
    assert "is finished" in capsys.readouterr().out
    assert contents(straight) == before


def test_the_newest_intact_checkpoint_is_used_and_the_damaged_one_set_aside(straight, tmp_path, capsys):
    folder = tmp_path / "run"
    run_until_killed(folder, trainer, "train_step", 6)
    newest = folder / "checkpoint-4" / "optimizer.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    run_once(folder)
    errors = capsys.readouterr().err
    assert "optimizer.safetensors" in errors
    assert "aside-checkpoint-4" in errors
    assert (folder / "aside-checkpoint-4" / "optimizer.safetensors").read_bytes() == data
    assert rows(folder) == rows(straight)


def test_resuming_from_an_older_checkpoint_sets_the_newer_aside(straight, tmp_path):
    folder = tmp_path / "run"
    run_until_killed(folder, trainer, "train_step", 7, checkpoints_total_limit=9)
    run_once(folder, resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert (folder / "aside-checkpoint-4").is_dir()
    assert rows(folder) == rows(straight)


def test_total_limit_keeps_the_newest_and_the_best(tmp_path):
    folder = tmp_path / "run"
    run_once(folder, checkpoints_total_limit=1, checkpointing_steps=1)
    best = json.loads((folder / "best" / "monitor.json").read_text())["step"]
    assert {checkpoint_step(path) for path in list_checkpoints(folder)} == {7, best}
    for path in list_checkpoints(folder):
        verify(path)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("seed", 6),
        ("train_batch_size", 16),
        ("beta_end", 0.03),
        ("layers_per_block", 2),
        ("learning_rate", 1e-3),
        ("random_flip", True),
        ("max_train_steps", 9),  # its cosine has another end
        ("validation_fraction", 0.2),  # other images to train on
    ],
)
def test_options_that_would_change_the_results_are_refused(option, value, tmp_path):
    folder = tmp_path / "run"
    run_until_killed(folder, trainer, "train_step", 4)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    named = "images" if option == "validation_fraction" else option.replace("train_batch_size", "effective_batch")
    with pytest.raises(ConfigError, match=named):
        run_once(folder, **{option: value})
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_options_that_change_no_result_are_accepted(straight, tmp_path):
    folder = tmp_path / "run"
    run_until_killed(folder, trainer, "train_step", 4)
    run_once(folder, logging_steps=1, checkpointing_steps=3, train_batch_size=4, gradient_accumulation_steps=2)
    ours, theirs = rows(folder), rows(straight)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    assert ours[-2]["train/loss"] == pytest.approx(theirs[-2]["train/loss"], rel=1e-3)


def test_allow_config_change(tmp_path):
    folder = tmp_path / "run"
    run_until_killed(folder, trainer, "train_step", 4)
    run_once(folder, learning_rate=1e-3, allow_config_change=True)
    rates = {row["step"]: row["lr"] for row in rows(folder) if "lr" in row}
    assert rates[3] == pytest.approx(2e-3)  # the peak of the first start; its validation at step 3 left a checkpoint
    assert 0 < rates[4] <= 1e-3


@pytest.mark.parametrize("requested", ["latest", "best"])
def test_resuming_without_a_checkpoint_is_refused(requested, tmp_path):
    with pytest.raises(ConfigError, match=requested):
        run_once(tmp_path / "run", resume_from_checkpoint=requested)


def test_best_is_the_best_validation_and_loads(straight):
    values = {row["step"]: row["val/loss_simple_ema"] for row in rows(straight) if "val/loss" in row}
    facts = json.loads((straight / "best" / "monitor.json").read_text())
    assert facts["step"] == min(values, key=values.get)
    assert facts["value"] == min(values.values())
    assert DDPMExtPipeline.from_pretrained(straight / "best").unet is not None


def planted(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Replace the validation metric by a function of the step."""

    def planted_metrics(setup: Any, processes: Any) -> dict[str, float]:
        return {"val/loss_simple_ema": values[setup.lr_scheduler.last_epoch - 1]}  # optimizer steps done

    monkeypatch.setattr(workload, "validation_metrics", planted_metrics)


@pytest.mark.parametrize("killed_at", [None, 3, 5])
def test_early_stop_at_the_right_step_and_the_planted_minimum(killed_at, tmp_path, monkeypatch, capsys):
    planted(monkeypatch, [5.0, 4.0, 4.5, 1.0, 2.0, 3.0, 0.5, 0.4, 0.3])
    options = {"validation_steps": 1, "early_stopping_patience": 2, "max_train_steps": 9, "save_images_steps": None}
    folder = tmp_path / "run"
    if killed_at is not None:
        run_until_killed(folder, trainer, "train_step", killed_at, **options)
    run_once(folder, **options)
    assert "stopping early" in capsys.readouterr().out
    assert max(row["step"] for row in rows(folder)) == 6
    assert json.loads((folder / "best" / "monitor.json").read_text())["step"] == 4
    assert (folder / "model_index.json").is_file()
    run_once(folder, **options)
    assert "is finished" in capsys.readouterr().out


def test_unknown_metric_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="val/loss_simple_ema"):
        run_once(tmp_path / "run", monitor="val/fid")
    assert not (tmp_path / "run").exists()


def test_a_second_run_is_refused(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with FolderLock(folder), pytest.raises(ConfigError, match=str(os.getpid())):
        run_once(folder)


def test_a_full_disk_costs_checkpoints_not_the_run(straight, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    real: Callable[..., Path] = saving.write_checkpoint

    def refusing(parent: Path, step: int, *rest: Any) -> Path:
        if step in (2, 4):
            raise CheckpointNotWritten(errno.ENOSPC, f"{parent}/checkpoint-{step} could not be written")
        return real(parent, step, *rest)

    monkeypatch.setattr(saving, "write_checkpoint", refusing)
    run_once(folder)
    assert capsys.readouterr().err.count("could not be written") == 2
    assert rows(folder) == rows(straight)


@pytest.mark.parametrize("mended", [True, False])
def test_a_file_size_limit_of_the_system(mended, straight, tmp_path, monkeypatch, capsys):
    """A real limit, from step 3 on: nothing above 100 kB can be written, as on a disk that is almost full."""
    folder, unlimited = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    real = trainer.train_step

    def limited(setup: Any, step: int, batches: Any) -> Any:
        if step in (2, 6):
            limit = 100_000 if step == 2 or not mended else unlimited[0]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
        return real(setup, step, batches)

    monkeypatch.setattr(trainer, "train_step", limited)
    try:
        if mended:
            run_once(folder)
        else:
            with pytest.raises(RunError, match="File too large"):
                run_once(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    errors = capsys.readouterr().err
    assert "checkpoint-4 could not be written (File too large)" in errors
    verify(folder / "checkpoint-2")
    if mended:
        assert rows(folder) == rows(straight)
    else:
        assert not (folder / "model_index.json").exists()
        monkeypatch.undo()
        run_once(folder, resume_from_checkpoint="latest")
        assert_same(folder, straight)


def test_a_final_pipeline_that_cannot_be_saved_is_an_error(tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(workload, "save_pipeline", full)
        with pytest.raises(RunError, match="No space left"):
            run_once(folder)
    run_once(folder)
    assert (folder / "model_index.json").is_file()

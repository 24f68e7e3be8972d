"""Number of CPU threads: who may choose it, the search for the fastest, and what a measurement must not change."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.accelerate_state import reset_accelerate
from helpers.runs import tiny_run

from diffusers_ddpm_ext.training import signals, threads, trainer
from diffusers_ddpm_ext.training.loop import threads as loop_threads
from diffusers_ddpm_ext.training.loop.run import RunProgress
from diffusers_ddpm_ext.training.loop.setup import Setup, build_setup
from diffusers_ddpm_ext.training.threads import candidates, fastest

NOBODY = (b"accelerate\0launch\0train.py\0", b"HOME=/root\0MY_OMP_NUM_THREADS=1\0")
ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}


@pytest.fixture(autouse=True)
def thread_state(monkeypatch: pytest.MonkeyPatch):
    """No variable of the machine that runs the tests has a say, and their number of threads is restored."""
    present = torch.get_num_threads()
    for name in (*threads.THREADS_VARIABLES, "LOCAL_WORLD_SIZE", *signals.LAUNCHER_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    yield
    torch.set_num_threads(present)


@pytest.mark.parametrize(
    ("environment", "start", "user", "undone"),
    [
        ({}, None, None, None),
        ({"OMP_NUM_THREADS": ""}, None, None, None),
        ({"OMP_NUM_THREADS": "1"}, NOBODY, "OMP_NUM_THREADS", None),  # no launcher
        ({"MKL_NUM_THREADS": "2"}, NOBODY, "MKL_NUM_THREADS", None),
        (ACCELERATE | {"OMP_NUM_THREADS": "1"}, NOBODY, None, 8),
        (ACCELERATE | {"OMP_NUM_THREADS": "4"}, NOBODY, None, None),  # `accelerate launch --cpu` counts cores
        (ACCELERATE | {"OMP_NUM_THREADS": "1"}, None, None, 8),  # the system hides how the launcher was started
        (ACCELERATE | {"OMP_NUM_THREADS": "3"}, None, "OMP_NUM_THREADS", None),
        (ACCELERATE | {"OMP_NUM_THREADS": "1"}, (b"", b"OMP_NUM_THREADS=1\0HOME=/\0"), "OMP_NUM_THREADS", None),
        (ACCELERATE | {"OMP_NUM_THREADS": "1"}, (b"launch\0--num_cpu_threads_per_process\0001\0", b""),
         "OMP_NUM_THREADS", None),
        (ACCELERATE | {"OMP_NUM_THREADS": "1"}, (b"launch\0--num-cpu-threads-per-process=1\0", b""),
         "OMP_NUM_THREADS", None),
        (TORCHRUN | {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}, NOBODY, None, 4),
        (TORCHRUN | {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "16"}, NOBODY, None, 1),
    ],
)  # fmt: skip
def test_the_users_choice_is_told_from_the_launchers(monkeypatch, environment, start, user, undone):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    used: list[int] = []
    monkeypatch.setattr(threads, "cores", lambda: 8)
    monkeypatch.setattr(threads, "launcher_start", lambda: start)
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    assert threads.users_variable() == user
    threads.use_all_cores()
    assert used == ([] if undone is None else [undone])


def test_what_started_this_process_is_read():
    command, variables = threads.launcher_start() or pytest.skip("no /proc")
    assert command.split(b"\0")[0]
    assert b"PATH=" in variables


@pytest.mark.parametrize(("most", "expected"), [(1, [1]), (2, [2, 1]), (6, [6, 4, 2, 1]), (8, [8, 4, 2, 1])])
def test_candidates(most, expected):
    assert candidates(most) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({4: 1.0, 2: 1.9, 1: 3.8}, 4),
        ({4: 2.0, 2: 1.0, 1: 1.4}, 2),
        ({4: 5.0, 2: 2.0, 1: 1.0}, 1),
        ({4: 1.0, 2: 1.02, 1: 1.4}, 2),  # nearly equal: the other cores stay free
        ({4: 1.0, 2: 1.04, 1: 1.4}, 4),
    ],
)
def test_the_fastest_number_is_found(seconds, expected):
    assert fastest([4, 2, 1], seconds.__getitem__, lambda: True) == expected
    assert fastest([4, 2, 1], seconds.__getitem__, lambda: False) == expected


def test_one_slow_turn_does_not_decide():
    """Another program takes the cores during the first turn of the faster number."""
    turns = {2: iter([1.2, 0.6, 0.6]), 1: iter([1.0, 1.0, 1.0])}
    assert fastest([2, 1], lambda count: next(turns[count]), lambda: True) == 2


def test_what_is_hopeless_is_not_measured():
    measured: list[int] = []

    def measure(count: int) -> float:
        measured.append(count)
        return 64 / count

    assert fastest(candidates(64), measure, lambda: True) == 64
    assert set(measured) == {64, 32}


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    reset_accelerate()
    yield build_setup(tiny_run(tmp_path_factory.mktemp("run"), max_train_steps=10_000, dropout=0.1))
    reset_accelerate()


def settled(monkeypatch, setup: Setup, progress: RunProgress, fast: int = 2) -> tuple[int, str]:
    """Number and reason on two cores, of which ``fast`` threads are the fastest."""
    monkeypatch.setattr(loop_threads, "cores_per_process", lambda: 2)
    real = loop_threads._seconds_of

    def seconds_of(*args):
        real(*args)
        return 0.04 if torch.get_num_threads() == fast else 0.06

    monkeypatch.setattr(loop_threads, "_seconds_of", seconds_of)
    choice = loop_threads.settle_threads(setup, progress)
    assert choice.count == torch.get_num_threads()
    assert progress.threads == {"count": choice.count, "cores": 2}
    return choice.count, choice.reason


@pytest.mark.parametrize("fast", [1, 2])
def test_a_measurement_changes_nothing_but_the_number(monkeypatch, setup, fast):
    torch.manual_seed(3)
    expected = torch.rand(1)
    weights = [parameter.clone() for parameter in setup.task.parameters()]
    torch.manual_seed(3)
    count, reason = settled(monkeypatch, setup, RunProgress(), fast)
    assert count == fast
    assert f"the fastest of 1, 2; --num_threads {fast}" in reason
    assert torch.equal(torch.rand(1), expected)
    assert all(parameter.grad is None for parameter in setup.task.parameters())
    assert all(map(torch.equal, setup.task.parameters(), weights))
    assert not setup.optimizer.state


@pytest.mark.parametrize(
    ("saved", "variable", "options", "expected"),
    [
        (None, "1", {}, (1, "OMP_NUM_THREADS")),
        (None, None, {"num_threads": 1}, (1, "--num_threads")),
        (None, None, {"max_train_steps": 20}, (1, "the run is too short to measure others")),
        ({}, None, {}, (1, "as in the version that wrote the checkpoint")),
        ({"count": 2, "cores": 2}, None, {}, (2, "as in the checkpoint")),
        ({"count": 3, "cores": 2}, None, {}, (3, "as in the checkpoint")),  # of a run with --num_threads 3
        ({"count": 1, "cores": 8}, None, {}, (2, "the checkpoint was written with 1, so the last bits will differ")),
        ({"count": 2, "cores": 2}, "1", {}, (1, "OMP_NUM_THREADS; the checkpoint was written with 2")),
        ({"count": 1, "cores": 2}, "1", {}, (1, "OMP_NUM_THREADS")),
    ],
)
def test_who_decides(monkeypatch, setup, saved, variable, options, expected):
    torch.set_num_threads(1)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    loop = replace(setup.config.loop, **options)
    plan = replace(setup.plan, steps=loop.max_train_steps)
    changed = replace(setup, config=replace(setup.config, loop=loop), plan=plan)
    count, reason = settled(monkeypatch, changed, RunProgress(threads=saved))
    assert (count, expected[1] in reason) == (expected[0], True), reason
    assert saved is None or "written with" not in reason or saved["count"] != count


def test_a_resumed_run_has_the_threads_of_its_checkpoint(monkeypatch, tmp_path: Path, capsys):
    """Resumed without an option, also where another number would be faster by now; its record says so."""
    options = {
        "max_train_steps": 2,
        "checkpointing_steps": 1,
        "validation_steps": 0,
        "lr_scheduler": "constant_with_warmup",
    }
    monkeypatch.setattr(loop_threads, "cores_per_process", lambda: 3)
    reset_accelerate()
    trainer.train(tiny_run(tmp_path, **options, num_threads=2))
    assert "threads        2 on 3 cores (--num_threads)" in capsys.readouterr().out
    torch.set_num_threads(1)
    reset_accelerate()
    again = options | {"max_train_steps": 3, "resume_from_checkpoint": "latest"}
    trainer.train(tiny_run(tmp_path, **again))
    assert "threads        2 on 3 cores (as in the checkpoint)" in capsys.readouterr().out
    assert json.loads((tmp_path / "environment.json").read_text())["num_threads"] == 2
    state = json.loads((tmp_path / "checkpoint-3" / "state.json").read_text())
    assert state["progress"]["records"]["threads"] == {"count": 2, "cores": 3}

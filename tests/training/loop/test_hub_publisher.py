"""A training run on the Hub: pushed during training and at the end, despite failures, and resumed elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.hub_server import Fault, LoopbackHub, Repo
from helpers.paths import TESTS
from helpers.runs import rows, tiny_flags
from helpers.tiny import tiny_unet

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, cli

TOKEN = "hf_secretsecretsecret"
SMALL = {
    "max_train_steps": 6,
    "save_model_epochs": 1,
    "train_batch_size": 800,
    "checkpointing_steps": 2,
    "validation_steps": 3,
}


@pytest.fixture
def hub():
    with LoopbackHub({TOKEN: "write"}) as server:
        yield server


@pytest.fixture
def call(hub, tmp_path):
    def run(*argv: str, token: str | None = TOKEN, **more: str) -> subprocess.CompletedProcess:
        environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
        environment |= hub.environment(str(tmp_path / "home"), token) | {"PYTHONPATH": str(TESTS.parent)} | more
        command = [sys.executable, "-m", "diffusers_ddpm_ext", *argv]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
        )
        assert TOKEN not in done.stdout + done.stderr
        return done

    return run


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "unet").iterdir()}


def test_a_run_is_pushed_and_its_token_is_in_no_file(call, hub, tmp_path):
    flags = tiny_flags(
        **SMALL,
        output_dir="run",
        push_to_hub=True,
        hub_token=TOKEN,
        hub_strategy="every_save",
        report_to="tensorboard",
    )
    done = call("train", *flags, token=None)
    assert done.returncode == 0, done.stderr
    assert "ddpm-ext verify alice/run" in done.stdout
    messages = [commit.message for commit in hub.repos["alice/run"].commits]
    assert messages[-1] == "Upload by ddpm-ext"
    assert any(message.startswith("Step ") for message in messages), messages
    files = hub.files("alice/run")
    assert {"model_index.json", "config.yaml", "metrics.jsonl", "environment.json", "samples.png", "README.md"} <= set(
        files
    )
    assert not [name for name in files if name.startswith((".", "checkpoint", "logs", "best"))]
    assert [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()] == []
    assert not [name for name, content in files.items() if TOKEN.encode() in content]
    assert not list((tmp_path / "run").glob(".pushing*"))
    assert call("verify", "alice/run", "--folder", "run").returncode == 0


@pytest.mark.slow
def test_a_failing_hub_does_not_change_the_run(call, hub, tmp_path):
    """Every commit fails: the run itself is unchanged, its status is 1, and one command completes the push."""
    hub.faults.append(Fault("POST .*/commit/", 500))
    done = call("train", *tiny_flags(**SMALL, output_dir="run", push_to_hub=True, hub_strategy="every_save"))
    assert done.returncode == 1
    assert done.stderr.count("warning: not pushed") == 1
    line = re.search(r"error: .* to finish: ddpm-ext (push run .*)$", done.stderr, re.M)
    assert line is not None, done.stderr[-500:]
    assert call("train", *tiny_flags(**SMALL, output_dir="peer")).returncode == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "peer")
    assert (tmp_path / "run" / "finished.json").is_file()
    hub.faults.clear()
    assert call(*line[1].split()).returncode == 0
    assert call("verify", "alice/run").returncode == 0


@pytest.mark.slow
def test_a_pushed_run_resumes_in_an_empty_folder(call, hub, tmp_path):
    """Killed, and resumed in an empty folder from what was on the Hub: bit-exact to an uninterrupted run."""
    options = SMALL | {
        "max_train_steps": 300,
        "checkpointing_steps": 20,
        "save_model_epochs": 1,
        "train_batch_size": 80,
    }
    options |= {"validation_steps": 100}
    pushing = {"push_to_hub": True, "hub_strategy": "checkpoint", "hub_model_id": "alice/moved"}
    environment = os.environ | hub.environment(str(tmp_path / "home"), TOKEN) | {"PYTHONPATH": str(TESTS.parent)}
    command = [
        sys.executable,
        "-m",
        "diffusers_ddpm_ext",
        "train",
        *tiny_flags(**options, **pushing, output_dir="first"),
    ]
    run = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(1200):
            time.sleep(0.1)
            repo = hub.repos.get("alice/moved")
            if repo is not None and any(name.startswith("checkpoint-") for name in repo.commits[-1].files):
                break
        assert run.poll() is None, "it must be killed in the middle"
    finally:
        run.kill()
        run.wait()
    flags = tiny_flags(**options, **pushing, output_dir="second", resume_from_hub="alice/moved")
    shutil.rmtree(tmp_path / "first")
    done = call("train", *flags, HF_HOME=str(tmp_path / "other-home"))
    assert done.returncode == 0, done.stderr
    start = re.search(r"resuming from step (\d+)", done.stdout)
    assert start is not None
    assert 0 < int(start[1]) < 300
    assert call("train", *tiny_flags(**options, output_dir="peer")).returncode == 0
    assert weights(tmp_path / "second") == weights(tmp_path / "peer")
    assert rows(tmp_path / "second") == rows(tmp_path / "peer")
    again = call("train", *flags)
    assert again.returncode == 0, again.stderr
    assert "nothing is left to do" in again.stdout


def test_push_to_hub_without_a_token_is_refused(call, tmp_path):
    done = call("train", *tiny_flags(**SMALL, output_dir="run", push_to_hub=True), token=None)
    assert done.returncode == 2
    assert "--push_to_hub needs a token of the Hub" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("where", ["hub_token: hf_x", "hub:\n  hub_token: hf_x"])
def test_a_token_in_a_config_file_is_refused(where, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(where)
    assert cli.main(["train", "--config", str(tmp_path / "run.yaml"), "--dry_run"]) == 2
    assert "a token must not be in a file" in capsys.readouterr().err


def test_resuming_from_a_repository_without_checkpoints_is_refused(call, hub, tmp_path):
    DDPMExtPipeline(tiny_unet(1), DDPMExtScheduler()).save_pretrained(tmp_path / "run")
    files = {path.relative_to(tmp_path / "run"): path for path in (tmp_path / "run").rglob("*") if path.is_file()}
    hub.repos["alice/run"] = Repo("alice/run")
    hub.repos["alice/run"].add({str(name): hub.store(path.read_bytes()) for name, path in files.items()}, "a model")
    done = call("train", *tiny_flags(**SMALL, output_dir="new", resume_from_hub="alice/run"))
    assert done.returncode == 2
    assert "--resume_from_hub alice/run holds no checkpoint" in done.stderr
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    done = call("train", *tiny_flags(**SMALL, output_dir="mine", resume_from_hub="alice/nothing"))
    assert done.returncode == 2
    assert "--resume_from_hub alice/nothing cannot be loaded" in done.stderr
    assert list((tmp_path / "mine").iterdir()) == []

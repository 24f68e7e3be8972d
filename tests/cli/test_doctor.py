"""`ddpm-ext doctor`: each finding in one line, with what to do about it."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from helpers.runs import tiny_run
from helpers.tiny import tiny_unet

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, cli
from diffusers_ddpm_ext.cli import doctor as doctor_command
from diffusers_ddpm_ext.training import trainer


@pytest.fixture(autouse=True)
def _healthy_machine(monkeypatch, tmp_path):
    """A healthy machine, nobody logged in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)


def findings(capsys, *argv: str, status: int) -> list[str]:
    """The lines that are marked."""
    assert cli.main(["doctor", *argv]) == status
    return [line[2:] for line in capsys.readouterr().out.splitlines() if line.startswith(("  ! ", "  ? "))]


def one(lines: list[str], *words: str) -> str:
    found = [line for line in lines if all(word in line for word in words)]
    assert len(found) == 1, lines
    return found[0]


def test_a_healthy_machine(capsys):
    assert not [line for line in findings(capsys, status=0) if line.startswith("!")]


def test_no_extras(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        doctor_command, "find_spec", lambda name: None if name in doctor_command.TRAIN_MODULES else find(name)
    )
    one(findings(capsys, status=0), "training does not", "accelerate", "pip install diffusers-ddpm-ext[train]")


def test_old_diffusers(capsys, monkeypatch):
    real = doctor_command.version
    monkeypatch.setattr(doctor_command, "version", lambda name: "0.37.1" if name == "diffusers" else real(name))
    one(findings(capsys, status=1), "! diffusers 0.37.1 is older than 0.38", "pip install -U 'diffusers>=0.38'")


def test_no_permission(capsys, monkeypatch):
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor_command.tempfile, "TemporaryFile", refuse)
    lines = findings(capsys, status=1)
    one(lines, "! this folder cannot be written (Permission denied)", "a folder that you own")
    one(lines, "HF_HOME", "cannot be written")


def test_full_disk(capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor_command.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    one(findings(capsys, status=1), "! this folder: 0.0 GiB free", "free some space")


def test_one_thread(capsys, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    one(findings(capsys, status=0), "? OMP_NUM_THREADS=1 leaves 7 of 8 cores idle", "unset OMP_NUM_THREADS")


def test_wrong_values(capsys, monkeypatch):
    monkeypatch.setattr(doctor_command, "CONVOLUTION_MEAN", 11.6)
    one(findings(capsys, status=1), "! a convolution in float32", "instead of 11.6")


def test_login(capsys, monkeypatch):
    class Api:
        def whoami(self):
            return {"name": "alice", "auth": {"accessToken": {"role": "read"}}}

    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secretsecretsecret")
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "logged in as alice" in out
    assert "this token can only read" in out
    assert "secret" not in out


def test_no_network(capsys, monkeypatch):
    class Api:
        def whoami(self):
            raise ConnectionError("no route for hf_secretsecretsecret")

    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secretsecretsecret")
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    one(findings(capsys, status=0), "? logged in, but the Hub was not reached", "***")
    assert not [line for line in findings(capsys, "--offline", status=0) if "Hub was" in line]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return trainer.train(tiny_run(tmp_path_factory.mktemp("runs") / "run", checkpointing_steps=3))


@pytest.fixture
def folder(run_folder, tmp_path):
    return Path(shutil.copytree(run_folder, tmp_path / "run"))


def test_an_intact_run(capsys, folder):
    assert findings(capsys, str(folder), status=0) == []


def test_a_broken_pipeline(capsys, folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    one(findings(capsys, str(folder), status=1), "! cannot load", "--resume_from_checkpoint latest")


def test_weights_that_are_not_finite(capsys, tmp_path):
    unet = tiny_unet(1)
    with torch.no_grad():
        unet.conv_in.weight.fill_(float("nan"))
    DDPMExtPipeline(unet, DDPMExtScheduler(20)).save_pretrained(tmp_path / "nan")
    one(findings(capsys, str(tmp_path / "nan"), status=1), "! ", "not finite", "copy it again")


def test_a_torn_checkpoint(capsys, folder):
    path = folder / "checkpoint-3" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    one(findings(capsys, str(folder), status=1), "! ", "checkpoint-3", "sets it aside")


def test_no_intact_checkpoint(capsys, folder):
    """Nothing advises to resume from one."""
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for path in folder.glob("checkpoint-*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    lines = findings(capsys, str(folder), status=1)
    one(lines, "! cannot load", "copy it again")
    assert all("no checkpoint is intact" in line for line in lines if "checkpoint-" in line)
    assert not [line for line in lines if "--resume_from_checkpoint" in line]


def test_the_wrong_folder(capsys, tmp_path):
    one(findings(capsys, str(tmp_path), status=1), "! it has neither a pipeline", "right folder")


def test_no_folder(capsys):
    assert cli.main(["doctor", "missing"]) == 2
    assert "missing is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("home", ["/dev/null", "/etc/passwd/x", "/" + "a" * 400, "/proc/1/x", "a\x1b[31m"])
def test_a_strange_cache_folder(home, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", home)
    monkeypatch.setenv("OMP_NUM_THREADS", "²")
    monkeypatch.setenv("PATH", "")
    assert cli.main(["doctor", "--offline"]) in (0, 1)
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    assert printed.out.replace("\n", "").isprintable()


@pytest.mark.parametrize("kind", ["pipe", "bytes", "deep", "link", "text"])
def test_unreadable_files_in_a_folder(kind, capsys, tmp_path):
    folder = tmp_path / "odd\x1b[31m"
    (folder / "checkpoint-old").mkdir(parents=True)
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-99999999999999999999999").mkdir()
    for name in ("model_index.json", "proof.json", "checkpoint-5/manifest.json"):
        path = folder / name
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "link":
            path.symlink_to("/dev/zero")
        else:
            path.write_bytes({"bytes": bytes(range(256)), "deep": b"[" * 100_000, "text": b"true"}[kind])
    assert cli.main(["doctor", "--offline", str(folder)]) == 1
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err
    assert len([line for line in printed.out.splitlines() if line.startswith("  ! ")]) >= 2
    assert "could not be checked" not in printed.out

"""Wrong arguments of every command: one `error:` line and status 2, no traceback, and nothing written or lost."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.runs import tiny_run

from diffusers_ddpm_ext import cli
from diffusers_ddpm_ext.cli.convert import ConvertOptions
from diffusers_ddpm_ext.cli.convert_config import ConvertConfigOptions
from diffusers_ddpm_ext.cli.data import InspectOptions
from diffusers_ddpm_ext.cli.doctor import DoctorOptions
from diffusers_ddpm_ext.cli.evaluate import EvaluateOptions
from diffusers_ddpm_ext.cli.fit_steps import FitStepsOptions
from diffusers_ddpm_ext.cli.fit_variance import FitVarianceOptions
from diffusers_ddpm_ext.cli.plot import PlotOptions
from diffusers_ddpm_ext.cli.report import ReportOptions
from diffusers_ddpm_ext.cli.sample_options import SampleOptions
from diffusers_ddpm_ext.cli.verify import VerifyOptions
from diffusers_ddpm_ext.hub.push import PushOptions
from diffusers_ddpm_ext.training.config.autoencoder_options import TRAIN_VAE
from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.training.config.options import OPTIONS
from diffusers_ddpm_ext.training.trainer import train
from diffusers_ddpm_ext.utils.option import Option, options_of

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries that are given nonsense

DATA = options_of(DataOptions)
# command -> its options, and arguments with which it is quick and right
BASES: dict[str, tuple[dict[str, Option], list[str]]] = {
    "train": (dict(OPTIONS), ["--dry_run"]),
    "train-vae": (dict(TRAIN_VAE.options), ["--dry_run"]),
    "sample": (options_of(SampleOptions), ["run", "--num_images", "1", "--num_inference_steps", "2"]),
    "evaluate": (options_of(EvaluateOptions) | DATA, ["run", "--num_timesteps", "2", "--max_images", "1"]),
    "fit-variance": (options_of(FitVarianceOptions) | DATA, ["run", "--draws", "1", "--max_steps", "2"]),
    "fit-steps": (
        options_of(FitStepsOptions),
        ["run", "--num_inference_steps", "1", "--num_trajectories", "1", "--reference_steps", "2"],
    ),
    "plot": (options_of(PlotOptions), ["run"]),
    "report": (options_of(ReportOptions), ["run"]),
    "push": (options_of(PushOptions), ["run"]),
    "verify": (options_of(VerifyOptions), ["run"]),
    "convert": (options_of(ConvertOptions), ["--from", "compvis", "--out", "made"]),
    "convert-config": (options_of(ConvertConfigOptions), ["model.yaml"]),
    "data": (options_of(InspectOptions), ["run"]),
    "doctor": (options_of(DoctorOptions), ["run", "--offline"]),
}  # fmt: skip
NUMBERS = ["-1", "0", "1e999", "-inf", "nan", "9" * 30, "9" * 5000, "1000000000000", "1.5", "0x10", "1_000", "²",
           "--"]  # fmt: skip
TEXTS = ["", " ", "None", "true", "[", "{}", '{"a": NaN}', '{"a":' * 2000, "[1e400]", "a=1", "=", "a=1 a=2",
         "x" * 5000,
         "beta_start=NaN", "num_train_timesteps=1000000000", "beta_end=-1", "trained_betas=[0.1]", "s_noise=true",
         '{"class_labels": 2}', '{"num_train_timesteps": 1e9}', "DDIMScheduler", "cuda:99", "meta", "ema", "raw",
         "\x1b[31mred", "\u202egnp", "\udcff", "\ud800", "a\nb", "a\0b", "Brot", "-5"]  # fmt: skip
PATHS = ["missing", "missing/below", "run", "run/config.yaml", "text", "binary", "folder", "fifo", "a" * 300,
         "run/unet", "/dev/full", "/proc/self/mem", "/proc/1/x", "text/below", "loop", "dangling", "a.npy", "nan.npy",
         "model.ckpt", ".", "run/.."]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = train(tiny_run(tmp_path_factory.mktemp("run") / "run"))
    assert folder is not None
    return folder


@pytest.fixture
def workspace(trained, tmp_path, monkeypatch) -> Path:
    """The current folder: a run, and files of every wrong kind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.copytree(trained, "run")
    Path("text").write_text("no JSON, no YAML: [\n")
    Path("binary").write_bytes(bytes(range(256)) * 4)
    Path("model.ckpt").write_bytes(b"PK\3\4" + bytes(60))
    Path("model.yaml").write_text("model:\n  target: ldm.models.diffusion.ddpm.DDPM\n")
    Path("folder").mkdir()
    Path("folder", "thesis.tex").write_text("mine")
    os.mkfifo("fifo")
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("nowhere")
    np.save("a.npy", np.zeros((1, 2, 3), dtype=np.float32))
    np.save("nan.npy", np.full((1, 2, 3), np.nan, dtype=np.float32))
    return tmp_path


def flags(options: dict[str, Option]) -> list[Option]:
    return [option for option in options.values() if not option.is_positional]


def likely_values(option: Option) -> list[str]:
    """Values of about the right kind, so that not all are refused at once."""
    if option.choices:
        return [str(choice) for choice in option.choices]
    if option.hint in (int, float) or option.element in (int, float):
        return NUMBERS
    is_path = option.hint is Path or "dir" in option.name or "path" in option.name or option.name == "config"
    return PATHS if is_path else TEXTS


def mutations(draw: random.Random, command: str, count: int) -> Iterator[list[str]]:
    """Command lines with one or two wrong, odd or extreme arguments."""
    options, base = BASES[command]
    positional = any(option.is_positional for option in options.values())
    for _ in range(count):
        line = list(base)
        for _ in range(draw.choice((1, 1, 2))):
            if positional and draw.random() < 0.15 and line and not line[0].startswith("-"):
                line[0] = draw.choice(PATHS + TEXTS)
                continue
            option = draw.choice(flags(options))
            value = draw.choice(likely_values(option) if draw.random() < 0.7 else NUMBERS + TEXTS + PATHS)
            line += [f"--{option.flag}={value}"] if draw.random() < 0.5 else [f"--{option.flag}", value]
        if draw.random() < 0.1:
            line.insert(draw.randrange(len(line) + 1), draw.choice(TEXTS))
        yield [command, *line]


def state(folder: Path) -> dict[str, Any]:
    """Names, kinds and contents below a folder."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        regular = path.is_file() and not path.is_symlink()
        found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if regular else path.is_symlink()
    return found


def check(line: list[str], workspace: Path, capsys) -> int:
    before = state(workspace)
    status = cli.main(line)  # an exception is a traceback
    error = capsys.readouterr().err
    assert status in (0, 1, 2), line
    errors = [text for text in error.splitlines() if text.startswith("error: ")]
    assert len(errors) == (status != 0), (line, error)
    assert all(text.isprintable() for text in errors), (line, error)
    if status == 2:
        changed = {name for name, value in state(workspace).items() if before.get(name) != value}
        assert not changed, (line, changed)
        assert state(workspace).keys() == before.keys(), line
    return status


def run_fuzz(seed: int, counts: dict[str, int], workspace: Path, capsys) -> dict[int, int]:
    statuses = {0: 0, 1: 0, 2: 0}
    for command, count in counts.items():
        draw = random.Random(f"{seed} {command}")
        for line in mutations(draw, command, count):
            statuses[check(line, workspace, capsys)] += 1
    return statuses


def test_wrong_arguments_of_every_command(workspace, capsys):
    statuses = run_fuzz(0, dict.fromkeys(BASES, 4) | {"doctor": 2}, workspace, capsys)
    assert statuses[2] > 20


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_more_wrong_arguments(seed, workspace, capsys):
    run_fuzz(seed, dict.fromkeys(BASES, 60) | {"doctor": 5}, workspace, capsys)

"""Runs on a stream: stopped or killed anywhere and resumed to the same bytes, and the same run in two processes."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.accelerate_state import reset_accelerate
from helpers.paths import PYTHONPATH
from helpers.runs import TINY, rows, tiny_run
from PIL import Image
from safetensors.numpy import load_file

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training import trainer
from diffusers_ddpm_ext.training.config.train_config import TrainConfig
from diffusers_ddpm_ext.training.data.dataset import load_data

datasets = pytest.importorskip("datasets")
COUNT, STEPS = 200, 40


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parquet files of different lengths."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    content = []
    for _ in range(COUNT):
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (9, 8), dtype=np.uint8)).save(file, "PNG")
        content.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    table = datasets.Dataset.from_dict(
        {"image": content, "label": [number % 2 for number in range(COUNT)]}, features=features
    )
    for number, part in enumerate((range(0, 70), range(70, 160), range(160, COUNT))):
        table.select(part).to_parquet(folder / f"train-{number}.parquet", batch_size=20)
    return folder


def options(images: Path, **others) -> dict:
    defaults = {
        "dataset_name": str(images), "streaming": True, "shuffle_buffer": 30, "validation_examples": 20,
        "random_flip": True, "conditioning_key": "adm", "class_column": "label", "checkpointing_steps": 5,
        "validation_steps": 15, "max_train_steps": STEPS,
    }  # fmt: skip
    return defaults | others


def assert_same(folder: Path, other: Path) -> None:
    """Metrics, and weights, optimizer and average of the last checkpoint, are equal to the bit."""
    assert (folder / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    for name in ("model", "ema", "optimizer"):
        path = f"checkpoint-{STEPS}/{name}.safetensors"
        assert (folder / path).read_bytes() == (other / path).read_bytes()


class Killed(BaseException):
    """Stands for `kill -9`."""


def test_a_stopped_run_resumes_to_the_bit(images, tmp_path, monkeypatch):
    """In the middle of a block, and of an accumulation; with other rows in front of it than behind."""
    run = options(images, max_train_steps=7, checkpointing_steps=2, validation_steps=0)
    reset_accelerate()
    trainer.train(tiny_run(tmp_path / "straight", **run))
    step = trainer.train_step
    for at in (3, 6):
        with monkeypatch.context() as patch:

            def kill(setup, number, batches, at=at):
                if number == at:
                    raise Killed
                return step(setup, number, batches)

            patch.setattr(trainer, "train_step", kill)
            reset_accelerate()
            with pytest.raises(Killed):
                trainer.train(tiny_run(tmp_path / "run", **run, resume_from_checkpoint="auto"))
    reset_accelerate()
    trainer.train(tiny_run(tmp_path / "run", **run, resume_from_checkpoint="latest"))
    for name in ("metrics.jsonl", "checkpoint-7/model.safetensors", "checkpoint-7/optimizer.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    saved = json.loads((tmp_path / "run" / "checkpoint-7" / "state.json").read_text())["progress"]
    assert (saved["epoch"], saved["samples"]) == (0, 56)
    state = saved["records"]["stream"]
    assert (len(state["lanes"]), state["block"]) == (8, 30 // 8)
    assert [block * 3 + taken for _, block, _, _, taken in state["lanes"]] == [56 // 8] * 8

    reset_accelerate()
    with pytest.raises(ConfigError, match="--shuffle_buffer is 31 and was 30"):
        trainer.train(tiny_run(tmp_path / "run", **run | {"shuffle_buffer": 31}, resume_from_checkpoint="latest"))
    reset_accelerate()
    with pytest.raises(ConfigError, match="the images or their conditions are not those of the run"):
        trainer.train(tiny_run(tmp_path / "run", **run | {"validation_examples": 21}, resume_from_checkpoint="latest"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_train_steps": None}, "--streaming needs --max_train_steps"),
        ({"num_epochs": 3, "max_train_steps": None}, "--streaming needs --max_train_steps"),
        ({"save_images_epochs": 2}, "--save_images_epochs 2 contradicts --streaming.*--save_images_steps"),
        ({"save_model_epochs": 2}, "--save_model_epochs 2 contradicts --streaming"),
        (
            {"validation_fraction": 0.1, "validation_examples": None},
            "--validation_fraction 0.1 contradicts --streaming",
        ),
        ({"dataset_name": None}, "--streaming needs --dataset_name or --train_data_dir"),
        ({"class_balance": True}, "--class_balance contradicts --streaming"),
        ({"cache_images": "always"}, "--cache_images always contradicts --streaming"),
        ({"streaming": False, "class_names": ["a"]}, "--class_names has no effect without --streaming"),
        ({"streaming": False, "validation_fraction": 0.1}, "--validation_examples and --validation_fraction"),
        ({"class_names": ["a", "a"]}, "--class_names a a: names must differ"),
        (
            {"class_names": ["a"], "class_column": None, "conditioning_key": None},
            "--class_names has no effect without",
        ),
        ({"shuffle_buffer": 0}, "shuffle_buffer must be at least 1"),
    ],
)
def test_what_contradicts_a_stream_is_named(images, changed, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_flat(options(images, conditioning_key="adm") | changed)


def test_the_first_examples_are_held_out_alike_without_streaming(images):
    """So that a run on a stream is measured on images that it has not seen, whatever reads them."""
    loaded = {
        streaming: load_data(
            TrainConfig.from_flat(options(images, streaming=streaming, cache_images="never")).data, "adm"
        )
        for streaming in (False, True)
    }
    assert len(loaded[False].train) == COUNT - 20
    held_out = [data.validation for data in loaded.values()]
    assert torch.equal(held_out[0].pixels(range(20)), held_out[1].pixels(range(20)))
    assert torch.equal(held_out[0].conditions(range(20)).class_labels, held_out[1].conditions(range(20)).class_labels)


def launch(images: Path, folder: Path, processes: int = 1, **others) -> subprocess.Popen:
    """Start the command."""
    flags = []
    for name, value in (TINY | options(images, **others)).items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no_{name}")
        elif value is not None:
            flags += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "diffusers_ddpm_ext", "train", *flags]
    command += ["--output_dir", str(folder), "--resume_from_checkpoint", "auto"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-3000:]
    return output


@pytest.fixture(scope="module")
def straight(images, tmp_path_factory) -> Path:
    """A run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    finish(launch(images, folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_twice_in_an_epoch_at_random(images, straight, tmp_path, seed):
    """An epoch has 22.5 steps. The number of data workers changes nothing."""
    folder, generator = tmp_path / "run", random.Random(seed)
    for kill in range(2):
        process = launch(images, folder, dataloader_num_workers=kill)
        step = generator.randrange(5, 11) + 10 * kill
        while process.poll() is None and not (folder / f"checkpoint-{step // 5 * 5}").exists():
            time.sleep(0.005)
        time.sleep(generator.random() * 0.3)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert "resuming from step" in finish(launch(images, folder, dataloader_num_workers=2))
    assert_same(folder, straight)


@pytest.mark.slow
def test_two_processes_train_as_one(images, straight, tmp_path):
    """Equal up to the order of sums; to the bit as another run of two processes that is killed."""
    output = finish(launch(images, tmp_path / "two", 2, train_batch_size=4))
    assert "each read by one of the 2 processes" in output
    for one, two in zip(rows(straight), rows(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys()
        for name in one:
            assert two[name] == pytest.approx(one[name], rel=2e-4, abs=1e-7), (name, one["step"])
    weights, others = (
        load_file(folder / f"checkpoint-{STEPS}" / "model.safetensors") for folder in (straight, tmp_path / "two")
    )
    for name in weights:
        np.testing.assert_allclose(others[name], weights[name], atol=2e-3)
    process = launch(images, tmp_path / "killed", 2, train_batch_size=4)
    while process.poll() is None and not (tmp_path / "killed" / "checkpoint-15").exists():
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    time.sleep(1)
    finish(launch(images, tmp_path / "killed", 2, train_batch_size=4))
    assert_same(tmp_path / "killed", tmp_path / "two")

"""Saving into a folder that another pipeline, or its owner, already uses; reading while it is being replaced."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from helpers.paths import PYTHONPATH, TESTS
from helpers.tiny import tiny_unet

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from diffusers_ddpm_ext.models.ema_metadata import EmaMetadata, load_ema_metadata, save_ema_metadata
from diffusers_ddpm_ext.training.loop.export import ExportedNetworks, save_pipeline
from diffusers_ddpm_ext.utils import generations
from diffusers_ddpm_ext.utils.files import replace_folder
from diffusers_ddpm_ext.utils.generations import read_one_generation
from diffusers_ddpm_ext.utils.pipeline_files import owned_files

FOREIGN = (
    "README.md",
    "notes.txt",
    "unet/notes.txt",
    "evaluation/mine.txt",
    ".git/HEAD",
    "card/photo.png",
    "plots/mine.png",
    "my.safetensors",
)
RESULTS = (
    "variance_fit.json",
    "steps_fit.json",
    "evaluation/evaluation.json",
    "evaluation/steps.csv",
    "conversion.json",
    "proof.json",
    "plots/steps.png",
)


def pipeline(value: float, **config: float) -> DDPMExtPipeline:
    """A pipeline whose weights and log-variances all have one value."""
    network = tiny_unet(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(value)
    result = DDPMExtPipeline(network, DDPMExtScheduler(num_train_timesteps=10, **config))
    result.logvar = torch.full((10,), float(value))
    return result


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def weight(loaded: DDPMExtPipeline) -> float:
    return float(loaded.unet.conv_in.bias.detach()[0])


@pytest.mark.parametrize(
    "former",
    [
        {"variant": "raw"},
        {"variant": "fp16"},
        {"safe_serialization": False},
        {"max_shard_size": "20KB"},
        {"max_shard_size": "20KB", "variant": "raw"},
        {"max_shard_size": "20KB", "variant": "v1.5", "safe_serialization": False},
    ],
    ids=str,
)
def test_nothing_of_a_former_model_stays(tmp_path, former):
    """Whatever files it had, the folder ends as if it had been empty before; other people's files stay."""
    pipeline(1).save_pretrained(tmp_path)
    pipeline(1).save_pretrained(tmp_path, **former)
    save_ema_metadata(tmp_path, EmaMetadata(0.99, 5))
    touch(tmp_path, *RESULTS, *FOREIGN)
    new = pipeline(2)
    new.logvar = None
    new.save_pretrained(tmp_path)
    new.save_pretrained(tmp_path / "empty")
    expected = files(tmp_path / "empty")
    shutil.rmtree(tmp_path / "empty")
    assert files(tmp_path) == expected | set(FOREIGN)
    assert all((tmp_path / name).read_text() == name for name in FOREIGN)
    if "variant" in former:
        with pytest.raises((ValueError, OSError)):
            DDPMExtPipeline.from_pretrained(tmp_path, variant=former["variant"])
    assert weight(DDPMPipeline.from_pretrained(tmp_path)) == 2


@pytest.mark.parametrize("order", [(None, "raw"), ("raw", None), (None, "raw", "fp16"), (None, "raw", "raw")])
def test_variants_saved_one_after_the_other_belong_together(tmp_path, order):
    for number, variant in enumerate(order):
        pipeline(number).save_pretrained(tmp_path, variant=variant)
    for variant in set(order):
        last = max(number for number, each in enumerate(order) if each == variant)
        assert weight(DDPMExtPipeline.from_pretrained(tmp_path, variant=variant)) == last


def test_the_same_model_saved_again_keeps_its_variants(tmp_path):
    """Another scheduler makes results stale, not the weights: the raw ones and the EMA's record stay."""
    pipeline(1).save_pretrained(tmp_path)
    pipeline(0).save_pretrained(tmp_path, variant="raw")
    save_ema_metadata(tmp_path, EmaMetadata(0.99, 5))
    touch(tmp_path, *RESULTS)
    DDPMExtPipeline.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert set(RESULTS) <= files(tmp_path)
    loaded = DDPMExtPipeline.from_pretrained(tmp_path)
    loaded.scheduler = DDPMExtScheduler.from_config(loaded.scheduler.config, v_posterior=0.5)
    loaded.save_pretrained(tmp_path)
    assert weight(DDPMExtPipeline.from_pretrained(tmp_path, variant="raw")) == 0
    assert load_ema_metadata(tmp_path) == EmaMetadata(0.99, 5)
    assert not set(RESULTS) & files(tmp_path)


def test_a_variant_of_another_network_replaces_everything(tmp_path):
    pipeline(1).save_pretrained(tmp_path)
    DDPMExtPipeline(tiny_unet(3), DDPMExtScheduler()).save_pretrained(tmp_path, variant="raw")
    with pytest.raises((ValueError, OSError)):
        DDPMExtPipeline.from_pretrained(tmp_path)
    assert DDPMExtPipeline.from_pretrained(tmp_path, variant="raw").channels == 3


def test_an_export_of_a_run_keeps_both_and_deletes_the_rest(tmp_path):
    """Over a converted model with a fit, into the folder of the run with its other files."""
    pipeline(1).save_pretrained(tmp_path, max_shard_size="20KB")
    touch(tmp_path, *RESULTS, *FOREIGN, "checkpoint-5/model.safetensors", "metrics.jsonl")
    new = pipeline(2)
    networks = ExportedNetworks(new.unet, pipeline(3).unet, EmaMetadata(0.9, 1), None, None)
    save_pipeline(tmp_path, networks, new.scheduler, {})
    assert files(tmp_path) - owned_files(tmp_path) == {*FOREIGN, "checkpoint-5/model.safetensors", "metrics.jsonl"}
    assert not set(RESULTS) & files(tmp_path)
    assert not any("-of-" in name for name in files(tmp_path))
    assert weight(DDPMExtPipeline.from_pretrained(tmp_path, variant="raw")) == 3
    assert weight(DDPMExtPipeline.from_pretrained(tmp_path)) == 2


def test_saving_into_the_working_directory_and_through_a_link(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    pipeline(1).save_pretrained(tmp_path / "link")
    monkeypatch.chdir(tmp_path / "real")
    pipeline(2).save_pretrained(".")
    assert Path.cwd().is_dir()
    assert weight(DDPMExtPipeline.from_pretrained(tmp_path / "link")) == 2
    assert not [name for name in os.listdir() if name.startswith(".")]


def test_files_have_the_mode_of_other_new_files(tmp_path):
    old = os.umask(0o027)
    try:
        pipeline(1).save_pretrained(tmp_path)
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()} == {0o640}


@pytest.mark.parametrize("killed_in", ["_link", "unlink", "rename"])
def test_a_writer_killed_in_mid_commit_leaves_one_generation(tmp_path, monkeypatch, killed_in):
    """Wherever it stops: the new one for our readers, and the next writer finishes it for everybody."""
    pipeline(1).save_pretrained(tmp_path)
    touch(tmp_path, "variance_fit.json", "notes.txt")
    calls = 0

    def stop(*args: object, **kwargs: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        original(*args, **kwargs)

    owner = {"_link": generations, "unlink": Path, "rename": os}[killed_in]
    original = getattr(owner, killed_in)
    with monkeypatch.context() as patch:
        patch.setattr(owner, killed_in, stop)
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # a killed process cleans nothing up
        with suppress(KeyboardInterrupt):
            for _ in range(3):
                pipeline(2, beta_end=0.03).save_pretrained(tmp_path)
    assert calls == 3
    loaded = DDPMExtPipeline.from_pretrained(tmp_path)
    assert (weight(loaded), float(loaded.logvar[0]), loaded.scheduler.config.beta_end) == (2, 2, 0.03)
    pipeline(3).save_pretrained(tmp_path)
    assert not (tmp_path / generations.COMMITTED).exists()
    assert weight(DDPMPipeline.from_pretrained(tmp_path)) == 3
    assert (tmp_path / "notes.txt").exists()
    assert not (tmp_path / "variance_fit.json").exists()


def test_an_error_while_saving_leaves_the_old_pipeline(tmp_path, monkeypatch):
    pipeline(1).save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(UNet2DModel, "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        pipeline(2).save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


@pytest.mark.parametrize("way", ["files", "folder"])
def test_a_reader_reads_again_what_was_replaced_meanwhile(tmp_path, way):
    """Every attempt but the last is disturbed; the copy, which it gets at the end, is of one generation."""
    folder = tmp_path / "best"
    pipeline(0).save_pretrained(folder)
    attempts = 0

    def load(path: Path) -> tuple[float, float]:
        nonlocal attempts
        attempts += 1
        first = weight(DDPMExtPipeline.from_pretrained(path))
        if attempts <= generations.DIRECT_ATTEMPTS:
            if way == "files":
                pipeline(attempts).save_pretrained(folder)
            else:
                pipeline(attempts).save_pretrained(tmp_path / ".writing-1")
                replace_folder(tmp_path / ".writing-1", folder)
        return first, json.loads((path / "scheduler" / "scheduler_config.json").read_text())["num_train_timesteps"]

    assert read_one_generation(folder, load) == (2, 10)
    assert attempts == 3


def test_diffusers_messages_on_files_that_were_just_replaced_are_not_logged(tmp_path, monkeypatch):
    """A file that is missing at the first attempt alone is no error; one that stays missing is reported once."""
    pipeline(0).save_pretrained(tmp_path)
    messages: list[str] = []
    logger = logging.getLogger("diffusers.models.modeling_utils")
    monkeypatch.setattr(logger, "callHandlers", lambda record: messages.append(record.getMessage()))
    is_replaced = True

    def load(path: Path) -> UNet2DModel:
        try:
            return UNet2DModel.from_pretrained(path / "unet", use_safetensors=True)
        except OSError:
            if is_replaced:
                pipeline(1).save_pretrained(tmp_path)
            raise

    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert float(read_one_generation(tmp_path, load).conv_in.bias.detach()[0]) == 1
    assert messages == []
    is_replaced = False
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match="no file named"):
        read_one_generation(tmp_path, load)
    assert len(messages) == 1
    assert "An error occurred while trying to fetch" in messages[0]


def test_an_error_of_a_folder_at_rest_is_raised_at_once(tmp_path):
    pipeline(0).save_pretrained(tmp_path)
    calls = []

    def load(path: Path) -> None:
        calls.append(path)
        raise KeyError("no such thing")

    for folder in (tmp_path, tmp_path / "unet", tmp_path / "nowhere"):
        with pytest.raises(KeyError):
            read_one_generation(folder, load)
    assert len(calls) == 3


def race(folder: Path, way: str, opens: int) -> None:
    """Open a folder while another process replaces it without a pause, and is killed and started again."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(TESTS / "helpers" / "replace_constantly.py"), str(folder), way]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    writer = subprocess.Popen(command, env=environment)
    try:
        deadline = time.monotonic() + 60
        while not (folder / "model_index.json").exists():
            assert time.monotonic() < deadline
            assert writer.poll() is None
            time.sleep(0.05)
        for count in range(opens):
            if count % 200 == 100:
                writer.send_signal(signal.SIGKILL)
                writer.wait()
                writer = subprocess.Popen(command, env=environment)
            loaded = DDPMExtPipeline.from_pretrained(folder)
            values = {float(value) for tensor in loaded.unet.parameters() for value in tensor.detach().unique()}
            values |= set(loaded.logvar.tolist()) | {round((loaded.scheduler.config.beta_end - 0.02) * 1e6)}
            assert len(values) == 1, f"open {count} of {folder} is a mix: {values}"
    finally:
        writer.kill()
        writer.wait()


@pytest.mark.parametrize("way", ["save_pretrained", "best"])
def test_readers_never_get_a_mix(tmp_path, way):
    race(tmp_path / "run" / "best", way, opens=10)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["save_pretrained", "sharded", "best"])
def test_two_thousand_opens_never_get_a_mix(tmp_path, way):
    race(tmp_path / "run" / "best", way, opens=2000)

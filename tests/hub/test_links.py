"""A link never leads a push, or the report, out of the folder: it is named and left out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.hub_server import LoopbackHub
from helpers.paths import TESTS
from helpers.tiny import tiny_unet

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.hub.upload import copy_snapshot, list_upload_files

SECRET = b"-----BEGIN OPENSSH PRIVATE KEY-----"


@pytest.fixture
def outside(tmp_path):
    """Files that belong to someone else: a key, a folder of keys, and links to them."""
    place = tmp_path / "home"
    place.mkdir()
    (place / "key").write_bytes(SECRET)
    (place / "README.md").write_bytes(SECRET)
    (place / "also").symlink_to("key")
    return place


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "digits"
    DDPMExtPipeline(tiny_unet(1), DDPMExtScheduler(20)).save_pretrained(folder)
    (folder / "metrics.jsonl").write_text('{"step": 7, "train/loss_simple": 0.25}\n')
    (folder / "config.yaml").write_text("data:\n  dataset_name: null\n")
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "digits"))


LINKS = {  # name in the folder -> what it leads to, relative to the folder outside
    "notes.txt": "key",
    "samples/samples-3.png": "key",
    "samples.png": "also",
    "plots": ".",
    "evaluation/steps.csv": "also",
    "unet/diffusion_pytorch_model.raw.safetensors": "key",
    "README.md": "README.md",
    "card": ".",
    "deep/er/still": "../home",
    "loop": "../digits/loop",
    "whole": "../digits",
    "dangling": "nowhere",
    "metadata.jsonl": "/etc/hostname",
}


def plant(folder: Path, outside: Path, name: str, target: str) -> None:
    link = folder / name
    link.parent.mkdir(parents=True, exist_ok=True)
    absolute = outside / target
    link.symlink_to(os.path.relpath(absolute, link.parent) if len(name) % 2 else absolute)


@pytest.mark.parametrize("name", LINKS)
def test_a_link_is_named_and_left_out(folder, outside, name, tmp_path):
    plant(folder, outside, name, LINKS[name])
    uploads = list_upload_files(folder)
    assert list(uploads.left_out) == [name]
    assert f"{name} (a link)" in uploads.warning
    copy_snapshot(uploads.files, tmp_path / "place")
    copied = [path for path in (tmp_path / "place").rglob("*") if path.is_file() or path.is_symlink()]
    assert len(copied) == len(uploads.files) >= 5
    assert all(not path.is_symlink() and path.read_bytes() != SECRET for path in copied)


def test_what_is_no_file_is_left_out_too(folder):
    os.mkfifo(folder / "pipe")
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("latin")
    (folder / "unet" / "a\x1b[2J.png").write_text("the client's progress bar would print its name")
    (folder / "猫\u3000é.png").write_text("uploaded")
    uploads = list_upload_files(folder)
    reasons = ["its name has control characters", "its name is not UTF-8", "not a regular file"]
    assert sorted(uploads.left_out.values()) == reasons
    assert "caf\\udce9.txt" in uploads.warning


def test_a_file_that_becomes_a_link_after_the_listing(folder, outside, tmp_path):
    files = list_upload_files(folder).files
    for name in ("config.yaml", "metrics.jsonl"):  # of which one is linked and the other copied
        (folder / name).unlink()
        (folder / name).symlink_to(outside / "key")
    copy_snapshot(files, tmp_path / "place")
    assert not (tmp_path / "place" / "config.yaml").exists()
    assert not (tmp_path / "place" / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", ["optimizer.safetensors", "rng/rank0.bin", ""])
def test_a_checkpoint_with_a_link_is_not_uploaded(folder, outside, name):
    checkpoint = folder / "checkpoint-7"
    if name:
        plant(folder, outside, f"checkpoint-7/{name}", "key")
    else:
        checkpoint.symlink_to(outside)
    uploads = list_upload_files(folder, checkpoint)
    assert list(uploads.left_out) == [f"checkpoint-7/{name}".rstrip("/")]
    assert not [each for each in uploads.files if each.startswith("checkpoint")]
    with pytest.raises(ConfigError, match="leave out --with_checkpoint"):
        uploads.check_complete(checkpoint)


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
    ],
)
def test_a_pipeline_that_would_not_load_is_not_uploaded(folder, tmp_path, name):
    """Its files may be links on purpose, to another disk: then they must be put in place."""
    shutil.move(folder / name, tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=f"{name} is a link"):
        list_upload_files(folder).check_complete()


def test_push_uploads_nothing_from_outside(folder, outside, tmp_path):
    """With every link at once; what they lead to, and they themselves, stay as they are."""
    for name, target in LINKS.items():
        plant(folder, outside, name, target)
    with LoopbackHub() as hub:
        environment = {**os.environ, **hub.environment(str(tmp_path / "cache")), "PYTHONPATH": str(TESTS.parent)}
        command = [sys.executable, "-m", "diffusers_ddpm_ext", "push", str(folder), "--no_images"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert not [oid for oid, content in hub.blobs.items() if SECRET in content]
        files = hub.files("alice/digits")
    assert not set(files) & (set(LINKS) - {"README.md"})
    assert b"DDPMExtPipeline" in files["README.md"]
    line = next(line for line in done.stderr.splitlines() if "left out of the upload" in line)
    assert f"{len(LINKS) - 8} more" in line
    assert all(os.path.islink(folder / name) for name in LINKS)
    kept = {path.name: path.read_bytes() for path in outside.iterdir()}
    assert kept == {"key": SECRET, "also": SECRET, "README.md": SECRET}

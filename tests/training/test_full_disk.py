"""A run on a disk that is full at some moment, and the permissions of what a run writes."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.paths import TESTS
from helpers.runs import tiny_flags
from PIL import Image
from safetensors.torch import load_file

from diffusers_ddpm_ext.training.checkpoints.folders import list_checkpoints
from diffusers_ddpm_ext.training.checkpoints.manifest import verify
from diffusers_ddpm_ext.utils.yaml_io import load_options

SMALL = {
    "block_out_channels": [4, 8], "norm_num_groups": 2, "num_train_timesteps": 10, "max_train_steps": 4,
    "checkpointing_steps": 2, "validation_steps": 2, "save_images_steps": 2, "logging_steps": 1,
    "num_preview_images": 1, "ddpm_num_inference_steps": 1,
}  # fmt: skip

SPACE = [0, 4, 8, 12, 24, 48, 100, 200, 320, 500]
"""Free kB."""


def train(folder: Path, umask: int = 0o022, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "diffusers_ddpm_ext", "train", *tiny_flags(**SMALL, **options, output_dir=folder)]
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent)}
    return subprocess.run(
        command, env=environment, umask=umask, capture_output=True, text=True, timeout=200, check=False
    )


def check_whole(folder: Path) -> None:
    """Every file under its own name is complete; what is not is in a draft, which the next start deletes."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or any(part.startswith(".") for part in name.split("/")):
            continue
        match path.suffix:
            case ".json":
                assert isinstance(json.loads(path.read_text()), dict), name
            case ".yaml":
                assert len(load_options(path.read_text())) > 10, name
            case ".jsonl":
                assert all(json.loads(line)["step"] > 0 for line in path.read_text().splitlines()), name
            case ".png":
                Image.open(path).load()
            case ".safetensors":
                assert load_file(path), name
            case _:
                assert path.name == "README.md", name
    assert [verify(path).path for path in list_checkpoints(folder)] == list_checkpoints(folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount_point)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not permitted")
    yield mount_point
    subprocess.run(["umount", str(mount_point)], check=True)


@pytest.mark.slow
def test_a_full_disk_leaves_whole_files_and_the_run_resumes(small_disk: Path, tmp_path: Path):
    """The free space ends at every stage of a run: lock, options, metrics, previews, checkpoints, pipeline."""
    whole = tmp_path / "whole"
    assert train(whole).returncode == 0
    statuses = set()
    for free in SPACE:
        folder, filler = small_disk / "run", small_disk / "filler"
        folder.mkdir()
        available = shutil.disk_usage(small_disk).free
        filler.write_bytes(b"x" * (available - free * 1024))
        done = train(folder, resume_from_checkpoint="auto")
        statuses.add(done.returncode)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in done.stderr, (free, done.stderr[-3000:])
        assert done.returncode in (0, 1, 2), (free, done.stderr[-500:])
        assert len(errors) == (done.returncode != 0), (free, done.stderr[-2000:])
        check_whole(folder)
        filler.unlink()
        again = train(folder, resume_from_checkpoint="auto")
        assert again.returncode == 0, (free, again.stderr[-2000:])
        name = "unet/diffusion_pytorch_model.safetensors"
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), free
        shutil.rmtree(folder)
    assert {1, 2} <= statuses


@pytest.mark.parametrize(
    "umask", [0o027, pytest.param(0o022, marks=pytest.mark.slow), pytest.param(0o002, marks=pytest.mark.slow)]
)
def test_everything_that_a_run_writes_has_the_modes_of_new_files(umask: int, tmp_path: Path):
    done = train(tmp_path / "run", umask=umask)
    assert done.returncode == 0, done.stderr
    for path in tmp_path.rglob("*"):
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path

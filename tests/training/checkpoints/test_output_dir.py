"""The output folder of a run: its name, and what overwriting removes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from diffusers_ddpm_ext.training.checkpoints.output_dir import RUN_FILES, acquire_output_dir, run_name
from diffusers_ddpm_ext.training.config.options import DataOptions, OutputOptions


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_names_of_runs():
    assert run_name(DataOptions()) == "digits"
    assert run_name(DataOptions(train_data_dir="photos/")) == "photos"
    assert run_name(DataOptions(train_data_dir="../my photos (new)")) == "my-photos-new"
    assert run_name(DataOptions(dataset_name="uoft-cs/cifar10")) == "cifar10"


def test_default_folders_are_numbered():
    folders = [acquire_output_dir(DataOptions(), OutputOptions())[0] for _ in range(3)]
    assert [str(folder) for folder in folders] == ["runs/digits", "runs/digits-2", "runs/digits-3"]


def test_runs_that_start_together_get_separate_folders():
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: acquire_output_dir(DataOptions(), OutputOptions())[0], range(24)))
    assert len(set(folders)) == 24


def test_overwriting_removes_an_earlier_run_and_nothing_else():
    folder = Path("D")
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").touch()
    for name in ("metrics.jsonl", "notes.txt"):
        (folder / name).touch()
    (folder / "keep").mkdir()
    (folder / "samples").symlink_to(folder.absolute() / "keep")
    (folder / "keep" / "a").touch()
    (folder / "checkpoint-3").mkdir()
    result, lock = acquire_output_dir(DataOptions(), OutputOptions("D", overwrite_output_dir=True))
    assert result == folder
    lock.release()
    assert {path.name for path in folder.iterdir()} == {"notes.txt", "keep"}
    assert (folder / "keep" / "a").exists()
    assert "samples" in RUN_FILES

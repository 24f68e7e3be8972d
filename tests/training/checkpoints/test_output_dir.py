"""The output folder of a run: its name, and what overwriting removes."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.checkpoints.output_dir import acquire_output_dir, check_output_dir, run_name
from diffusers_ddpm_ext.training.checkpoints.writer import write_checkpoint
from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.training.config.options import OutputOptions
from diffusers_ddpm_ext.training.config.train_config import TrainConfig


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


def make_run(folder: Path) -> Path:
    """The files of a run that was killed, as far as overwriting looks at them."""
    folder.mkdir(parents=True, exist_ok=True)
    TrainConfig.from_flat({}).write_resolved(folder / "config.yaml")
    for name in ("environment.json", "metrics.jsonl", "finished.json", "unet/config.json", "best/monitor.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    write_checkpoint(folder, 3, lambda draft: (draft / "model.safetensors").write_bytes(b"x"))
    return folder


def overwrite(folder: str | Path) -> set[str]:
    """Overwrite a folder; the paths that are left."""
    result, lock = acquire_output_dir(DataOptions(), OutputOptions(str(folder), overwrite_output_dir=True))
    lock.release()
    return {path.relative_to(result).as_posix() for path in result.rglob("*")}


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def test_overwriting_removes_an_earlier_run_and_nothing_else():
    folder = make_run(Path("D"))
    (folder / "notes.txt").touch()
    (folder / "keep").mkdir()
    (folder / "samples").symlink_to(folder.absolute() / "keep")
    for name in ("a", "samples-3.png", "loss.png"):
        (folder / "keep" / name).touch()
    (folder / ".saving-abcd1234").mkdir()
    (folder / ".config.yaml.123.part").touch()
    assert overwrite("D") == {"notes.txt", "keep", "keep/a", "keep/samples-3.png", "keep/loss.png"}
    assert overwrite("D/new") == set()


USERS_FILES = [
    "notes.txt", "samples/mine.png", "samples/samples-of-my-cat.png", "unet/notes.md", "unet/config.yaml",
    "scheduler/old/scheduler_config.json", "best/README.txt", "best/unet/merged.safetensors", "config.yaml.bak",
    "metrics.jsonl.gz", "README.md", "logs/events", "wandb/run", "checkpoint-old/model.safetensors",
    "checkpoint-5-backup/manifest.json", "checkpoint-/x", "checkpoint-1e3/x", "checkpoint-٣/x", "checkpoint-007/x",
    "checkpoint-7", "checkpoint-8/model.safetensors", "checkpoint-3/notes.txt", ".writing-plan", ".saving-money/x",
    ".downloading", "evaluation/evaluation.json", "aside-checkpoint-2/x", "crash/notes", "crash/step-4/mine.csv",
]  # fmt: skip


def test_files_of_the_user_stay_in_a_run_that_is_overwritten():
    folder = make_run(Path("D"))
    for name in USERS_FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    left = overwrite("D")
    assert {name for name in left if (folder / name).is_file()} == set(USERS_FILES)
    assert all((folder / name).read_text() == name for name in USERS_FILES)


def foreign_folders(home: Path) -> dict[str, Callable[[], Path]]:
    """Folders that must not be emptied, each with a file that a run also writes."""

    def folder(files: dict[str, str], name: str = "photos") -> Path:
        for file, text in files.items():
            (Path(name) / file).parent.mkdir(parents=True, exist_ok=True)
            (Path(name) / file).write_text(text)
        return Path(name)

    def run_in(path: Path) -> Path:
        make_run(path)
        return path

    def link() -> Path:
        make_run(Path("real"))
        Path("link").symlink_to("real")
        return Path("link")

    def repository(name: str, as_file: bool = False) -> Path:
        make_run(Path("checkout"))
        (Path("checkout") / name).write_text("gitdir: x") if as_file else (Path("checkout") / name).mkdir()
        return Path("checkout")

    resolved = run_in(Path("other"))
    return {
        "data with a config.yaml": lambda: folder({"a.png": "", "config.yaml": "a: 1"}),
        "a copied configuration": lambda: folder({"a.png": "", "config.yaml": (resolved / "config.yaml").read_text()}),
        "an option file": lambda: folder({"config.yaml": "data:\n  resolution: 8\n", "metrics.jsonl": ""}),
        "metrics of another program": lambda: folder({"metrics.jsonl": "", "config.yaml": "- 1", ".run.lock": ""}),
        "a damaged config.yaml": lambda: folder({"config.yaml": "a: [", "environment.json": "{}"}),
        "a backup of a checkpoint": lambda: (
            write_checkpoint(run_in(Path("b")), 4, lambda d: None) and _only(Path("b"))
        ),
        "a pipeline": lambda: folder({"model_index.json": "{}", "unet/config.json": "{}"}),
        "a link": link,
        "a git checkout": lambda: repository(".git"),
        "a git worktree": lambda: repository(".git", as_file=True),
        "a Mercurial checkout": lambda: repository(".hg"),
        "the home folder": lambda: run_in(home),
        "above the home folder": lambda: run_in(home.parent),
        "the root": lambda: Path("/"),
    }


def _only(folder: Path) -> Path:
    """A folder with nothing of a run but its checkpoint."""
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()
    return folder


@pytest.mark.parametrize("kind", [
    "data with a config.yaml", "a copied configuration", "an option file", "metrics of another program",
    "a damaged config.yaml", "a backup of a checkpoint", "a pipeline", "a link", "a git checkout", "a git worktree",
    "a Mercurial checkout", "the home folder", "above the home folder", "the root",
])  # fmt: skip
def test_only_the_folder_of_a_run_is_overwritten(kind, tmp_path, monkeypatch):
    home = tmp_path / "homes" / "me"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    folder = foreign_folders(home)[kind]()
    before = None if kind == "the root" else contents(folder.resolve())
    with pytest.raises(ConfigError, match="--overwrite_output_dir") as refusal:
        acquire_output_dir(DataOptions(), OutputOptions(str(folder), overwrite_output_dir=True))
    assert "\n" not in str(refusal.value)
    assert before is None or contents(folder.resolve()) == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "timing.jsonl", "unet", "samples", "finished.json"])
@pytest.mark.parametrize("kind", ["link", "broken link", "folder or file", "pipe"])
def test_a_run_does_not_resume_over_links_and_folders(name, kind):
    folder = make_run(Path("D"))
    target = Path("outside")
    (folder / name).rename(target) if (folder / name).exists() else target.touch()
    if kind == "folder or file":
        target.rename("gone")
        (folder / name).touch() if name in ("unet", "samples") else (folder / name).mkdir()
    elif kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to(target.absolute() if kind == "link" else "nowhere")
    if kind == "link" and name in ("unet", "samples"):
        Path("outside").is_dir() or (Path("outside").unlink(), Path("outside").mkdir())
        check_output_dir(OutputOptions("D"), resuming=True)  # a link to a folder on another disk
        return
    with pytest.raises(ConfigError, match=name):
        check_output_dir(OutputOptions("D"), resuming=True)


def test_a_run_does_not_resume_in_a_folder_that_is_not_a_run():
    Path("photos").mkdir()
    (Path("photos") / "config.yaml").write_text("mine: 1")
    with pytest.raises(ConfigError, match="neither empty nor the folder of a run"):
        acquire_output_dir(DataOptions(), OutputOptions("photos"), resuming=True)
    assert [path.name for path in Path("photos").iterdir()] == ["config.yaml"]


def test_a_start_that_ended_on_a_full_disk_can_be_repeated():
    """Only the first file of a run is there."""
    Path("D").mkdir()
    TrainConfig.from_flat({}).write_resolved(Path("D") / "config.yaml")
    acquire_output_dir(DataOptions(), OutputOptions("D"), resuming=True)[1].release()
    assert overwrite("D") == set()


def test_a_start_that_was_killed_at_once_can_be_repeated():
    """The lock, and a download or draft that was not finished, are all that such a start leaves."""
    folder = Path("D")
    (folder / ".downloading-0123abc").mkdir(parents=True)
    (folder / ".run.lock").touch()
    (folder / ".saving-abcd_123").mkdir()
    acquire_output_dir(DataOptions(), OutputOptions("D"), resuming=True)[1].release()
    assert {path.name for path in folder.iterdir()} == {".downloading-0123abc"}

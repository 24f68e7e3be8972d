"""--resume_from_hub: which files are fetched, in which order, and kills in between."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.hub_server import LoopbackHub
from helpers.paths import TESTS

from diffusers_ddpm_ext.training.loop import hub_download

TOKEN = "hf_secretsecretsecret"


def test_only_files_of_the_run_are_fetched():
    """A repository may have files of its users, and names that look like checkpoints."""
    names = [
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.raw.safetensors", "metrics.jsonl",
        "best/unet/config.json", "samples/samples-40.png", "checkpoint-9/manifest.json", "checkpoint-9/state.json",
        "checkpoint-10/manifest.json", "checkpoint-10/unet/model.safetensors",
    ]  # fmt: skip
    foreign = [
        "README.md", ".gitattributes", "notes.txt", "proof.json", "card/samples.png", "samples/mine.png", ".run.lock",
        "checkpoint-10/../../x", "checkpoint-old/manifest.json", "checkpoint-/manifest.json", "config.yaml.bak",
        "checkpoint-010/manifest.json", "checkpoint-1e3/manifest.json", "checkpoint-٣/manifest.json", "logs/x",
        "checkpoint-99/state.json", "checkpoint-11", "unet/../evil.json", "unet/run.py",
    ]  # fmt: skip
    step = hub_download._newest_step([*foreign, *names])
    assert step == 10
    wanted = [name for name in [*names, *foreign] if hub_download._is_wanted(name, step)]
    assert wanted == [name for name in names if not name.startswith("checkpoint-9/")]
    assert hub_download._newest_step(foreign) is None


def test_the_checkpoint_is_moved_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever the n-th rename is that does not happen any more: a checkpoint is there only with all the rest."""
    names = [
        "metrics.jsonl",
        "config.yaml",
        "unet/a",
        "model_index.json",
        "finished.json",
        "checkpoint-4/manifest.json",
    ]
    for last in range(len(names) + 3):  # the damaged checkpoint is moved aside, with its reason
        draft, folder = tmp_path / f"{last}" / ".downloading-0123", tmp_path / f"{last}"
        for name in (*names, ".cache/huggingface/x"):
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            (draft / name).write_text(name)
        (folder / "checkpoint-4").mkdir()  # damaged
        left = iter(range(last))

        def rename(real, *paths, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            real(*paths)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(os, "replace", functools.partial(rename, os.replace))
            patch.setattr(os, "rename", functools.partial(rename, os.rename))
            hub_download._move_files(draft, folder, 4)
        done = [name for name in names if (folder / name).is_file()]
        if "checkpoint-4/manifest.json" in done:
            assert done == names
        if "finished.json" in done:
            assert "model_index.json" in done
        if "model_index.json" in done:
            assert "unet/a" in done
    assert done == names
    assert not list(tmp_path.rglob("x")), "the client's cache"


def kill_downloads(kills: int, folder: Path) -> str:
    """Resume from a pushed run with so many kills; what the helper prints."""
    with LoopbackHub({TOKEN: "write"}) as hub:
        environment = os.environ | hub.environment(str(folder / "home"), TOKEN)
        environment |= {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
        command = [sys.executable, str(TESTS / "helpers" / "killed_downloads.py"), str(kills)]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800, check=False
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_resume_from_the_hub_that_is_killed_anywhere_finishes_whole(tmp_path: Path):
    """The same command line is repeated after each of 30 kills; its results are those of a run without kills."""
    assert "30 kills" in kill_downloads(30, tmp_path)

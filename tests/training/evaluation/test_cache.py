"""The rows of an interrupted evaluation: what is damaged or was changed is evaluated again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffusers_ddpm_ext.training.evaluation.cache import EvaluationCache
from diffusers_ddpm_ext.training.evaluation.processes import Processes

ONE = Processes(0, 1, torch.device("cpu"), lambda tensor: tensor)
ROWS = torch.arange(6, dtype=torch.float64).reshape(3, 2)


def test_rows_are_read_back(tmp_path: Path):
    cache = EvaluationCache(tmp_path, "same", ONE)
    cache.put(4, ROWS)
    cache.save()
    again = EvaluationCache(tmp_path, "same", ONE)
    assert torch.equal(again.get(4, 3), ROWS)
    assert again.get(5, 3) is None
    assert EvaluationCache(tmp_path, "other", ONE).get(4, 3) is None


CHANGED = {
    "NaN": ROWS * float("nan"),
    "infinite": ROWS / 0,
    "too few rows": ROWS[:2],
    "one number, which would broadcast": ROWS[:1, :1],
    "integers": ROWS.long(),
    "complex": ROWS.to(torch.complex64),
    "empty": ROWS[:0],
}


@pytest.mark.parametrize("kind", CHANGED)
def test_rows_that_no_evaluation_writes_are_ignored(kind: str, tmp_path: Path):
    path = EvaluationCache(tmp_path, "same", ONE).path
    save_file({"4": CHANGED[kind].contiguous().clone()}, path, metadata={"fingerprint": "same"})
    assert EvaluationCache(tmp_path, "same", ONE).get(4, 3) is None


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to nothing", "text", "empty"])
def test_files_that_are_none_are_ignored(kind: str, tmp_path: Path):
    path = EvaluationCache(tmp_path, "same", ONE).path
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "link to nothing":
            path.symlink_to("nothing")
        case _:
            path.write_text("a text" if kind == "text" else "")
    assert EvaluationCache(tmp_path, "same", ONE).get(4, 3) is None

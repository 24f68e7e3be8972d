"""A run that an earlier version began is resumed, and ends with the numbers that the earlier version had reached.

``tests/golden/checkpoint/`` has the run in the middle (class-conditional digits with label dropout, flips, dropout,
accumulation, EMA, learned log-variances, learned timesteps, ``--on_nonfinite skip``), and what followed.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers.accelerate_state import fresh_accelerate  # noqa: F401
from helpers.paths import TESTS
from helpers.runs import rows
from safetensors.numpy import load_file

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.config.train_config import parse_train_args
from diffusers_ddpm_ext.training.trainer import train

GOLDEN = TESTS / "golden" / "checkpoint"
CLOSE = 1e-5
"""Relative; to the bit on the machine that wrote it, and other processors round differently."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with zipfile.ZipFile(GOLDEN / "run.zip") as archive:
        archive.extractall(tmp_path)
    return tmp_path / "run"


def resume(run: Path, *flags: str) -> None:
    train(
        parse_train_args(
            [
                "--config",
                str(run / "config.yaml"),
                "--output_dir",
                str(run),
                "--resume_from_checkpoint",
                "latest",
                *flags,
            ]
        )
    )


def test_it_ends_with_the_same_numbers(run: Path):
    expected = json.loads((GOLDEN / "expected.json").read_text())
    resume(run)
    later = [row for row in rows(run) if row["step"] > 3]
    assert [row.keys() for row in later] == [row.keys() for row in expected["rows"]]
    for row, golden in zip(later, expected["rows"], strict=True):
        assert row == pytest.approx(golden, rel=CLOSE)
    for name, golden in expected["checkpoint-6"].items():
        tensors = load_file(run / "checkpoint-6" / f"{name}.safetensors")
        values = np.concatenate([tensors[key].astype(np.float64).ravel() for key in sorted(tensors)])
        assert values.size == golden["values"]
        assert np.linalg.norm(values) == pytest.approx(golden["norm"], rel=CLOSE)
        assert values.sum() == pytest.approx(golden["sum"], rel=CLOSE)


def test_an_option_that_changes_the_numbers_is_named(run: Path):
    before = sorted(path.name for path in run.iterdir())
    with pytest.raises(ConfigError, match=r"--beta_end is 0\.5 and was 0\.02.*--config .*config\.yaml"):
        resume(run, "--beta_end", "0.5")
    assert sorted(path.name for path in run.iterdir()) == before

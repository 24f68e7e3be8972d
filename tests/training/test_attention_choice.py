"""The attention of a run and of the runs that resume it; tests/golden/checkpoint is of an earlier version."""

from __future__ import annotations

import json

import pytest
from helpers.accelerate_state import reset_accelerate
from helpers.runs import tiny_run

from diffusers_ddpm_ext.models import fast_attention
from diffusers_ddpm_ext.training import trainer

pytestmark = pytest.mark.skipif(not fast_attention.has_onednn(), reason="no x86 CPU with oneDNN")


@pytest.fixture(autouse=True)
def no_layer_is_too_small(monkeypatch):
    monkeypatch.setattr(fast_attention, "LARGE", 1)


def train(folder, **options):
    """Four steps; attention of 64 tokens with heads of 8 channels."""
    reset_accelerate()
    options = {
        "attention_levels": [0],
        "attention_head_dim": 8,
        "checkpointing_steps": 2,
        "checkpoints_total_limit": 5,
    } | options
    trainer.train(tiny_run(folder, max_train_steps=4, **options))
    state = json.loads((folder / "checkpoint-4" / "state.json").read_text())
    return state["progress"]["records"]["fast_attention"], (folder / "checkpoint-4" / "model.safetensors").read_bytes()


def test_the_plan_and_the_checkpoints_say_which_attention_a_run_has(tmp_path, capsys):
    is_fast, weights = train(tmp_path / "auto")
    assert is_fast
    assert "layers by oneDNN (--fast_attention never" in capsys.readouterr().out
    is_fast, others = train(tmp_path / "never", fast_attention="never")
    assert not is_fast
    assert "oneDNN" not in capsys.readouterr().out
    assert others != weights  # by rounding; if they were equal, the next test could not fail


@pytest.mark.parametrize(
    ("first", "then", "expected"), [("auto", "auto", True), ("never", "auto", False), ("auto", "never", False)]
)
def test_a_resumed_run_keeps_the_attention_of_its_checkpoint(first, then, expected, tmp_path):
    _, weights = train(tmp_path, fast_attention=first)
    is_fast, resumed = train(tmp_path, fast_attention=then, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert is_fast is expected
    assert (resumed == weights) == (first == then or first == "never")

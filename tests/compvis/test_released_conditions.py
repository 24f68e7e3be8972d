"""The lines of docs/released-models.md that make conditions, against the formulas of the original classes."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from helpers.paths import ROOT
from torch.nn import functional


def run_block(name: str) -> dict[str, Any]:
    """The variables of the first block in which a name occurs; torch's generator starts at 0."""
    page = (ROOT / "docs" / "released-models.md").read_text()
    block = next(text for text in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S) if name in text)
    variables: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exec(compile(block, "released-models.md", "exec"), variables)
    return variables


def test_depth():
    made = run_block("bicubic")
    assert made["concat_inputs"].shape == (1, 1, 64, 64)
    assert float(made["concat_inputs"].min()) == -1
    span = float(made["high"] - made["low"])
    assert math.isclose(float(made["concat_inputs"].max()), 2 * span / (span + 0.001) - 1, rel_tol=1e-5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        depth = functional.interpolate(torch.rand(1, 1, 384, 384), scale_factor=1 / 6, mode="bicubic")
    torch.testing.assert_close(made["depth"], depth)


def test_a_small_picture():
    """CompVis' betas are linear in their roots."""
    made = run_block("torch.tensor([20])")
    betas = torch.linspace(1e-4**0.5, 0.02**0.5, 1000, dtype=torch.float64) ** 2
    kept = float((1 - betas)[:21].prod())
    residual = made["concat_inputs"] - math.sqrt(kept) * made["picture"]
    assert made["class_labels"].tolist() == [20]
    assert math.isclose(float(residual.std()), math.sqrt(1 - kept), rel_tol=0.02)


def test_an_embedding():
    made = run_block("get_timestep_embedding")
    kept = math.cos((1 / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    residual = made["class_labels"][:, :1024] - math.sqrt(kept) * made["embeds"]
    assert math.isclose(float(residual.std()), math.sqrt(1 - kept), rel_tol=0.1)
    assert torch.equal(made["class_labels"][:, 1024:], torch.cat([torch.ones(1, 512), torch.zeros(1, 512)], dim=1))

"""The page on sequences: the bound of its model lies above the entropy of its data, and close to it."""

from __future__ import annotations

import re
from typing import Any

import torch
from helpers.paths import ROOT


def test_the_trajectories_of_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "your-own-loop.md").read_text()
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", page.split("## Volumes")[0], re.M | re.S):
        exec(block, names)
    entropy, bound, plain = (float(names[name]) for name in ("entropy", "bound", "plain"))
    assert entropy < bound < entropy + 0.15
    assert plain > bound + 0.5
    assert float((names["drawn"] - names["covariance"]).abs().max()) < 0.08  # its standard error is 0.01
    printed = capsys.readouterr().out.splitlines()[0].rstrip()
    number = re.compile(r"-?\d+\.\d+")
    assert number.sub("#", printed) in number.sub("#", page)
    assert {each.name for each in tmp_path.iterdir()} == {"trajectories", "trajectories.safetensors"}
    assert torch.is_grad_enabled()

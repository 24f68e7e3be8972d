"""`ddpm-ext plot`: what the plots show of a run's options, and where they are written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import tiny_unet

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, cli
from diffusers_ddpm_ext.diffusion.weighting import elbo_weights
from diffusers_ddpm_ext.plotting import chain


@pytest.fixture
def folder(tmp_path) -> Path:
    DDPMExtPipeline(tiny_unet(1), DDPMExtScheduler(20)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("options", "label", "expected"),
    [
        ({}, "simple", lambda bound: 1 + 0 * bound),
        ({"original_elbo_weight": 0.25}, "simple + 0.25 x the bound's", lambda bound: 1 + bound / 4),
        ({"l_simple_weight": 0, "original_elbo_weight": 2}, "2 x the bound's", lambda bound: 2 * bound),
        ({"l_simple_weight": 3}, "3 x simple", lambda bound: 3 + 0 * bound),
        ({"loss_type": "vlb", "variance_type": "learned_range"}, None, None),
    ],
)
def test_the_weights_are_those_of_the_loss(options, label, expected, folder, monkeypatch):
    """Of all its terms: the simple loss times its weight, plus the bound times its own."""
    (folder / "config.yaml").write_text(json.dumps({"seed": 0} | options))
    drawn = {}
    monkeypatch.setattr(chain, "plot_weights", lambda path, weights, kind: drawn.update(weights))
    assert cli.main(["plot", str(folder)]) == 0
    found = {name: table for name, table in drawn.items() if name.startswith("this run")}
    if label is None:
        assert not found
    else:
        bound = elbo_weights(DDPMExtScheduler(20).schedule)
        assert list(found) == [f"this run: {label}"]
        np.testing.assert_allclose(found[f"this run: {label}"], expected(bound))


def test_a_folder_in_the_place_of_a_plot(folder, tmp_path, capsys):
    """Nothing is written, not even the plots before it."""
    (tmp_path / "plots" / "weights.svg").mkdir(parents=True)
    assert cli.main(["plot", str(folder), "--out", str(tmp_path / "plots"), "--format", "svg"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "weights.svg is a folder" in line
    assert "name another --out" in line
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["weights.svg"]
    assert cli.main(["plot", str(folder), "--out", str(tmp_path / "plots")]) == 0, "png are other files"
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "schedule.png",
        "weights.png",
        "weights.svg",
    ]


def test_a_full_disk_leaves_the_plots_as_they_were(folder, tmp_path, monkeypatch, capsys):
    from diffusers_ddpm_ext.cli import plot

    out = tmp_path / "plots"
    assert cli.main(["plot", str(folder), "--out", str(out)]) == 0
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    copies = []

    def copyfile(source: Path, target: Path) -> Path:
        copies.append(source)
        if len(copies) == 2:
            raise OSError(28, "No space left on device")
        return Path(target)

    monkeypatch.setattr(plot.shutil, "copyfile", copyfile)
    assert cli.main(["plot", str(folder), "--out", str(out)]) == 1
    assert "No space left" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_log_variances_of_another_chain(folder, capsys):
    pipeline = DDPMExtPipeline.from_pretrained(folder)
    pipeline.logvar = torch.zeros(20)
    pipeline.save_pretrained(folder)
    DDPMExtScheduler(10).save_pretrained(folder / "scheduler")
    assert cli.main(["plot", str(folder)]) == 2
    assert "logvar has 20 values, and the chain 10 steps" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"loss_weighting: 3\n", b"[1]\n", b"a: [\n"])
def test_a_damaged_configuration_is_named_without_an_option_that_plot_does_not_have(content, folder, capsys):
    (folder / "config.yaml").write_bytes(content)
    status = cli.main(["plot", str(folder)])
    lines = capsys.readouterr().err.splitlines()
    assert "--config" not in "".join(lines)
    if content:
        assert status == 2
        assert len(lines) == 1
        assert "config.yaml" in lines[0]
    else:
        assert status == 0, "no options, so only the bound's weights"
    assert cli.main(["report", str(folder)]) == 0
    assert sum("config.yaml" in line for line in capsys.readouterr().err.splitlines()) == bool(content)

"""Files that commands write at a path the user names: of the type that the name promises, never over another file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.tiny import tiny_unet
from PIL import Image

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, cli

LINES = {
    "report --out": (["report", "run", "--out"], ".html or .htm"),
    "data --out": (["data", "photos", "--out"], ".png"),
    "data --json": (["data", "photos", "--json"], ".json"),
    "evaluate --json": (["evaluate", "run", "--device", "cpu", "--json"], ".json"),
    "convert-config --out": (["convert-config", "model.yaml", "--overwrite", "--out"], ".yaml or .yml"),
    "convert --out": (["convert", "--to", "compvis", "run", "--overwrite", "--out"], ".ckpt, .pt or .pth"),
    "convert --config_out": (
        ["convert", "--to", "compvis", "run", "--out", "new.ckpt", "--overwrite", "--config_out"], ".yaml or .yml"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def pipeline():
    return DDPMExtPipeline(tiny_unet(1), DDPMExtScheduler(20))


@pytest.fixture
def files(pipeline, tmp_path, monkeypatch) -> dict[Path, bytes]:
    """A model, images and a configuration; all files with their bytes."""
    monkeypatch.chdir(tmp_path)
    pipeline.save_pretrained("run")
    Path("run", "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n')
    Path("model.yaml").write_text("model:\n  target: ldm.models.diffusion.ddpm.DDPM\n  params: {}\n")
    Path("photos").mkdir()
    for level in range(3):
        Image.new("RGB", (8, 8), (level * 90, 0, 0)).save(Path("photos") / f"{level}.png")
    return contents()


def contents() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(Path().rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    "place", ["run/metrics.jsonl", "run/unet/diffusion_pytorch_model.safetensors", "new.docx", "new"]
)
@pytest.mark.parametrize("name", LINES)
def test_other_types_are_refused(name, place, files, capsys):
    line, allowed = LINES[name]
    assert cli.main([*line, place]) == 2
    error = capsys.readouterr().err
    assert f"{line[-1]} {place} must end in {allowed}" in error
    assert error.count("\n") == 1
    assert contents() == files


@pytest.mark.parametrize("name", LINES)
def test_places_that_do_not_exist(name, files, capsys):
    line, allowed = LINES[name]
    place = f"missing/a{allowed.split()[0].rstrip(',')}"
    assert cli.main([*line, place]) == 2
    assert f"{line[-1]} {place} is in a folder that does not exist" in capsys.readouterr().err
    assert contents() == files


@pytest.mark.parametrize("name", ["data --json", "evaluate --json"])
def test_numbers_do_not_replace_other_json(name, files, capsys):
    line, _ = LINES[name]
    assert cli.main([*line, "run/model_index.json"]) == 2
    assert "run/model_index.json exists and is not a result of this command" in capsys.readouterr().err
    assert contents() == files


def test_numbers_replace_earlier_ones(files):
    for _ in range(2):
        assert cli.main(["data", "photos", "--json", "numbers.JSON"]) in (0, 1)
    assert json.loads(Path("numbers.JSON").read_text())["train"]["images"] == 3


def test_a_checkpoint_does_not_replace_its_base(files, capsys):
    line, _ = LINES["convert --out"]
    Path("new.ckpt").write_bytes(b"original")
    before = contents()
    Path("other.ckpt").symlink_to("new.ckpt")
    assert cli.main([*line, "other.ckpt", "--base", "new.ckpt"]) == 2
    assert "--out other.ckpt is what --base reads" in capsys.readouterr().err
    Path("other.ckpt").unlink()
    assert contents() == before

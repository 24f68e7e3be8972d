"""`ddpm-ext convert`: to a folder, back to a checkpoint, and one-line errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.conversion_cases import FOLDER, random_weights

from diffusers_ddpm_ext import DDPMExtPipeline
from diffusers_ddpm_ext.cli import main
from diffusers_ddpm_ext.compvis.architecture import translate_unet
from diffusers_ddpm_ext.compvis.config.openai import read_flags
from diffusers_ddpm_ext.compvis.weights import export_unet

SOURCE = ["--checkpoint", str(FOLDER / "ema.ckpt"), "--config", str(FOLDER / "ema.yaml")]


def convert(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


def test_convert_check_and_convert_back(tmp_path, capsys):
    folder = tmp_path / "folder"
    assert convert("--from", "compvis", *SOURCE, "--out", folder, "--samples", 4, "--num_inference_steps", 2) == 0
    message = capsys.readouterr().out
    assert "input_blocks.0.0.weight" not in message, "a summary"
    assert len(message.splitlines()) < 40
    assert convert("--from", "compvis", *SOURCE, "--out", folder, "--overwrite", "--verbose", "--samples", 2) == 0
    message = capsys.readouterr().out
    assert "model.diffusion_model" not in message, "UNetModel's own keys"
    assert "input_blocks.0.0.weight" in message
    assert "conv_in.weight" in message
    assert (folder / "samples.png").is_file()
    report = json.loads((folder / "conversion.json").read_text())
    assert report["format"] == 1
    assert report["default"] == "ema"
    assert report["raw_variant"] is True
    assert {row["target"] for row in report["tensors"]["raw"]} == set(
        DDPMExtPipeline.from_pretrained(folder, variant="raw").unet.state_dict()
    )
    assert str(FOLDER) not in json.dumps(report), "no path of this machine"
    assert convert("--check", folder, *SOURCE) == 0
    assert "bit-exact" in capsys.readouterr().out
    assert convert("--to", "compvis", folder, "--out", tmp_path / "back.ckpt") == 0
    made = [tmp_path / "again.ckpt", "--config_out", tmp_path / "again.yaml"]
    assert convert("--to", "compvis", folder, "--out", *made) == 0
    again = ["--checkpoint", tmp_path / "again.ckpt", "--config", tmp_path / "again.yaml"]
    assert convert("--check", folder, *again) == 0, "file and configuration give the same folder"
    theirs = torch.load(FOLDER / "ema.ckpt", weights_only=True)["state_dict"]
    ours = torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_check_reports_a_difference(tmp_path, capsys):
    folder = tmp_path / "folder"
    assert convert("--from", "compvis", *SOURCE, "--out", folder, "--quiet") == 0
    assert "input_blocks" not in capsys.readouterr().out
    pipeline = DDPMExtPipeline.from_pretrained(folder, variant="raw")
    with torch.no_grad():
        pipeline.unet.conv_out.bias[1] += 1e-3
    pipeline.unet.save_pretrained(folder / "unet", variant="raw")
    assert convert("--check", folder, *SOURCE) == 1
    assert "conv_out.bias differs by up to 0.001" in capsys.readouterr().err


def test_openai(tmp_path, capsys):
    flags = {"image_size": 32, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "learn_sigma": True}
    params = read_flags(flags).unet_params
    torch.save(export_unet(random_weights(translate_unet(params).build()), params), tmp_path / "m.pt")
    (tmp_path / "flags.json").write_text(json.dumps(flags))
    source = ["--checkpoint", tmp_path / "m.pt", "--model_flags", tmp_path / "flags.json"]
    assert convert("--from", "openai", *source, "--out", tmp_path / "folder") == 0
    assert "learned_range" in capsys.readouterr().out
    assert convert("--check", tmp_path / "folder", *source) == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--from compvis"),
        (["--from", "torch"], "compvis, openai"),
        (["--from", "compvis"], "--checkpoint and --config"),
        (["--from", "compvis", *SOURCE], "--out is missing"),
        (["--from", "compvis", *SOURCE, "--out", "/nowhere/x"], "does not exist"),
        (["--from", "compvis", *SOURCE, "--out", "F", "--weights", "both"], "--weights"),
        (["--from", "compvis", *SOURCE, "--out", "F", "--weights", "emma"], "auto, ema, raw"),
        (["--from", "compvis", *SOURCE, "--out", "F", "--samples", "-1"], "--samples"),
        (["--from", "compvis", *SOURCE, "--out", "F", "--base", "x"], "--base"),
        (["--from", "compvis", *SOURCE[:2], "--config", "no.yaml", "--out", "F"], "no.yaml does not exist"),
        (["--from", "compvis", *SOURCE[2:], "--checkpoint", __file__, "--out", "F"], "text file"),
        (["--from", "compvis", *SOURCE, "--out", "F", "--chekpoint", "x"], "did you mean --checkpoint"),
        (["--from", "openai", *SOURCE[:2], "--out", "F"], "--model_flags"),
        (["--to", "compvis", "--out", "F.ckpt"], "FOLDER"),
        (["--to", "diffusers", "x", "--out", "F"], "--to 'diffusers' is not"),
        (["--to", "compvis", "nowhere", "--out", "F.ckpt"], "no pipeline"),
        (["--check", "nowhere", *SOURCE], "no pipeline"),
        (["F", "--out", "x"], "without --to"),
    ],
)
def test_mistakes(arguments, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert convert(*arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert expected in message
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_replaced_without_overwrite(tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    for more in ([], ["--overwrite"]):
        assert convert("--from", "compvis", *SOURCE, "--out", folder, *more) == 2
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    other = tmp_path / "other"
    assert convert("--from", "compvis", *SOURCE, "--out", other) == 0
    assert convert("--from", "compvis", *SOURCE, "--out", other) == 2
    assert convert("--from", "compvis", *SOURCE, "--out", other, "--overwrite", "--weights", "raw") == 0
    assert not (other / "unet" / "diffusion_pytorch_model.raw.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "other"]
    assert Path(other / "conversion.json").is_file()

"""Damaged first stages and their configurations: one line and exit status 2, or a result; nothing half-written."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.published_models import FOLDER
from torch import Tensor

from diffusers_ddpm_ext.cli import main
from diffusers_ddpm_ext.compvis.reader.archive import read_tensors

SOURCES = {"whole": "vq_classes", "alone": "kl_f2_first_stage"}
PREFIX = {"whole": "first_stage_model.", "alone": ""}
VALUES: list[Any] = [
    None, -1, 0, 1.5, float("nan"), float("inf"), 2**70, 10**6, "x", "${a.b}", "", True, False, [], [1], {},
    {"a": 1}, [[1]], "1e3", 1e300, "\u202e\x1b[31m", list(range(100)),
]  # fmt: skip
HARMLESS = ("lossconfig", "dropout", "double_z", "resamp_with_conv", "attn_resolutions", "resolution")
"""Keys some of whose other values mean the same autoencoder."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a configuration."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*path, key)
        yield from places(inner, (*path, key))


def damaged_config(kind: str, draw: random.Random, folder: Path) -> tuple[Path, Path, str]:
    content = yaml.safe_load((FOLDER / f"{SOURCES[kind]}.yaml").read_text())
    section = content["model"]["params"]["first_stage_config"] if kind == "whole" else content["model"]
    path, value = draw.choice(list(places(section))), copy.deepcopy(draw.choice(VALUES))
    place = section
    for key in path[:-1]:
        place = place[key]
    if draw.random() < 0.25:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    (folder / "c.yaml").write_text(yaml.safe_dump(content, allow_unicode=True))
    return FOLDER / f"{SOURCES[kind]}.ckpt", folder / "c.yaml", f"{path} {value!r}"


def damaged_bytes(kind: str, draw: random.Random, folder: Path) -> tuple[Path, Path, str]:
    data = bytearray((FOLDER / f"{SOURCES[kind]}.ckpt").read_bytes())
    where, how = draw.randrange(len(data)), draw.choice(["flip", "cut", "zero"])
    if how == "flip":
        data[where] ^= 1 << draw.randrange(8)
    elif how == "cut":
        del data[where:]
    else:
        data[where : where + 4096] = bytes(len(data[where : where + 4096]))
    (folder / "m.ckpt").write_bytes(data)
    return folder / "m.ckpt", FOLDER / f"{SOURCES[kind]}.yaml", f"{how} {where}"


def damaged_tensors(kind: str, draw: random.Random, folder: Path) -> tuple[Path, Path, str]:
    tensors = dict(read_tensors(FOLDER / f"{SOURCES[kind]}.ckpt"))
    key = draw.choice([name for name in tensors if name.startswith(PREFIX[kind])])
    tensor = tensors.pop(key)
    nan = tensor.float().clone()
    nan.view(-1)[-1] = float(draw.choice(["nan", "inf"]))
    changes: dict[str, dict[str, Tensor]] = {
        "missing": {},
        "not finite": {key: nan},
        "longer": {key: torch.cat([tensor, tensor])},
        "integers": {key: tensor.to(torch.int32)},
        "complex": {key: tensor.to(torch.complex64)},
        "renamed": {f"{key}_": tensor},
        "twice": {key: tensor, f"module.{key}": tensor},
        "one more": {key: tensor, f"{PREFIX[kind]}decoder.up.9.conv.weight": tensor},
        "flat": {key: tensor.reshape(-1) if tensor.ndim > 1 else tensor[None]},
        "empty": {key: tensor[:0]},
    }
    how = draw.choice(list(changes))
    torch.save({"state_dict": tensors | changes[how]}, folder / "m.ckpt")
    return folder / "m.ckpt", FOLDER / f"{SOURCES[kind]}.yaml", f"{how} {key}"


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("damage", [damaged_config, damaged_bytes, damaged_tensors], ids=lambda f: f.__name__)
@pytest.mark.parametrize("count", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_one_line_or_a_result(kind, damage, count, tmp_path, capsys):
    draw = random.Random(f"{kind} {damage.__name__} {count}")
    for _ in range(count):
        checkpoint, config, what = damage(kind, draw, tmp_path)
        files = ["--checkpoint", str(checkpoint), "--config", str(config), "--out", str(tmp_path / "out")]
        status = main(["convert", "--from", "compvis", *files, "--overwrite", "--quiet"])
        error = capsys.readouterr().err
        if status == 0:
            assert damage is damaged_config, what
            assert any(name in what for name in HARMLESS), what
            continue
        assert status == 2, what
        lines = error.strip().split("\n")
        assert len(lines) == 1, what
        assert lines[0].startswith("error: "), what
        assert lines[0].isprintable(), what
        assert len(lines[0]) < 800, what
        assert not list(tmp_path.glob(".writing*")), what

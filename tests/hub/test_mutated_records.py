"""Mutations of every record that push, verify, report and plot read: no traceback, and no change goes unnoticed."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import tiny_unet

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, cli
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.hub.card import make_card
from diffusers_ddpm_ext.hub.push import _add_card_and_proof
from diffusers_ddpm_ext.plotting import chain, curves

VALUES = [
    None, True, 0, -1, 1, 2.5, 1e300, 10**19, 10**25, float("nan"), float("inf"), "", "x", "\x1b[31m", "\ud800",
    "9" * 5000, [], [1], ["x"], {}, {"x": 1}, [[[[]]]], "../..", "é" * 300, "all",
]  # fmt: skip
BYTES = [b"\xff", b"\x00", b"\xef\xbb\xbf", b"[" * 2000, b"}", b'"', b"\n", b"9" * 4000, b",", b"\x1b[2J", b"e999"]
RECORDS = ("proof.json", "metrics.jsonl", "evaluation/evaluation.json", "environment.json", "evaluation/steps.csv")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pushed") / "digits"
    DDPMExtPipeline(tiny_unet(1), DDPMExtScheduler(20)).save_pretrained(folder)
    (folder / "metrics.jsonl").write_text(
        '{"step": 7, "train/loss_simple": 0.5}\n{"step": 9, "val/loss_simple": 0.25}\n'
    )
    (folder / "evaluation").mkdir()
    facts = {"bits_per_dim": 3.25, "low": 3.0, "high": 3.5, "num_images": 9, "prior": 0.5, "steps": 2.5}
    facts |= {"decoder": 0.25, "chain": 20, "chain_timesteps": [0, 19], "bin_width": 0.125, "decoder_kind": "exact"}
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps(facts))
    (folder / "evaluation" / "steps.csv").write_text("timestep,bits_per_dim,draws\n0,0.25,9\n5,1.5,9\n19,0.5,9\n")
    data = {
        "name": "digits",
        "train": 90,
        "validation": 9,
        "fingerprint": "abc",
        "classes": [{"name": "a", "images": 9}],
    }
    environment = {"python": "3.11", "packages": {"torch": "2.13"}, "device": "cpu", "data": data}
    (folder / "environment.json").write_text(json.dumps(environment))
    _add_card_and_proof(folder, "alice/digits", None, True)
    return folder


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a JSON value, with each of its keys."""
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [(value, key) for key, _ in items] + [place for _, item in items for place in places(item)]


def mutated(rng: random.Random, content: bytes, name: str) -> bytes:
    """A record with one value, key or byte changed, within its structure three times out of four."""
    lines = content.decode().splitlines(keepends=True)
    if name.endswith(".csv") and rng.random() < 0.75:
        row = rng.randrange(len(lines))
        cells = lines[row].rstrip("\n").split(",")
        cells[rng.randrange(len(cells))] = str(rng.choice(VALUES)).encode("utf-8", "replace").decode()
        lines[row] = ",".join(cells) + "\n"
        return "".join(lines).encode()
    if not name.endswith(".csv") and rng.random() < 0.75:
        row = rng.randrange(len(lines)) if name.endswith(".jsonl") else None
        value = json.loads(content if row is None else lines[row])
        root = [value]
        container, key = rng.choice([(root, 0), *places(value)])
        kind = rng.choice(["value", "value", "value", "delete", "rename"])
        if kind == "value" or isinstance(container, list):
            container[key] = copy.deepcopy(rng.choice(VALUES))
        else:
            moved = container.pop(key)
            if kind == "rename":
                container[str(rng.choice(VALUES))[:300]] = moved
        text = (
            json.dumps(root[0])
            if row is None
            else "".join([*lines[:row], json.dumps(root[0]) + "\n", *lines[row + 1 :]])
        )
        return text.encode()
    at, added = rng.randrange(len(content) + 1), rng.choice([*BYTES, b""])
    return content[:at] + added + content[at + rng.choice([0, 1, 1, 9]) :]


def resealed(content: bytes) -> bytes:
    """A proof with the right seal of its changed content; as it is where it has no content."""
    try:
        proof = json.loads(content)
        proof.pop("sha256", None)
        text = json.dumps(proof, indent=1, sort_keys=True) + "\n"
    except (ValueError, AttributeError, TypeError):
        return content
    return (
        json.dumps(proof | {"sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=1, sort_keys=True) + "\n"
    ).encode()


def run(seed: int, made: Path, folder: Path, capsys) -> str:
    """One mutation and all that reads it; the outcome, for the count."""
    rng = random.Random(seed)
    name = rng.choice(RECORDS)
    original = (made / name).read_bytes()
    content = mutated(rng, original, name)
    if name == "proof.json" and rng.random() < 0.6:
        content = resealed(content)
    shutil.copytree(made, folder)
    (folder / name).write_bytes(content)
    statuses = [cli.main(["verify", str(folder)])]
    err = capsys.readouterr().err
    assert (statuses[0] == 0) == (content == original), f"{seed}: verify ended with {statuses[0]}: {err}"
    statuses += [cli.main(["report", str(folder)]), cli.main(["plot", str(folder), "--out", str(folder / "plots")])]
    assert statuses[1] == 0, seed
    assert statuses[2] in (0, 2), seed
    out = capsys.readouterr()
    text = err + out.err + out.out
    assert "Traceback" not in text
    assert "\x1b" not in text
    try:
        make_card(folder, "alice/digits")
    except ConfigError:
        assert name not in RECORDS, f"{seed}: a record stops the card"
    page = (folder / "report.html").read_text()
    shown = [part for part in ("3.2500", "digits: 90", "0.25000") if part in page]
    capsys.readouterr()
    if "warning" not in out.err:  # then all of it is on the page, or was changed to what may stand there
        assert len(shown) >= 2, seed
    return f"{name} {statuses}"


def run_all(seeds, made, tmp_path, capsys, monkeypatch) -> Counter:
    def quick(path, draw):
        Path(path).write_bytes((made / "card" / "samples.png").read_bytes())
        return Path(path)

    monkeypatch.setattr(chain, "save_figure", quick)
    monkeypatch.setattr(curves, "save_figure", quick)
    outcomes: Counter = Counter()
    for seed in seeds:
        folder = tmp_path / "digits"
        outcomes[run(seed, made, folder, capsys)] += 1
        shutil.rmtree(folder)
    return outcomes


def test_mutations(made, tmp_path, capsys, monkeypatch):
    outcomes = run_all(range(60), made, tmp_path, capsys, monkeypatch)
    assert len(outcomes) >= 5


@pytest.mark.slow
def test_more_mutations(made, tmp_path, capsys, monkeypatch):
    outcomes = run_all(range(1000, 2000), made, tmp_path, capsys, monkeypatch)
    assert sum(outcomes.values()) == 1000
    assert len(outcomes) >= 10, outcomes

"""Captions on their way to the network: each image keeps its own, for every source, key and split of the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from helpers.accelerate_state import fresh_accelerate, reset_accelerate  # noqa: F401
from helpers.caption_runs import COLORS, write_pictures
from helpers.paths import PYTHONPATH
from helpers.runs import TINY, rows, tiny_run
from helpers.text_models import save_text_model

from diffusers_ddpm_ext.training.loop.batches import open_batches
from diffusers_ddpm_ext.training.loop.setup import Setup, build_setup


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_text_model(tmp_path_factory.mktemp("text") / "encoder"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of one color each, with their captions in every place that a run reads."""
    folder = write_pictures(tmp_path_factory.mktemp("data") / "pictures", count=12)
    lines = []
    for line in (folder / "metadata.jsonl").read_text().splitlines():
        row = json.loads(line)
        name, color = row["file_name"], row["text"][0]
        (folder / color).mkdir(exist_ok=True)
        (folder / name).rename(folder / color / name)
        (folder / color / name).with_suffix(".txt").write_text(f"{color}\na {color} dog\n")
        lines.append(row | {"file_name": f"{color}/{name}", "kind": color, "hint": f"{color}/{name}"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def setup_of(folder: Path, encoder: str, **options: Any) -> Setup:
    reset_accelerate()
    chosen = {"caption_column": "text", "text_encoder": encoder, "validation_fraction": 0.25, "train_batch_size": 6}
    return build_setup(tiny_run(folder, **chosen | options))


def captions_and_colors(setup: Setup, steps: int) -> list[tuple[str, str]]:
    """The caption of each sample of some steps, and the color of its pixels."""
    pairs = []
    batches = open_batches(setup, 0)
    for _ in range(steps):
        batch = next(batches)
        texts = setup.data.captions.texts(batch.conditions.captions)
        pairs += zip(texts, color_names(batch.pixels), strict=True)
    return pairs


def color_names(pixels: torch.Tensor) -> list[str]:
    return [COLORS[number] for number in pixels.mean((2, 3)).argmax(1).tolist()]


@pytest.mark.parametrize(
    ("column", "captions"), [("text", {"{}", "a {} cat"}), ("txt", {"{}", "a {} dog"}), ("folder", {"{}"})]
)
def test_each_image_of_a_folder_keeps_its_captions(column, captions, encoder, pictures, tmp_path):
    setup = setup_of(tmp_path, encoder, train_data_dir=str(pictures), caption_column=column, random_flip=True)
    pairs = captions_and_colors(setup, 12)
    assert {color for _, color in pairs} == set(COLORS)
    for color in COLORS:
        assert {text for text, own in pairs if own == color} == {text.format(color) for text in captions}
    held_out = setup.data.validation
    first = setup.data.captions.texts(held_out.conditions(range(len(held_out))).captions)
    assert first == color_names(held_out.pixels(range(len(held_out))))


def test_each_image_of_a_dataset_keeps_its_captions(encoder, pictures, tmp_path):
    files = sorted(pictures.glob("*/*.png"))
    table = datasets.Dataset.from_dict(
        {"image": [str(file) for file in files], "text": [[f"{f.parent.name} cat", f.parent.name] for f in files]}
    )
    table.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    setup = setup_of(tmp_path / "run", encoder, dataset_name=str(tmp_path / "saved"))
    pairs = captions_and_colors(setup, 12)
    assert all(text in (color, f"{color} cat") for text, color in pairs)
    assert len(set(pairs)) == 6


def test_an_image_that_is_left_out_shifts_no_caption(encoder, pictures, tmp_path):
    folder = tmp_path / "pictures"
    for file in sorted(pictures.glob("*/*.png")):
        (folder / file.parent.name).mkdir(parents=True, exist_ok=True)
        is_bad = file.stem in ("000", "004", "008")
        (folder / file.parent.name / file.name).write_bytes(b"no image" if is_bad else file.read_bytes())
    (folder / "metadata.jsonl").write_bytes((pictures / "metadata.jsonl").read_bytes())
    setup = setup_of(tmp_path / "run", encoder, train_data_dir=str(folder), skip_bad_images=True)
    assert setup.data.skipped == 3
    assert all(color in text for text, color in captions_and_colors(setup, 8))


@pytest.mark.parametrize("key", ["crossattn", "hybrid", "crossattn-adm", "hybrid-adm"])
def test_captions_beside_classes_and_images(key, encoder, pictures, tmp_path):
    more = {"class_column": "kind"} if "adm" in key else {}
    more |= {"concat_column": "hint"} if "hybrid" in key else {}
    dropout = {"captions": 0.5} | ({"class_labels": 0.5} if "adm" in key else {})
    setup = setup_of(
        tmp_path, encoder, train_data_dir=str(pictures), conditioning_key=key, conditioning_dropout=dropout, **more
    )
    batches = open_batches(setup, 0)
    seen = set()
    for _ in range(6):
        batch = next(batches)
        conditions = batch.conditions
        texts = setup.data.captions.texts(conditions.captions)
        colors = color_names(batch.pixels)
        names = [*setup.data.train.columns.class_names, ""]
        classes = [names[label] for label in conditions.class_labels.tolist()] if "adm" in key else colors
        seen |= {(bool(text), bool(name)) for text, name in zip(texts, classes, strict=True)}
        assert all(color in text or not text for text, color in zip(texts, colors, strict=True))
        assert all(name in (color, "") for name, color in zip(classes, colors, strict=True))
        if "hybrid" in key:
            assert torch.equal(conditions.concat_inputs, batch.pixels)
    assert seen == {
        (caption, label) for caption in (False, True) for label in ((False, True) if "adm" in key else (True,))
    }
    loss = setup.task(batch.pixels, batch.pixels, torch.ones(6, dtype=torch.long), batch.conditions).loss
    assert torch.isfinite(loss)


def test_the_digits_recipe_does_not_lend_its_class_column(encoder, pictures, tmp_path):
    """A folder with captions alone has no classes, and nothing is made of the names of its folders."""
    setup = setup_of(tmp_path, encoder, train_data_dir=str(pictures))
    assert setup.data.train.columns.class_labels is None
    assert set(setup.data.captions.texts(range(len(setup.data.captions)))) == {
        "", *COLORS, *(f"a {color} cat" for color in COLORS),
    }  # fmt: skip


@pytest.mark.slow
def test_two_processes_train_on_the_captions_of_one(encoder, pictures, tmp_path):
    """The losses of three steps; captions are drawn anew in each epoch of nine images."""
    options = TINY | {"caption_column": "text", "text_encoder": encoder, "train_data_dir": str(pictures),
                      "conditioning_dropout": {"captions": 0.2}, "max_train_steps": 3, "logging_steps": 1}  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
    losses = []
    for processes in (1, 2):
        config, folder = tmp_path / f"{processes}.yaml", tmp_path / str(processes)
        config.write_text(json.dumps(options | {"train_batch_size": 8 // processes, "output_dir": str(folder)}))
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [*launcher, "-m", "diffusers_ddpm_ext", "train", "--config", str(config)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        losses.append([row["train/loss"] for row in rows(folder) if "train/loss" in row])
    assert len(losses[0]) == 3
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)

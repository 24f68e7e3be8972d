"""Labels are names: what is a class number and what a name, and which values are refused by row."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers.runs import tiny_run
from PIL import Image

from diffusers_ddpm_ext import DDPMExtPipeline
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.training.data.class_labels import MAX_CLASSES
from diffusers_ddpm_ext.training.data.class_table import ClassCount, count_classes, describe_classes
from diffusers_ddpm_ext.training.data.dataset import load_data
from diffusers_ddpm_ext.training.factory.parts import build_parts

RNG = np.random.default_rng(0)


def picture() -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8))


def save(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture().save(path)


def load(**options):
    return load_data(DataOptions(**({"resolution": (8, 8), "validation_fraction": 0} | options)), "adm")


def class_of_image(images) -> dict[str, str]:
    labels = images.conditions(range(len(images))).class_labels.tolist()
    return {images.name(i): images.columns.class_names[label] for i, label in enumerate(labels)}


def column(folder: Path, values, kind="csv"):
    """The labels of images whose metadata has these values."""
    for number in range(len(values)):
        save(folder / f"{number}.png")
    if kind == "csv":
        with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
            rows = [[f"{number}.png", value] for number, value in enumerate(values)]
            csv.writer(file).writerows([["file_name", "kind"], *rows])
    else:
        rows = [json.dumps({"file_name": f"{number}.png", "kind": value}) for number, value in enumerate(values)]
        (folder / "metadata.jsonl").write_text("\n".join(rows))
    return load(train_data_dir=str(folder), class_column="kind").train.columns.class_labels


@pytest.mark.parametrize(
    "names",
    [
        ("1", "01", "1.0", "1_0", "١", "+1", "1e0"),
        ("nan", "NaN", "inf", "Infinity", "1e400", "-1"),
        ("2019", "2020", "10000000000", "True", "None", "null"),
        ("0x10", "1,000", "½", "²", "٣", "一"),
        ("cafe\u0301", "caf\u00e9", "cat.png", "a, b", " cat", "cat"),
    ],
)
def test_folder_names_are_names(names, tmp_path):
    for number, name in enumerate(names):
        save(tmp_path / name / f"{number}.png")
    images = load(train_data_dir=str(tmp_path)).train
    assert class_of_image(images) == {f"{name}/{number}.png": name for number, name in enumerate(names)}
    assert images.columns.class_labels.are_named
    assert sorted(images.columns.class_names) == sorted(names)


def test_numbered_folders_keep_their_numbers(tmp_path):
    for number in range(12):
        save(tmp_path / str(number) / "a.png")
    images = load(train_data_dir=str(tmp_path)).train
    assert [images.columns.class_names[i] for i in range(12)] == [str(i) for i in range(12)]


def test_an_image_outside_the_folders_of_classes_is_named(tmp_path):
    save(tmp_path / "cat" / "a.png")
    save(tmp_path / "stray.png")
    with pytest.raises(ConfigError, match=r"'stray.png' .* no subfolder"):
        load(train_data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "values", "labels", "names"),
    [
        ("csv", ["0", "7", "12"], [0, 7, 12], None),
        ("csv", [" 3", "1\t", "2"], [3, 1, 2], None),
        ("csv", ["10", "9", "a"], [0, 1, 2], ["10", "9", "a"]),
        ("csv", ["1", "01", "001"], [2, 1, 0], ["001", "01", "1"]),
        ("csv", ["1.0", "2.0", "1e0"], [0, 2, 1], ["1.0", "1e0", "2.0"]),
        ("csv", ["1_0", "10", "٣"], [1, 0, 2], ["10", "1_0", "٣"]),
        ("csv", ["0.png", "1.png", "2.png"], [0, 1, 2], ["0.png", "1.png", "2.png"]),
        ("jsonl", [0, 2, 1], [0, 2, 1], None),
        ("jsonl", [0, "1", 1], [0, 1, 1], None),
        ("jsonl", [5, "dog", "5"], [0, 1, 0], ["5", "dog"]),
    ],
)
def test_a_column_has_plain_decimal_integers_or_names(kind, values, labels, names, tmp_path):
    result = column(tmp_path, values, kind)
    assert result.labels.tolist() == labels
    assert result.are_named == (names is not None)
    assert list(result.names) == (names or [str(number) for number in range(max(labels) + 1)])


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        ("csv", "nan", "nan"),
        ("csv", "-Infinity", "-Infinity"),
        ("csv", "1e400", "1e400"),
        ("csv", "-2.5E+999", "-2.5E"),
        ("csv", "  ", "empty"),
        ("csv", "-3", "begin at 0"),
        ("csv", str(MAX_CLASSES), "below 100,000"),
        ("csv", "10000000000", "below 100,000"),
        ("csv", "9" * 4000, "4,000 characters"),
        ("jsonl", float("nan"), "nan"),
        ("jsonl", float("inf"), "inf"),
        ("jsonl", 1.5, "fraction"),
        ("jsonl", True, "bool"),
        ("jsonl", None, "no value"),
        ("jsonl", [], "list"),
        ("jsonl", {"id": 3}, "dict"),
        ("jsonl", 10**18, "below 100,000"),
        ("jsonl", 10**40, "41 digits"),
        ("jsonl", "\ud800", "valid Unicode"),
    ],
)
def test_what_is_no_class_is_refused_by_row(kind, wrong, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as caught:
        column(tmp_path, ["0" if kind == "csv" else 0, wrong, "1" if kind == "csv" else 1], kind)
    assert "1.png" in str(caught.value) or "line 2" in str(caught.value)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ([[1, 2], [3]], "1.png.*list of 2 numbers"),
        ([[1, 2], [3, float("nan")]], "1.png.*float32"),
        ([[1, 2], [3, 1e300]], "1.png.*float32"),
        ([[1, 2], [3, True]], "1.png.*not a number"),
        ([[1, 2], 3], "1.png.*list of 2 numbers"),
        ([[1, 2], ["3", "4"]], "1.png.*not a number"),
        ([[], []], "0.png"),
    ],
)
def test_label_vectors_are_finite_and_of_one_width(vectors, message, tmp_path):
    assert column(tmp_path / "right", [[0.5, 1], [2, 3]], "jsonl").labels.tolist() == [[0.5, 1], [2, 3]]
    with pytest.raises(ConfigError, match=message):
        column(tmp_path / "wrong", vectors, "jsonl")


def saved_dataset(folder: Path, values, feature, **splits) -> str:
    def split(values, feature):
        data = {"image": [picture() for _ in values], "kind": list(values)}
        return datasets.Dataset.from_dict(data, features=datasets.Features(image=datasets.Image(), kind=feature))

    parts = {"train": split(values, feature)} | {name: split(*part) for name, part in splits.items()}
    datasets.DatasetDict(parts).save_to_disk(str(folder))
    return str(folder)


def test_the_names_of_a_class_label_are_kept(tmp_path):
    """A class without images keeps its number, and another split may declare the names in another order."""
    feature = datasets.ClassLabel(names=["cat", "dog", "emu", "fox"])
    other = datasets.ClassLabel(names=["dog", "cat"])
    name = saved_dataset(tmp_path / "d", [2, 0, 1], feature, test=([0, 1], other))
    data = load(dataset_name=name, class_column="kind", validation_split="test")
    assert data.train.columns.labels.tolist() == [2, 0, 1]
    assert list(data.train.columns.class_names) == ["cat", "dog", "emu", "fox"]
    assert data.validation.columns.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("values", "feature", "message"),
    [
        ([0, -1], datasets.ClassLabel(names=["cat", "dog"]), "row 1 has no class"),
        ([0, None], datasets.ClassLabel(names=["cat", "dog"]), "row 1 has no class"),
        ([0.0, 1.5], datasets.Value("float32"), "row 0 .*fraction"),
        ([True, False], datasets.Value("bool"), "row 0 .*bool"),
        ([1, 2], datasets.Value("timestamp[s]"), "row 0 .*datetime"),
        ([b"a", b"b"], datasets.Value("binary"), "row 0 .*bytes"),
        (["a", ""], datasets.Value("string"), "row 1 .*empty"),
    ],
)
def test_columns_of_datasets_are_refused_by_row(values, feature, message, tmp_path):
    name = saved_dataset(tmp_path / "d", values, feature)
    with pytest.raises(ConfigError, match=message):
        load(dataset_name=name, class_column="kind")


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        (["1", "cat"], ["1", "1"], None),  # names, although those to validate on are all numbers
        (["0", "1"], ["1", "2"], "classes 0 to 1"),
        (["0", "1"], ["cat", "0"], "have numbers"),
        (["cat", "dog"], ["cat", "cow"], "cow"),
    ],
)
def test_validation_images_have_the_classes_of_the_training_images(train, validation, message, tmp_path):
    column(tmp_path / "train", train)
    column(tmp_path / "val", validation)
    places = {"train_data_dir": str(tmp_path / "train"), "validation_data_dir": str(tmp_path / "val")}
    if message is None:
        assert load(**places, class_column="kind").validation.columns.labels.tolist() == [0, 0]
        return
    with pytest.raises(ConfigError, match=message):
        load(**places, class_column="kind")


def test_the_table_of_classes_counts_the_images_of_each(tmp_path):
    """A class that only validation images have, an empty one, and more classes than are shown."""
    save_many = {"train": [3] * 5 + [0, 0, 7], "val": [5, 3]}
    for part, values in save_many.items():
        column(tmp_path / part, [str(value) for value in values])
    data = load(train_data_dir=str(tmp_path / "train"), validation_data_dir=str(tmp_path / "val"), class_column="kind")
    counts = count_classes(data)
    assert [(each.name, each.train, each.validation) for each in counts if each.train or each.validation] == [
        ("0", 2, 0), ("3", 5, 1), ("5", 0, 1), ("7", 1, 0),
    ]  # fmt: skip
    text = describe_classes(counts)
    assert text.splitlines()[0] == "4 classes, and 4 without images"
    assert text.splitlines()[-1] == "  no image to train on: 5"
    many = [ClassCount(f"\x1b{number}", number, 0) for number in range(1, 31)]
    lines = describe_classes(many).splitlines()
    assert lines[-1] == "  and 10 more classes with 21 to 30 images to train on"
    assert len({len(line) for line in lines[1:-1]}) == 1, "aligned"
    assert "\x1b" not in "".join(lines)


def test_names_of_classes_reach_the_pipeline_and_its_folder(tmp_path):
    for number, name in enumerate(("Food", "a, b", "7")):
        save(tmp_path / "images" / name / f"{number}.png")
    images = load(train_data_dir=str(tmp_path / "images")).train
    config = tiny_run(tmp_path / "run", train_data_dir=str(tmp_path / "images"), conditioning_key="adm")
    parts = build_parts(config, images)
    pipeline = DDPMExtPipeline(parts.denoiser, parts.scheduler, **parts.pipeline_kwargs)
    pipeline.save_pretrained(tmp_path / "saved")
    loaded = DDPMExtPipeline.from_pretrained(tmp_path / "saved")
    assert loaded.class_names == pipeline.class_names == {0: "7", 1: "Food", 2: "a, b"}
    for one in (pipeline, loaded):
        one.set_progress_bar_config(disable=True)

    def sample(labels):
        generator = [torch.Generator().manual_seed(seed) for seed in range(3)]
        return loaded(class_labels=labels, generator=generator, num_inference_steps=2, output_type="np").images

    assert np.array_equal(sample(["Food", "a, b", 0]), sample([1, 2, 0]))
    with pytest.raises(ValueError, match='did you mean "Food"'):
        loaded(class_labels="food!", num_inference_steps=2)

"""Mixtures of folders and datasets, and balanced classes: which images, classes and shares a run has."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ddpm_ext.cli.evaluate import parse_evaluate_args
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.training.config.train_config import TrainConfig, data_options, parse_train_args
from diffusers_ddpm_ext.training.data.batches import batch_stream
from diffusers_ddpm_ext.training.data.dataset import load_data


def picture(level, mode="RGB"):
    return Image.fromarray(np.full((10, 10, 3), level, np.uint8)).convert(mode)


def write_folder(root, classes, mode="RGB", first=0):
    """A folder of pictures, each of one level, that counts on from ``first``; ``classes`` has their numbers."""
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            picture(first + index, mode).save(root / name / f"{index:02d}.png")
        first += count
    return str(root)


@pytest.fixture
def folders(tmp_path):
    return (
        write_folder(tmp_path / "pets", {"cat": 30, "dog": 10}),
        write_folder(tmp_path / "wild", {"dog": 5, "fox": 8}, first=100),
    )


def options_of(folders, **options):
    return DataOptions(**({"train_data_dir": folders, "resolution": (8, 8), "center_crop": True} | options))


def levels_of(images):
    """The level of each image of a set."""
    return images.load_levels(range(len(images))).values[:, 0, 0, 0].tolist()


def drawn(data, steps, batch=8, **options):
    """How often each level is drawn."""
    pixels = torch.cat([b.pixels[:, 0, 0, 0] for b in islice(batch_stream(data.train, 3, batch, **options), steps)])
    return Counter(((pixels + 1) * 127.5).round().int().tolist())


# ---------------------------------------------------------------- images


def test_a_mixture_has_the_images_of_each_folder_and_holds_out_the_same_ones(folders):
    alone = [load_data(options_of(folder)) for folder in folders]
    data = load_data(options_of(folders))
    assert data.validation is not None
    assert levels_of(data.train) == [level for each in alone for level in levels_of(each.train)]
    assert levels_of(data.validation) == [level for each in alone for level in levels_of(each.validation)]
    assert data.description.startswith(f"48 images of {folders[0]} and {folders[1]} to train on, 5 to validate on")
    assert data.train.name(0).startswith(f"{folders[0]}/cat/")


def test_without_weights_an_epoch_has_every_image_once(folders):
    data = load_data(options_of(folders))
    assert drawn(data, 6) == Counter(levels_of(data.train))


def test_weights_are_the_shares_of_the_samples(folders):
    """12 epochs of 48 samples with weights 1 and 3: 144 and 432, and each image of a folder equally often."""
    data = load_data(options_of(folders, dataset_weights=(1.0, 3.0), random_flip=True))
    counts = drawn(data, 72)
    pets = [counts[level] for level in levels_of(data.train) if level < 100]
    wild = [counts[level] for level in levels_of(data.train) if level >= 100]
    assert (sum(pets), sum(wild)) == (144, 432)
    assert max(pets) - min(pets) <= 1
    assert max(wild) - min(wild) <= 1
    assert f"{folders[0]} (25%) and {folders[1]} (75%)" in data.description


def test_weights_change_how_often_images_are_drawn_and_not_which_there_are(folders):
    plain, weighted = (load_data(options_of(folders, dataset_weights=w)) for w in (None, (1.0, 3.0)))
    assert plain.fingerprint == weighted.fingerprint
    assert plain.validation is not None
    assert weighted.validation is not None
    assert weighted.validation.draws is None
    assert load_data(options_of(folders[::-1])).fingerprint != plain.fingerprint


def test_workers_draw_the_same(folders):
    data = load_data(options_of(folders, dataset_weights=(1.0, 3.0)))
    assert drawn(data, 4, num_workers=1) == drawn(data, 4)


def test_a_mixture_beyond_memory_is_the_same(folders):
    packed, lazy = (load_data(options_of(folders, cache_images="never"), memory_limit=limit) for limit in (10**6, 100))
    assert packed.fingerprint == lazy.fingerprint
    assert levels_of(packed.train) == levels_of(lazy.train)
    assert "too many for memory" in lazy.description


def test_validation_folders_of_a_mixture(folders, tmp_path):
    held_out = (
        write_folder(tmp_path / "v1", {"cat": 2}, first=200),
        write_folder(tmp_path / "v2", {"fox": 3}, first=210),
    )
    data = load_data(options_of(folders, validation_data_dir=held_out), "adm")
    assert data.validation is not None
    assert levels_of(data.validation) == [200, 201, 210, 211, 212]
    assert data.validation.columns is not None
    assert data.validation.columns.labels.tolist() == [0, 0, 2, 2, 2]


def test_channels_must_agree(folders, tmp_path):
    gray = write_folder(tmp_path / "gray", {"owl": 4}, "L")
    with pytest.raises(ConfigError, match=r"differ in channels.*--channels"):
        load_data(options_of((folders[0], gray)))
    assert load_data(options_of((folders[0], gray), channels=1)).channels == 1


# ---------------------------------------------------------------- classes


def test_classes_of_the_same_name_are_the_same_class(folders):
    data = load_data(options_of(folders, validation_fraction=0), "adm")
    columns = data.train.columns
    assert columns is not None
    assert columns.class_names == ["cat", "dog", "fox"]
    by_level = dict(zip(levels_of(data.train), columns.labels.tolist(), strict=True))
    assert [by_level[level] for level in (0, 29, 30, 39, 100, 104, 105, 112)] == [0, 0, 1, 1, 1, 1, 2, 2]


def save_dataset(path, names, labels, feature=None):
    features = datasets.Features({"image": datasets.Image(), "label": feature or datasets.ClassLabel(names=names)})
    rows = {"image": [picture(index) for index in range(len(labels))], "label": labels}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(path))
    return str(path)


def test_datasets_that_declare_classes_in_another_order(tmp_path):
    first = save_dataset(tmp_path / "one", ["fox", "cat"], [0, 1, 1])
    second = save_dataset(tmp_path / "two", ["cat", "owl", "fox"], [0, 1, 2])
    options = DataOptions(dataset_name=(first, second), resolution=(8, 8), class_column="label", validation_fraction=0)
    columns = load_data(options, "adm").train.columns
    assert columns is not None
    assert columns.class_names == ["cat", "fox", "owl"]
    assert columns.labels.tolist() == [1, 0, 0, 0, 2, 1]


def test_numbers_beside_names_are_refused(tmp_path):
    first = save_dataset(tmp_path / "one", ["fox", "cat"], [0, 1, 1])
    second = save_dataset(tmp_path / "two", [], [0, 1, 2], datasets.Value("int64"))
    options = DataOptions(dataset_name=(first, second), resolution=(8, 8), class_column="label")
    with pytest.raises(ConfigError, match=r"classes of --dataset_name '.*one' are names, those of .*two' numbers"):
        load_data(options, "adm")


def test_columns_and_configurations_are_one_for_all_or_one_each(tmp_path):
    first, second = str(tmp_path / "one"), str(tmp_path / "two")
    for path, column in ((first, "picture"), (second, "photo")):
        rows = {column: [picture(1), picture(2)], "mask": [picture(3), picture(4)]}
        features = datasets.Features({name: datasets.Image() for name in rows})
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(path)
    options = {"dataset_name": (first, second), "resolution": (8, 8), "validation_fraction": 0}
    data = load_data(DataOptions(**options, image_column=("picture", "photo")))
    assert levels_of(data.train) == [1, 2, 1, 2]
    assert levels_of(load_data(DataOptions(**options, image_column="mask")).train) == [3, 4, 3, 4]
    with pytest.raises(ConfigError, match=r"--image_column 'picture': .*two.* has the columns photo, mask"):
        load_data(DataOptions(**options, image_column="picture"))


def test_class_balance_draws_each_class_equally_often(folders):
    data = load_data(options_of(folders, class_balance=True, validation_fraction=0))
    counts = drawn(data, 3 * 53, batch=1)
    classes = [sum(counts[level] for level in levels) for levels in (range(30), [*range(30, 40), *range(100, 105)])]
    assert classes == [53, 53]
    assert sum(counts[level] for level in range(105, 113)) == 53
    assert data.train.columns is None  # an unconditional network gets no labels
    assert "each class equally often" in data.description


def test_class_balance_of_a_conditional_run(folders):
    data = load_data(options_of(folders[0], class_balance=True), "adm")
    labels = torch.cat([b.conditions.class_labels for b in islice(batch_stream(data.train, 0, 36), 4)])
    assert labels.bincount().tolist() == [72, 72]


def test_class_balance_of_the_digits():
    data = load_data(DataOptions(resolution=(8, 8), class_balance=True))
    assert data.train.draws is not None
    assert len(data.train.draws.groups) == 10


@pytest.mark.parametrize(
    ("classes", "options", "message"),
    [
        ({"": 4}, {}, "has no class, since it is in no subfolder"),
        ({"cat": 4}, {}, "all images to train on are of one class, cat"),
        ({"cat": 4, "dog": 4}, {"class_column": "kind"}, "metadata"),
    ],
)
def test_class_balance_needs_classes(tmp_path, classes, options, message):
    folder = write_folder(tmp_path / "photos", classes) if classes != {"": 4} else str(tmp_path)
    for index in range(4 if "" in classes else 0):
        picture(index).save(tmp_path / f"{index}.png")
    with pytest.raises(ConfigError, match=message):
        load_data(options_of(folder, class_balance=True, **options))


def test_class_balance_refuses_vectors_and_a_missing_column(tmp_path):
    feature = datasets.Sequence(datasets.Value("float32"), length=2)
    path = save_dataset(tmp_path / "one", [], [[0.0, 1.0], [1.0, 0.0]], feature)
    options = {"dataset_name": path, "resolution": (8, 8), "class_balance": True}
    with pytest.raises(ConfigError, match="--class_column label are vectors"):
        load_data(DataOptions(**options, class_column="label"))
    with pytest.raises(ConfigError, match="--class_balance needs --class_column"):
        load_data(DataOptions(**options))


# ---------------------------------------------------------------- options


def test_one_name_stays_a_text_and_several_become_a_list(folders, tmp_path):
    spaced = write_folder(tmp_path / "my photos", {"cat": 2})
    config = parse_train_args(["--train_data_dir", spaced])
    assert config.data.train_data_dir == spaced
    config.write_resolved(tmp_path / "one.yaml")
    assert f"train_data_dir: {spaced}\n" in (tmp_path / "one.yaml").read_text()
    assert TrainConfig.from_flat({"train_data_dir": [spaced]}) == config
    config = parse_train_args(["--train_data_dir", *folders, spaced, "--dataset_weights", "3", "1", "0.5"])
    assert config.data.train_data_dir == (*folders, spaced)
    assert config.data.dataset_weights == (3, 1, 0.5)
    config.write_resolved(tmp_path / "three.yaml")
    assert parse_train_args(["--config", str(tmp_path / "three.yaml")]) == config


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["A", "B", "--dataset_weights", "3"], "--dataset_weights has 1 number for 2 names of --train_data_dir"),
        (["A", "B", "--dataset_weights", "3", "1", "2"], "has 3 numbers for 2 names"),
        (["A", "B", "--dataset_weights", "3", "0"], "--dataset_weights must be above 0, got 0"),
        (["A", "B", "--dataset_weights", "3", "-1"], "must be above 0, got -1"),
        (["A", "B", "--dataset_weights", "3", "nan"], "--dataset_weights takes numbers, got '3 nan'"),
        (["A", "B", "--dataset_weights", "many"], "--dataset_weights takes numbers, got 'many'"),
        (["A", "--dataset_weights", "3"], "no effect without several folders"),
        (["A", "B", "--dataset_weights", "1", "2", "--class_balance"], "--class_balance and --dataset_weights both"),
        (["A", "A"], "--train_data_dir names A twice"),
        (["A", "./A"], "--train_data_dir names ./A twice"),
        (["A", "A/cat"], "A/cat is inside A"),
        (["A", "nowhere"], "--train_data_dir nowhere does not exist"),
        (["A", ""], "--train_data_dir takes text"),
        (["A", "--validation_data_dir", "B", "B"], "--validation_data_dir names B twice"),
        (["A", "--class_balance", "maybe"], "--class_balance takes true or false"),
    ],
)
def test_contradictions_are_refused(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    for name in ("A", "B"):
        write_folder(tmp_path / name, {"cat": 2})
    with pytest.raises(ConfigError) as caught:
        parse_train_args(["--train_data_dir", *flags])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_same_dataset_in_two_configurations(tmp_path):
    parse_train_args(["--dataset_name", "user/x", "user/x", "--dataset_config_name", "en", "fr"])
    for flags in (["--dataset_config_name", "en"], ["--dataset_config_name", "en", "en"], []):
        with pytest.raises(ConfigError, match="names user/x twice"):
            parse_train_args(["--dataset_name", "user/x", "user/x", *flags])
    with pytest.raises(ConfigError, match="--image_column has 3 names for 2 names of --dataset_name"):
        parse_train_args(["--dataset_name", "user/x", "user/y", "--image_column", "a", "b", "c"])


def test_a_measurement_takes_the_sources_of_a_run_and_none_of_its_weights(folders, tmp_path):
    flags = ["--train_data_dir", *folders, "--dataset_weights", "3", "1"]
    parse_train_args(flags).write_resolved(tmp_path / "config.yaml")
    options = data_options(tmp_path / "config.yaml", {}, {})
    assert (options.data_dirs, options.dataset_weights) == (folders, None)
    assert data_options(tmp_path / "config.yaml", {"train_data_dir": folders[0]}, {}).data_dirs == (folders[0],)
    for name, value in (("dataset_weights", (3.0, 1.0)), ("class_balance", True)):
        with pytest.raises(ConfigError, match=f"--{name} has no effect on a measurement"):
            data_options(tmp_path / "config.yaml", {name: value}, {})


def test_a_folder_after_the_flag_is_still_the_folder_of_evaluate():
    """`evaluate --train_data_dir photos runs/x` was valid before the flag took several folders."""
    options = parse_evaluate_args(["--train_data_dir", "photos", "runs/x"])
    assert options.folder == "runs/x"
    assert options.data == {"train_data_dir": "photos"}

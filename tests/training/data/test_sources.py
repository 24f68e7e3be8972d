"""Folders and datasets: which images they have, in which order, which are held out, and the messages of failures."""

from __future__ import annotations

import os
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from diffusers_ddpm_ext.errors import ConfigError, RunError
from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.training.data.augmentation import NO_AUGMENTATION
from diffusers_ddpm_ext.training.data.batches import batch_stream
from diffusers_ddpm_ext.training.data.dataset import load_data
from diffusers_ddpm_ext.training.data.sources import open_dataset_split, scan_folder

RNG = np.random.default_rng(0)


def save(path, mode="RGB", size=(20, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    kind = {"jpg": "JPEG", "jpeg": "JPEG"}.get(path.suffix[1:].lower(), path.suffix[1:].upper())
    Image.fromarray(levels).convert(mode).save(path, kind)


def folder_options(folder, **options):
    return DataOptions(**({"train_data_dir": str(folder), "resolution": (8, 8)} | options))


@pytest.fixture
def photos(tmp_path):
    """28 color tiles of scikit-learn's two photographs, in mixed sizes and formats."""
    kinds = ["jpg", "png", "webp", "gif", "bmp", "JPEG", "tiff"]
    for number, photo in enumerate(load_sample_images().images):
        for k in range(14):
            height, width = RNG.integers(40, 200, 2)
            top, left = RNG.integers(0, photo.shape[0] - height), RNG.integers(0, photo.shape[1] - width)
            path = tmp_path / "photos" / f"scene {number}" / f"tile{k:02d}.{kinds[k % 7]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photo[top : top + height, left : left + width]).save(path)
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
    return tmp_path / "photos"


# ---------------------------------------------------------------- folders


def test_a_folder_of_photographs(photos):
    data = load_data(folder_options(photos, resolution=(32, 32), random_flip=True))
    assert data.validation is not None
    assert (len(data.train), len(data.validation)) == (25, 3)
    assert (data.channels, data.size) == (3, (32, 32))
    assert data.description == (
        f"25 images of {photos} to train on, 3 to validate on, 32x32, 3 channels, random crop, random flip"
    )
    batch = next(batch_stream(data.train, 0, 25))
    assert batch.pixels.shape == (25, 3, 32, 32)
    assert batch.pixels.std() > 0.3
    whole = np.concatenate([photo.reshape(-1, 3) for photo in load_sample_images().images]).mean(0) / 127.5 - 1
    assert batch.pixels.mean((0, 2, 3)).numpy() == pytest.approx(whole, abs=0.35)


def test_nested_folders_any_case_no_hidden_files(tmp_path):
    wanted = ["B.PNG", "a/x.jpg", "a/y/z.Jpeg", "test/c.webp", "train/d.bmp", "ä ö.png"]
    for name in [*wanted, ".hidden.png", ".trash/x.png", "__MACOSX/a.png"]:
        save(tmp_path / name)
    for name in ["labels.csv", "a/readme", "Thumbs.db", "video.mpg"]:
        (tmp_path / name).write_bytes(b"x")
    assert scan_folder("--train_data_dir", str(tmp_path)).names == sorted(wanted)


def test_the_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    for name in ["b/1.png", "a/2.png", "c.png", "a/1.png"]:
        save(tmp_path / name)
    expected = scan_folder("x", str(tmp_path)).names
    walk = os.walk

    def backwards(top, **options):
        for place, folders, files in reversed(list(walk(top, **options))):
            yield place, folders, files[::-1]

    monkeypatch.setattr(os, "walk", backwards)
    assert scan_folder("x", str(tmp_path)).names == expected


def test_links_are_followed_and_a_loop_ends(tmp_path):
    save(tmp_path / "data" / "a.png")
    save(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    assert scan_folder("x", str(tmp_path / "data")).names == ["a.png", "more/b.png"]


def test_missing_and_empty_folders(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("x")
    for name, what in [
        ("nowhere", "does not exist: name a folder of images"),
        ("file", "is a file"),
        ("empty", "has no image .it is empty"),
        ("texts", "has no image .none of its 1 files"),
    ]:
        with pytest.raises(ConfigError, match=what) as caught:
            load_data(folder_options(tmp_path / name))
        assert str(tmp_path / name) in str(caught.value)
        assert "--train_data_dir" in str(caught.value)


def test_a_bad_image_stops_and_can_be_skipped(photos):
    (photos / "broken.jpg").write_bytes((photos / "scene 0" / "tile00.jpg").read_bytes()[:200])
    with pytest.raises(ConfigError, match=r"1 of 29 images cannot be read: 'broken.jpg'"):
        load_data(folder_options(photos))
    data = load_data(folder_options(photos, skip_bad_images=True))
    assert len(data.train) == 25
    assert data.skipped == 1
    assert "1 unreadable one left out" in data.description


def test_mixed_channels_in_a_folder(photos):
    save(photos / "gray.png", "L")
    with pytest.raises(ConfigError, match=r"'gray.png' is grayscale \(1\).*--channels"):
        load_data(folder_options(photos))
    for channels in (1, 3, 4):
        assert load_data(folder_options(photos, channels=channels)).channels == channels


def test_impossible_channels_are_refused(photos):
    with pytest.raises(ConfigError, match="--channels 2"):
        load_data(folder_options(photos, channels=2))


def test_small_images_are_enlarged_and_counted(tmp_path):
    for index in range(4):
        save(tmp_path / f"{index}.png", size=(20, 16) if index else (5, 6))
    data = load_data(folder_options(tmp_path, validation_fraction=0))
    assert "1 smaller ones enlarged" in data.description
    assert data.train.pixels(range(4)).shape == (4, 3, 8, 8)


def test_images_beyond_the_memory_limit_are_decoded_again(photos):
    options = folder_options(photos, resolution=(24, 16), random_flip=True, cache_images="never")
    packed, lazy = load_data(options), load_data(options, memory_limit=1000)
    assert packed.fingerprint == lazy.fingerprint
    assert "too many for memory" in lazy.description
    for workers in (0, 2):
        one = batch_stream(packed.train, 3, 10)
        other = batch_stream(lazy.train, 3, 10, num_workers=workers)
        for _ in range(4):
            a, b = next(one), next(other)
            assert torch.equal(a.pixels, b.pixels)
            assert torch.equal(a.indices, b.indices)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_during_the_run_is_named_in_one_line(photos, workers):
    data = load_data(folder_options(photos, validation_fraction=0, cache_images="never"), memory_limit=1000)
    (photos / "scene 0" / "tile03.gif").write_bytes(b"")
    with pytest.raises(RunError, match=r"'scene 0/tile03.gif' of --train_data_dir .* became unreadable") as caught:
        list(batch_stream(data.train, 0, 28, num_workers=workers))
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- held out


def names_of(image_set, names):
    return {names[row] for row in image_set.rows.tolist()}


@pytest.mark.parametrize(
    ("count", "fraction", "held_out"),
    [(20, 0.1, 2), (20, 0.5, 10), (20, 0.0, 0), (3, 0.1, 1), (2, 0.99, 1), (1, 0.1, 0)],
)
def test_a_fraction_is_held_out(tmp_path, count, fraction, held_out):
    for index in range(count):
        save(tmp_path / f"{index}.png")
    data = load_data(folder_options(tmp_path, validation_fraction=fraction))
    assert len(data.train) == count - held_out
    if held_out == 0:
        assert data.validation is None
        return
    assert data.validation is not None
    assert len(data.validation) == held_out
    assert set(data.train.rows.tolist()) | set(data.validation.rows.tolist()) == set(range(count))


def test_few_images_change_sets_when_one_is_added(tmp_path):
    for index in range(60):
        save(tmp_path / f"{index:02d}.png")
    before = load_data(folder_options(tmp_path))
    names = scan_folder("x", str(tmp_path)).names
    held_out = names_of(before.validation, names)
    assert held_out != {f"{index:02d}.png" for index in range(54, 60)}
    save(tmp_path / "00a.png")
    after = names_of(load_data(folder_options(tmp_path)).validation, scan_folder("x", str(tmp_path)).names)
    assert len(held_out - after) <= 1


def test_a_folder_to_validate_on(photos, tmp_path):
    for index in range(5):
        save(tmp_path / "held out" / f"{index}.png")
    data = load_data(folder_options(photos, validation_data_dir=str(tmp_path / "held out"), random_flip=True))
    assert data.validation is not None
    assert (len(data.train), len(data.validation)) == (28, 5)
    assert data.validation.augmentation == NO_AUGMENTATION
    save(tmp_path / "gray" / "0.png", "L")
    with pytest.raises(ConfigError, match="differ in channels"):
        load_data(folder_options(photos, validation_data_dir=str(tmp_path / "gray")))
    with pytest.raises(ConfigError, match=r"--validation_data_dir .*nowhere does not exist: name a folder"):
        load_data(folder_options(photos, validation_data_dir=str(tmp_path / "nowhere")))


# ---------------------------------------------------------------- datasets


def table(count=6, mode="RGB", column="image"):
    images = [Image.fromarray(RNG.integers(0, 256, (12, 10, 3), dtype=np.uint8)).convert(mode) for _ in range(count)]
    features = datasets.Features({column: datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({column: images, "label": list(range(count))}, features=features)


def dataset_options(name, **options):
    return DataOptions(**({"dataset_name": str(name), "resolution": (12, 10), "validation_fraction": 0} | options))


@pytest.mark.parametrize("with_splits", [False, True])
def test_a_dataset_saved_to_disk(tmp_path, with_splits):
    rows = table()
    saved = datasets.DatasetDict({"train": rows, "held": table(3)}) if with_splits else rows
    saved.save_to_disk(tmp_path / "saved")
    data = load_data(dataset_options(tmp_path / "saved"))
    truth = torch.stack([torch.from_numpy(np.array(row["image"])) for row in rows]).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(data.train.pixels(range(6)), truth, atol=1e-6, rtol=0)
    assert "6 images of" in data.description
    if with_splits:
        both = load_data(dataset_options(tmp_path / "saved", validation_split="held"))
        assert both.validation is not None
        assert (len(both.train), len(both.validation)) == (6, 3)
    with pytest.raises(ConfigError, match=r"split 'other', cannot be opened: it has only the splits train"):
        load_data(dataset_options(tmp_path / "saved", validation_split="other"))


def test_a_local_dataset_of_parquet_files(tmp_path):
    (tmp_path / "set" / "data").mkdir(parents=True)
    table(6).to_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    table(2).to_parquet(tmp_path / "set" / "data" / "test-00000-of-00001.parquet")
    options = {"cache_dir": str(tmp_path / "cache")}
    data = load_data(dataset_options(tmp_path / "set", validation_split="test", random_flip=True, **options))
    assert data.validation is not None
    assert (len(data.train), len(data.validation)) == (6, 2)
    assert (tmp_path / "cache").is_dir()
    one, other = (next(batch_stream(data.train, 0, 6, num_workers=workers)) for workers in (0, 1))
    assert torch.equal(one.pixels, other.pixels)
    with pytest.raises(ConfigError, match=r"split 'nothing', cannot be opened: .*nothing") as caught:
        load_data(dataset_options(tmp_path / "set", validation_split="nothing", **options))
    assert "\n" not in str(caught.value)


def test_the_image_column(tmp_path):
    rows = table(column="picture")
    rows.save_to_disk(tmp_path / "one")
    both = datasets.concatenate_datasets([rows, table(column="again").remove_columns("label")], axis=1)
    both.save_to_disk(tmp_path / "two")
    rows.remove_columns("picture").save_to_disk(tmp_path / "none")
    assert open_dataset_split(str(tmp_path / "one"), "train").image_column == "picture"
    assert open_dataset_split(str(tmp_path / "two"), "train", image_column="again").image_column == "again"
    for name, options, what in [
        ("two", {}, r"2 image columns \(picture, again\): choose one by --image_column"),
        ("none", {}, "no image column.*its columns are label"),
        ("one", {"image_column": "photo"}, "--image_column 'photo': .* has the columns picture, label"),
        ("one", {"image_column": "label"}, "--image_column 'label' .* has no images"),
    ]:
        with pytest.raises(ConfigError, match=what):
            open_dataset_split(str(tmp_path / name), "train", **options)


def test_a_missing_dataset_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigError, match="--dataset_name 'nobody/nothing', split 'train', cannot be opened"
    ) as caught:
        load_data(dataset_options("nobody/nothing", cache_dir=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_rows_without_an_image_and_empty_sets(tmp_path):
    features = datasets.Features({"image": datasets.Image()})
    image = table(1)[0]["image"]
    datasets.Dataset.from_dict({"image": [image, None, image]}, features=features).save_to_disk(tmp_path / "holes")
    (tmp_path / "empty").mkdir()
    datasets.Dataset.from_dict({"image": []}, features=features).to_parquet(tmp_path / "empty" / "train.parquet")
    with pytest.raises(ConfigError, match=r"1 of 3 images cannot be read: 'row 1' \(it is empty\)"):
        load_data(dataset_options(tmp_path / "holes"))
    assert len(load_data(dataset_options(tmp_path / "holes", skip_bad_images=True)).train) == 2
    with pytest.raises(ConfigError, match=r"has no rows|corresponds to no data"):
        load_data(dataset_options(tmp_path / "empty", cache_dir=str(tmp_path / "cache")))


def test_without_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install diffusers-ddpm-ext\[hub-datasets\]"):
        load_data(dataset_options("x/y"))

"""Tests of batches of a stream: the images of its rows, with any number of workers, and what replaces broken ones."""

from __future__ import annotations

import io
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ddpm_ext.errors import ConfigError, RunError
from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.training.data.dataset import load_data
from diffusers_ddpm_ext.training.data.streaming.batches import BatchLayout, stream_batches

datasets = pytest.importorskip("datasets")
COUNT = 40


def png(number: int, mode: str = "L") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (4, 4), number if mode == "L" else (number,) * 3).save(file, "PNG")
    return file.getvalue()


def write(path, images, **columns):
    features = {"image": datasets.Image()} | {name: feature for name, (feature, _) in columns.items()}
    values = {name: values for name, (_, values) in columns.items()}
    content = {"image": [{"bytes": image, "path": None} for image in images]} | values
    datasets.Dataset.from_dict(content, features=datasets.Features(features)).to_parquet(path)
    return str(path)


def options(name, **others):
    defaults = {"resolution": (4, 4), "streaming": True, "validation_fraction": None, "shuffle_buffer": 8}
    return DataOptions(dataset_name=name, **(defaults | others))


def batches(data, steps, layout=None, lanes=None, start=0, **arguments):
    layout = layout or BatchLayout(4)
    plan = data.stream.plan(layout.effective_batch)
    decoder = data.stream.decoder(data.train)
    stream = stream_batches(decoder, plan, layout, 0, start_step=start, lanes=lanes, **arguments)
    result = list(islice(stream, (steps - start) * layout.accumulation))
    stream.close()
    return result


def levels(batch):
    return ((batch.pixels[:, 0, 0, 0] + 1) * 127.5).round().long().tolist()


def test_an_epoch_of_pixels_and_classes(tmp_path):
    label = (datasets.ClassLabel(names=["a", "b", "c"]), [number % 3 for number in range(COUNT)])
    name = write(tmp_path / "a.parquet", map(png, range(COUNT)), label=label)
    data = load_data(options(name, class_column="label", validation_examples=4), "adm")
    assert levels_of(data.validation) == [0, 1, 2, 3]
    assert data.train.columns.class_names == ["a", "b", "c"]
    epoch = batches(data, 9)
    seen = [level for batch in epoch for level in levels(batch)]
    assert sorted(seen) == list(range(4, COUNT))
    assert [label for batch in epoch for label in batch.conditions.class_labels.tolist()] == [
        each % 3 for each in seen
    ]
    assert [data.name(int(batch.indices[0])) for batch in epoch] == [
        f"row {levels(batch)[0]} of a.parquet" for batch in epoch
    ]


def levels_of(images):
    return ((images.pixels(range(len(images)))[:, 0, 0, 0] + 1) * 127.5).round().long().tolist()


def test_workers_and_splits_change_no_image(tmp_path):
    generator = np.random.default_rng(0)
    images = []
    for _ in range(COUNT):
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(file, "PNG")
        images.append(file.getvalue())
    data = load_data(options(write(tmp_path / "a.parquet", images), random_flip=True))
    whole = batches(data, 12, BatchLayout(8))
    for layouts, arguments in [
        ([BatchLayout(8)], {"num_workers": 2}),
        ([BatchLayout(2, 2, rank, 2) for rank in range(2)], {}),
    ]:
        parts = [batch for layout in layouts for batch in batches(data, 12, layout, **arguments)]
        for step, batch in enumerate(whole):
            own = [part for part in parts if part.step == step]
            positions = torch.cat([part.positions for part in own])
            assert torch.equal(torch.cat([part.pixels for part in own])[positions.argsort()], batch.pixels)
    lanes = whole[4].lanes
    for resumed, batch in zip(batches(data, 12, BatchLayout(8), lanes, start=5), whole[5:], strict=True):
        assert torch.equal(resumed.pixels, batch.pixels)
        assert resumed.lanes == batch.lanes


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images(tmp_path, workers, capsys):
    broken = {11: b"no image", 12: png(12)[:40], 30: b""}
    images = [broken.get(number, png(number)) for number in range(100)]
    name = write(tmp_path / "a.parquet", images)
    data = load_data(options(name, validation_examples=2, skip_bad_images=True))
    with pytest.raises(
        RunError, match=r"row (11|12|30) of a.parquet of --dataset_name .* cannot be read: .*; repair it"
    ):
        batches(data, 25, num_workers=workers)
    whole = batches(data, 24, replaces_bad=True, num_workers=workers)
    seen = [level for batch in whole for level in levels(batch)]
    assert set(seen).isdisjoint(broken)
    assert len(set(seen)) >= 98 - len(broken) - 2
    warnings = capsys.readouterr().err
    assert all(warnings.count(f"row {number} of a.parquet of") == 1 for number in broken)
    assert "takes its place (--skip_bad_images)" in warnings
    halves = [batch for rank in range(2) for batch in batches(data, 24, BatchLayout(2, 1, rank, 2), replaces_bad=True)]
    for step, batch in enumerate(whole):
        own = sorted((part for part in halves if part.step == step), key=lambda part: int(part.positions[0]))
        assert [level for part in own for level in levels(part)] == levels(batch)
    for resumed, batch in zip(
        batches(data, 24, lanes=whole[9].lanes, start=10, replaces_bad=True), whole[10:], strict=True
    ):
        assert torch.equal(resumed.pixels, batch.pixels)


def test_a_broken_image_in_the_sample_is_named_before_the_run(tmp_path):
    name = write(tmp_path / "a.parquet", [b"no image", *map(png, range(9))])
    with pytest.raises(ConfigError, match=r"1 of 10 images cannot be read: 'row 0 of a.parquet' \(not an image"):
        load_data(options(name))
    assert len(load_data(options(name, skip_bad_images=True)).train) == 9


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (png(3, "RGB"), r"row 90 of a.parquet .* is color \(3\), and the first images are grayscale \(1\)"),
        ("16", r"row 90 of a.parquet .* is grayscale \(1, uint16\), .* first images are grayscale \(1\): convert it$"),
    ],
)
def test_an_image_of_another_kind_is_named(tmp_path, odd, message):
    if odd == "16":
        file = io.BytesIO()
        Image.fromarray(np.full((4, 4), 999, np.uint16)).save(file, "PNG")
        odd = file.getvalue()
    images = [odd if number == 90 else png(number) for number in range(100)]
    data = load_data(options(write(tmp_path / "a.parquet", images)))
    with pytest.raises(RunError, match=message):
        batches(data, 25, replaces_bad=True)


def test_floats_outside_the_range_of_the_first_images_are_named(tmp_path):
    values = np.random.default_rng(0).random((100, 4, 4, 2)).astype(np.float32)
    values[90, 0, 0, 0] = 7
    features = datasets.Features({"a": datasets.Array3D((4, 4, 2), "float32")})
    datasets.Dataset.from_dict({"a": values}, features=features).to_parquet(tmp_path / "a.parquet")
    data = load_data(options(str(tmp_path / "a.parquet")))
    with pytest.raises(RunError, match=r"row 90 of a.parquet .* has values from .* to 7, outside of 0 to 1"):
        batches(data, 25)
    data = load_data(options(str(tmp_path / "a.parquet"), data_range=(0.0, 7.0)))
    pixels = torch.cat([batch.pixels for batch in batches(data, 25)])
    torch.testing.assert_close(
        pixels.flatten(1).sum(1).sort().values,
        torch.from_numpy(values).flatten(1).mul(2 / 7).sub(1).sum(1).sort().values,
    )


@pytest.mark.parametrize(
    ("feature", "values", "extra", "names"),
    [
        ("int64", [2, 0, 2, 5], {}, ["0", "1", "2", "3", "4", "5"]),
        ("string", ["dog", "cat", "dog", "bee"], {}, ["bee", "cat", "dog"]),
        (
            "string",
            ["dog", "cat", "dog", "bee"],
            {"class_names": ("dog", "cat", "bee", "ape")},
            ["dog", "cat", "bee", "ape"],
        ),
        ("int64", [1, 0, 1, 0], {"class_names": ("dog", "cat")}, ["dog", "cat"]),
    ],
)
def test_classes_of_columns_that_declare_none(tmp_path, feature, values, extra, names):
    labels = [values[number % 4] for number in range(200)]
    name = write(tmp_path / "a.parquet", map(png, range(200)), kind=(datasets.Value(feature), labels))
    data = load_data(options(name, class_column="kind", validation_examples=3, **extra), "adm")
    assert list(data.train.columns.class_names) == names
    for batch in batches(data, 5):
        expected = [values[level % 4] for level in levels(batch)]
        numbers = [names.index(str(each)) if str(each) in names else each for each in expected]
        assert batch.conditions.class_labels.tolist() == numbers


def test_a_class_that_is_not_among_the_names_is_named(tmp_path):
    kinds = ["a"] * 90 + ["b"] + ["a"] * 9
    name = write(tmp_path / "a.parquet", map(png, range(100)), kind=(datasets.Value("string"), kinds))
    data = load_data(options(name, class_column="kind", class_names=("a", "c")), "adm")
    with pytest.raises(RunError, match=r"row 90 of a\.parquet has the class b"):
        batches(data, 25)


def test_too_many_held_out(tmp_path):
    name = write(tmp_path / "a.parquet", map(png, range(5)))
    with pytest.raises(ConfigError, match="--validation_examples 9 holds out all 5 images"):
        load_data(options(name, validation_examples=9))

"""Mixtures of streams: shares by weights, the same for every split and start, classes and columns joined."""

from __future__ import annotations

import io
from collections import Counter
from itertools import islice

import pytest
import torch
from PIL import Image

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.training.config.train_config import parse_train_args
from diffusers_ddpm_ext.training.data.dataset import load_data
from diffusers_ddpm_ext.training.data.streaming.batches import BatchLayout, stream_batches

datasets = pytest.importorskip("datasets")


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 4), level).save(file, "PNG")
    return file.getvalue()


def write(path, levels, column="image", names=None, labels=None):
    """A parquet file of pictures of one level each, with a `ClassLabel` if there are names."""
    features, rows = {column: datasets.Image()}, {column: [{"bytes": png(n), "path": None} for n in levels]}
    if labels is not None:
        features["label"] = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
        rows["label"] = labels
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(path)
    return str(path)


@pytest.fixture
def pair(tmp_path):
    """60 pictures of the classes a and b, and 20 from level 100 on of the classes c and a."""
    first = write(tmp_path / "one.parquet", range(60), "photo", ["a", "b"], [0, 1] * 30)
    return first, write(tmp_path / "two.parquet", range(100, 120), "image", ["c", "a"], [0, 1] * 10)


def load(pair, key=None, **options):
    defaults = {"resolution": (4, 4), "streaming": True, "validation_fraction": None, "shuffle_buffer": 16}
    return load_data(DataOptions(dataset_name=pair, **(defaults | {"dataset_weights": (1.0, 3.0)} | options)), key)


def batches(data, steps, layout, start=0, lanes=None, **arguments):
    decoder, plan = data.stream.decoder(data.train), data.stream.plan(layout.effective_batch)
    stream = stream_batches(decoder, plan, layout, 7, start_step=start, lanes=lanes, **arguments)
    result = list(islice(stream, steps * layout.accumulation))
    stream.close()
    return result


def levels_of(pixels):
    return ((pixels[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def by_position(parts):
    """Level at each (step, position) of the run."""
    return {
        (batch.step, place): level
        for batch in parts
        for place, level in zip(batch.positions.tolist(), levels_of(batch.pixels), strict=True)
    }


def test_shares_are_those_of_the_weights_and_rows_are_drawn_in_turn(pair):
    """1,000 samples, which are one block: 250 and 750, whatever the numbers of rows."""
    counts = Counter(level for batch in batches(load(pair), 125, BatchLayout(8)) for level in levels_of(batch.pixels))
    first, second = ([counts[level] for level in levels] for levels in (range(60), range(100, 120)))
    assert (sum(first), sum(second)) == (250, 750)
    assert min(first) >= 3
    assert min(second) >= 35


SPLITS = {
    "2 ranks": [BatchLayout(4, 1, rank, 2) for rank in range(2)],
    "2 ranks, accumulated": [BatchLayout(2, 2, rank, 2) for rank in range(2)],
    "accumulated": [BatchLayout(2, 4)],
}


@pytest.mark.parametrize("name", SPLITS)
def test_every_split_has_the_same_images_at_the_same_positions(name, pair):
    data = load(pair)
    expected = by_position(batches(data, 30, BatchLayout(8)))
    assert len(expected) == 240
    parts = [batch for layout in SPLITS[name] for batch in batches(data, 30, layout)]
    assert by_position(parts) == expected


def test_a_stream_resumes_at_any_step(pair):
    data, layout = load(pair), BatchLayout(4, 2)
    straight = batches(data, 30, layout)
    for step in (1, 17):
        lanes = straight[2 * step - 1].lanes
        assert lanes is not None
        again = batches(data, 30 - step, layout, start=step, lanes=lanes, num_workers=step % 2)
        assert by_position(again) == {k: v for k, v in by_position(straight).items() if k[0] >= step}


def test_the_same_positions_of_two_sources_are_shuffled_differently(tmp_path):
    """Two sources of equal rows: their orders differ, or each image would come with its twin."""
    pair = tuple(write(tmp_path / f"{first}.parquet", range(first, first + 40)) for first in (0, 100))
    drawn = [
        n for b in batches(load(pair, dataset_weights=(1.0, 1.0)), 10, BatchLayout(8)) for n in levels_of(b.pixels)
    ]
    first, second = [n for n in drawn if n < 100], [n - 100 for n in drawn if n >= 100]
    assert len(set(first)) > 30
    assert len(set(second)) > 30
    assert first[:20] != second[:20]


def test_classes_are_joined_by_name(pair):
    data = load(pair, "adm", class_column="label")
    assert data.train.columns is not None
    assert data.train.columns.class_names == ["a", "b", "c"]
    for batch in batches(data, 10, BatchLayout(8)):
        for level, label in zip(levels_of(batch.pixels), batch.conditions.class_labels.tolist(), strict=True):
            assert label == (level % 2 if level < 100 else (2, 0)[level % 2])


def test_the_first_images_of_each_source_are_held_out(pair):
    data = load(pair, validation_examples=3)
    assert data.validation is not None
    assert levels_of(data.validation.pixels(range(6))) == [0, 1, 2, 100, 101, 102]
    drawn = {level for batch in batches(data, 125, BatchLayout(8)) for level in levels_of(batch.pixels)}
    assert drawn == {*range(3, 60), *range(103, 120)}
    with pytest.raises(ConfigError, match="--validation_examples 20 holds out"):
        load(pair, validation_examples=20)


def test_folders_are_mixed_with_their_classes(tmp_path):
    for folder, names in (("one", "ab"), ("two", "bc")):
        for name in names:
            (tmp_path / folder / name).mkdir(parents=True)
            for index in range(4):
                (tmp_path / folder / name / f"{index}.png").write_bytes(png(10 * ord(name) % 250 + index))
    folders = (str(tmp_path / "one"), str(tmp_path / "two"))
    data = load(None, "adm", train_data_dir=folders)
    assert data.train.columns is not None
    assert data.train.columns.class_names == ["a", "b", "c"]
    labels = torch.cat([batch.conditions.class_labels for batch in batches(data, 125, BatchLayout(8))])
    assert labels.bincount().tolist() == pytest.approx([125, 125 + 375, 375], abs=5)


def test_numbers_beside_names_are_refused(tmp_path):
    named = write(tmp_path / "one.parquet", range(8), names=["a", "b"], labels=[0, 1] * 4)
    numbered = write(tmp_path / "two.parquet", range(8), labels=[0, 1] * 4)
    with pytest.raises(ConfigError, match=r"are names or texts, those of .*two\.parquet' numbers"):
        load((named, numbered), "adm", class_column="label")


def test_weights_are_needed(pair):
    flags = ["--streaming", "--max_train_steps", "5", "--dataset_name", *pair]
    with pytest.raises(ConfigError, match="--streaming needs --dataset_weights for several"):
        parse_train_args(flags)
    assert parse_train_args([*flags, "--dataset_weights", "1", "3"]).data.dataset_names == pair

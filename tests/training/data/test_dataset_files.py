"""Tests of `dataset_files`: what ``--dataset_name`` may be, with `datasets` itself as the oracle."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from diffusers_ddpm_ext.training.data.dataset_files import builder_arguments
from diffusers_ddpm_ext.training.data.sources import open_dataset_split


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 4), level).save(file, "PNG")
    return file.getvalue()


def test_a_hub_id_and_a_folder_are_passed_on(tmp_path):
    assert builder_arguments("user/name") == ("user/name", None)
    (tmp_path / "named.parquet").mkdir()
    assert builder_arguments(str(tmp_path / "named.parquet")) == (str(tmp_path / "named.parquet"), None)
    assert builder_arguments(str(tmp_path / "missing.parquet"))[1] is None


@pytest.mark.slow
def test_a_file_and_a_pattern_of_files_are_data_sets(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image()})
    for number in range(2):
        rows = {"image": [{"bytes": png(10 * number + row), "path": None} for row in range(3)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"part-{number}.parquet")
    cache = str(tmp_path / "cache")
    one = open_dataset_split(str(tmp_path / "part-1.parquet"), "train", cache_dir=cache)
    both = open_dataset_split(str(tmp_path / "part-*.parquet"), "train", cache_dir=cache)
    assert [one.payload(row) for row in range(3)] == [png(10), png(11), png(12)]
    assert [both.payload(row) for row in range(len(both.names))] == [png(v) for v in (0, 1, 2, 10, 11, 12)]

"""Pictures of `ddpm-ext sample --concat` get their size as those of the training run did."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ddpm_ext.cli.concat_pictures import decode_picture, find_pictures, resizing_of_run
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.training.config.train_config import TrainConfig
from diffusers_ddpm_ext.training.data.dataset import load_data

OPTIONS = [
    {},
    {"center_crop": True, "resize_filter": "nearest"},
    {"resize": "pad", "background": "#204060"},
    {"resize": "stretch", "resize_filter": "lanczos"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of different proportions, each its own condition."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number, size in enumerate([(20, 31), (31, 20), (16, 16)]):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / "photos" / f"{number}.png")
    table = "file_name,picture\n" + "".join(f"{number}.png,{number}.png\n" for number in range(3))
    (tmp_path / "photos" / "metadata.csv").write_text(table)
    return tmp_path


@pytest.mark.parametrize("options", OPTIONS)
def test_pictures_are_those_of_the_run(options, folder):
    photos = str(folder / "photos")
    data = load_data(
        DataOptions(
            train_data_dir=photos, resolution=(12, 16), concat_column="picture", validation_fraction=0, **options
        ),
        "concat",
    )
    config = {"train_data_dir": photos, "resolution": [12, 16], "block_out_channels": [32], **options}
    TrainConfig.from_flat(config).write_resolved(folder / "config.yaml")
    pictures = replace(find_pictures(folder / "photos"), resizing=resizing_of_run(folder, None))
    drawn = torch.cat([decode_picture(pictures, index, (12, 16), 3) for index in range(3)])
    assert torch.equal(drawn, data.train.conditions(range(3)).concat_inputs)


def test_another_way_replaces_that_of_the_run(folder):
    flat = {"train_data_dir": str(folder / "photos"), "resize": "pad", "background": "red", "resolution": [12, 16]}
    TrainConfig.from_flat(flat | {"block_out_channels": [32]}).write_resolved(folder / "config.yaml")
    assert resizing_of_run(folder, None).mode == "pad"
    assert resizing_of_run(folder, "stretch").mode == "stretch"
    assert resizing_of_run(folder, "stretch").background == "red"
    assert resizing_of_run(folder / "photos", None) is None
    pictures = find_pictures(folder / "photos")
    ways = [replace(pictures, resizing=resizing_of_run(folder, mode)) for mode in (None, "stretch")]
    assert len({way.fingerprint() for way in (*ways, pictures)}) == 3  # samples of one are not continued with another


def test_a_damaged_file_of_options_is_named(folder):
    (folder / "config.yaml").write_text("data: [")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        resizing_of_run(folder, None)

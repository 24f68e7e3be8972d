"""The check of images that do not fit into memory: once, and again only for changed files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.training.data import image_cache, image_scan
from diffusers_ddpm_ext.training.data.cached_images import CachedImages
from diffusers_ddpm_ext.training.data.dataset import load_data
from diffusers_ddpm_ext.training.data.image_store import LazyImages

COUNT, LIMIT = 6, 100


@pytest.fixture
def options(tmp_path):
    for number in range(COUNT):
        pixels = np.random.default_rng(number).integers(0, 256, (9 + number % 2, 12, 3), dtype=np.uint8)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    return DataOptions(
        train_data_dir=str(tmp_path / "photos"), resolution=(8, 8), cache_images="never", cache_dir=str(tmp_path / "c")
    )


@pytest.fixture
def decoded(monkeypatch):
    """Names of the images that the pass decodes."""
    names, original = [], image_scan.decode_image

    def counting(payload, preprocessing):
        names.append(payload.name)
        return original(payload, preprocessing)

    monkeypatch.setattr(image_scan, "decode_image", counting)
    return names


def load(options):
    data = load_data(options, memory_limit=LIMIT)
    assert isinstance(data.train.images, LazyImages)
    return data


def test_the_second_start_decodes_none_and_sees_the_same(options, decoded):
    first = load(options)
    assert len(decoded) == COUNT
    second = load(options)
    assert len(decoded) == COUNT
    assert (first.fingerprint, first.description) == (second.fingerprint, second.description)
    assert first.train.images.sizes == second.train.images.sizes
    assert all(torch.equal(first.train.images.image(i), second.train.images.image(i)) for i in range(COUNT))
    assert load_data(options).fingerprint == first.fingerprint, "in memory"


def test_a_changed_file_is_checked_again(options, decoded):
    load(options)
    path = Path(options.train_data_dir, "3.png")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ConfigError, match="1 of 6 images cannot be read"):
        load(options)
    assert len(decoded) == 2 * COUNT
    skipping = replace(options, skip_bad_images=True)
    first, second = load(skipping), load(skipping)
    assert first.skipped == second.skipped == 1
    assert first.fingerprint == second.fingerprint
    with pytest.raises(ConfigError, match=r"1 of 6 images cannot be read: '3\.png'"):
        load(options)
    assert len(decoded) == 3 * COUNT, "the refusal is remembered with its reason"


@pytest.mark.parametrize("change", [b"", b"{}", b"[", b'{"key": 1}', "rows"])
def test_a_damaged_record_is_written_again(options, decoded, change):
    first = load(options)
    (record,) = Path(options.cache_dir, "ddpm_ext_images", "checked").iterdir()
    content = json.loads(record.read_bytes())
    record.write_bytes(json.dumps(content | {"bad_rows": [1]}).encode() if change == "rows" else change)
    assert load(options).fingerprint == first.fingerprint
    assert len(decoded) == 2 * COUNT
    assert json.loads(record.read_bytes()) == content


def test_other_options_of_the_pixels_are_checked(options, decoded):
    load(options)
    load(replace(options, channels=1))
    assert len(decoded) == 2 * COUNT


@pytest.mark.parametrize(("processes", "shares"), [("1", False), ("2", True), ("x", False)])
def test_processes_share_what_one_decodes(options, monkeypatch, processes, shares):
    """One process would decode six images itself; two would decode twelve, so one writes them and both map them."""
    monkeypatch.setattr(image_cache, "MANY_IMAGES", 2 * COUNT)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    data = load_data(replace(options, cache_images="auto"))
    assert isinstance(data.train.images, CachedImages) == shares
    assert data.fingerprint == load_data(options).fingerprint

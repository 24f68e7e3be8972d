"""Flips, quarter turns and random crops: uniform, determined by their keys, the same for images and their pictures."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.training.data.augmentation import Augmentation, RandomCrop, apply_symmetries, random_box
from diffusers_ddpm_ext.training.data.batches import batch_stream
from diffusers_ddpm_ext.training.data.dataset import load_data
from diffusers_ddpm_ext.training.data.image_set import ImageSet
from diffusers_ddpm_ext.training.data.image_store import PackedImages
from diffusers_ddpm_ext.training.data.pixel_values import full_range
from diffusers_ddpm_ext.training.data.resizing import Resizing, Surface

EVERYTHING = Augmentation(random_flip=True, vertical_flip=True, rotate90=True)
TRANSPOSITIONS = {
    0: None, 1: Image.Transpose.FLIP_LEFT_RIGHT, 2: Image.Transpose.ROTATE_90, 3: Image.Transpose.TRANSPOSE,
    4: Image.Transpose.ROTATE_180, 5: Image.Transpose.FLIP_TOP_BOTTOM, 6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
}  # fmt: skip
"""Pillow's names of the symmetries."""


def image_set(count: int, size: tuple[int, int] = (4, 4), **options) -> ImageSet:
    """Images whose pixels are all different, so that every change can be recognized."""
    pixels = torch.arange(size[0] * size[1], dtype=torch.uint8).view(1, *size)
    return ImageSet(
        PackedImages([pixels + 100 * (i % 2) for i in range(count)]), torch.arange(count), (4, 4), **options
    )


def turned(image: np.ndarray, symmetry: int) -> np.ndarray:
    """Pillow's oracle, (h, w)."""
    way = TRANSPOSITIONS[symmetry]
    return image if way is None else np.asarray(Image.fromarray(image).transpose(way))


def symmetry_of(changed: np.ndarray, image: np.ndarray) -> int:
    (found,) = [symmetry for symmetry in range(8) if np.array_equal(turned(image, symmetry), changed)]
    return found


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "uint32", "float16", "float32", "float64"])
def test_symmetries_are_pillows(dtype):
    values = np.arange(9, dtype=np.uint8).reshape(3, 3)
    images = torch.from_numpy(np.tile(values.astype(dtype), (8, 2, 1, 1)))
    apply_symmetries(images, torch.arange(8))
    for symmetry in range(8):
        expected = turned(values, symmetry)
        for channel in range(2):
            np.testing.assert_array_equal(images[symmetry, channel].numpy(), expected)


@pytest.mark.parametrize(
    ("flags", "symmetries"),
    [((0, 0, 0), {0}), ((1, 0, 0), {0, 1}), ((0, 1, 0), {0, 5}), ((1, 1, 0), {0, 1, 4, 5}),
     ((0, 0, 1), {0, 2, 4, 6}), ((1, 0, 1), {*range(8)}), ((0, 1, 1), {*range(8)}), ((1, 1, 1), {*range(8)})],
)  # fmt: skip
def test_each_symmetry_is_drawn_equally_often(flags, symmetries):
    augmentation = Augmentation(*map(bool, flags))
    assert {*augmentation.symmetries} == symmetries
    drawn = torch.cat([augmentation.draw_symmetries(torch.arange(100), 3, [epoch] * 100) for epoch in range(20)])
    counts = Counter(drawn.tolist())
    assert {*counts} == symmetries
    expected = 2000 / len(symmetries)
    freedom = max(len(symmetries) - 1, 1)
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < freedom + 5 * (2 * freedom) ** 0.5
    assert not augmentation.draw_symmetries(torch.arange(100), 3, None).any()


def test_new_options_do_not_change_how_images_are_flipped():
    """The flip left to right has the key that it always had, also beside other changes."""
    indices, epochs = torch.arange(200), [4] * 200
    alone = Augmentation(random_flip=True).draw_symmetries(indices, 7, epochs)
    upturned = Augmentation(vertical_flip=True).draw_symmetries(indices, 7, epochs) == 5
    both = Augmentation(random_flip=True, vertical_flip=True).draw_symmetries(indices, 7, epochs)
    mirrored = torch.isin(both, torch.tensor([1, 4]))  # 4 is both
    assert torch.equal(mirrored, alone.bool())
    assert torch.equal(torch.isin(both, torch.tensor([4, 5])), upturned)


SPLITS = ([{"batch": 8}], [{"batch": 2, "accumulation": 4}], [{"batch": 4, "rank": r, "world": 2} for r in range(2)])


def drawn_samples(images: ImageSet, splits, first: int, last: int) -> dict:
    """Pixels of every (step, position) from one step to another."""
    found = {}
    for split in splits:
        accumulation = split.get("accumulation", 1)
        stream = batch_stream(images, 5, **({"accumulation": 1} | split), start_step=first)
        for batch in itertools.islice(stream, (last - first) * accumulation):
            for place, pixels in zip(batch.positions.tolist(), batch.pixels, strict=True):
                found[batch.step, place] = pixels
    return found


@pytest.mark.parametrize("size", [(4, 4), (9, 12)])
def test_a_run_draws_the_same_in_every_split_and_after_a_restart(size):
    random_crop = RandomCrop((0.4, 0.9)) if size != (4, 4) else None
    images = image_set(7, size, augmentation=replace(EVERYTHING, random_crop=random_crop))
    whole = drawn_samples(images, SPLITS[0], 0, 6)
    for split, first in zip(SPLITS[1:], (0, 3), strict=True):
        part = drawn_samples(images, split, first, 6)
        assert part.keys() == {key for key in whole if key[0] >= first}
        assert all(torch.equal(pixels, whole[key]) for key, pixels in part.items())
    assert len({tuple(pixels.flatten().tolist()) for pixels in whole.values()}) > 12


# ---------------------------------------------------------------- crops before resizing


@pytest.mark.parametrize(("mode", "proportion"), [("crop", 2.0), ("stretch", 3.0)])
def test_a_random_part_has_the_proportions_and_lies_inside(mode, proportion):
    rng = np.random.default_rng(0)
    sides, places = [], []
    for _ in range(400):
        left, top, right, bottom = random_box((50, 150), (20, 40), mode, (0.5, 1.0), rng.random(3))
        assert 0 <= left < right <= 150
        assert 0 <= top < bottom <= 50
        assert (right - left) / (bottom - top) == pytest.approx(proportion)
        sides.append((bottom - top) / 50)
        places.append(left / (150 - (right - left) + 1e-12))
    assert np.quantile(sides, [0, 0.25, 0.5, 0.75, 1]) == pytest.approx([0.5, 0.625, 0.75, 0.875, 1], abs=0.05)
    assert np.quantile(places, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.08)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_a_random_part_is_pillows_resized_box(dtype):
    values = (np.random.default_rng(1).random((3, 40, 60)) * 200).astype(dtype)
    crop = RandomCrop((0.5, 1.0), Resizing(filter="bicubic"), Surface((0, 255)))
    result = crop.cut(torch.from_numpy(values), (16, 16), (0.5, 0.25, 0.75)).numpy()
    side = 0.75 * 40  # of the largest square
    box = (0.75 * (60 - side), 0.25 * (40 - side), 0.75 * (60 - side) + side, 0.25 * (40 - side) + side)
    for channel in range(3):
        plane = Image.fromarray(values[channel] if dtype == "uint8" else values[channel].astype(np.float32))
        expected = np.asarray(plane.resize((16, 16), Image.Resampling.BICUBIC, box))
        expected = expected if dtype == "float32" else expected.round()
        np.testing.assert_array_equal(result[channel], expected.clip(0, 255).astype(dtype))


def test_validation_sees_the_whole_image_resized_once(tmp_path):
    """As a run with --center_crop prepares it."""
    folder = photos(tmp_path / "photos")
    common = {"train_data_dir": str(folder), "resolution": (8, 8), "validation_fraction": 0.5}
    random = load_data(DataOptions(**common, random_crop="before", random_crop_scale=(0.3, 0.6)))
    center = load_data(DataOptions(**common, center_crop=True))
    assert random.validation.augmentation.symmetries == (0,)
    assert random.train.images.sizes == {(20, 30), (30, 20)}
    for name in ("train", "validation"):
        own, other = getattr(random, name), getattr(center, name)
        assert own.name(0) == other.name(0)
        assert torch.equal(own.pixels(range(len(own))), other.pixels(range(len(other))))
    assert random.fingerprint != center.fingerprint


def test_levels_of_the_digits_stay_in_range():
    """Lanczos overshoots, and a digit has no level above 16."""
    options = {"random_crop": "before", "random_crop_scale": (0.2, 0.9), "resize_filter": "lanczos"}
    data = load_data(DataOptions(resolution=(8, 8), **options))
    levels = data.train.load_levels(range(60), 1, [0] * 60).values
    assert (levels.max(), data.train.levels) == (16, 17)
    pixels = next(batch_stream(data.train, 1, batch=8, accumulation=1)).pixels
    assert pixels.abs().max() <= 1


# ---------------------------------------------------------------- pictures that are conditions


def gradient(size: tuple[int, int], slopes: np.ndarray) -> np.ndarray:
    """A smooth image, (h, w, 3), which no symmetry leaves as it is."""
    y, x = ((np.arange(count) + 0.5) / count for count in size)
    plane = x[None] * slopes[:, None, None] + 0.5 * y[:, None] * np.roll(slopes, 1)[:, None, None]
    return (128 + plane).round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def photos(folder: Path) -> Path:
    """Six photographs of both proportions, each with a smaller picture of itself, half as large, in a column."""
    rng = np.random.default_rng(2)
    folder.mkdir(parents=True)
    rows = ["file_name,small"]
    (folder / ".small").mkdir()
    for number in range(6):
        size = (20, 30) if number % 2 else (30, 20)
        slopes = rng.permutation([-100, -60, 80])
        Image.fromarray(gradient(size, slopes)).save(folder / f"{number}.png")
        Image.fromarray(gradient((size[0] // 2, size[1] // 2), slopes)).save(folder / ".small" / f"{number}.png")
        rows.append(f"{number}.png,.small/{number}.png")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {"random_flip": True, "vertical_flip": True, "rotate90": True, "resize": "stretch"},
        {"rotate90": True, "resize": "pad", "background": "red"},
        {"random_flip": True},
        {"random_crop": "before", "random_crop_scale": (0.4, 0.9), "rotate90": True, "random_flip": True},
        {"random_crop": "before", "random_crop_scale": (0.4, 0.9), "resize": "stretch", "vertical_flip": True},
    ],
)
def test_joined_pictures_change_with_their_images(options, tmp_path):
    """A picture of half the size shows the same part, turned the same way."""
    common = {"train_data_dir": str(photos(tmp_path / "photos")), "resolution": (5, 5), "validation_fraction": 0}
    data = load_data(DataOptions(**common, concat_column="small", **options), "concat")
    seen = set()
    for epoch in range(6):
        pixels = data.train.load_levels(range(6), 9, [epoch] * 6).values.float() / 127.5 - 1
        joined = data.train.conditions(range(6), 9, [epoch] * 6).concat_inputs
        assert (pixels - joined).abs().mean() < 0.02
        assert all((pixels - turned).abs().mean() > 0.05 for turned in (joined.flip(-1), joined.rot90(1, (-2, -1))))
        seen.add(tuple(pixels[0].flatten().tolist()))
    assert len(seen) > 2


@pytest.mark.parametrize("memory_limit", [10**9, 0])
def test_pictures_of_other_proportions_are_cropped_at_the_same_place(memory_limit, tmp_path):
    """200 x 67 pixels halved are 100 x 33, which cover the size with a column more."""
    folder = tmp_path / "photos"
    (folder / ".small").mkdir(parents=True)
    for name, size in (("a.png", (67, 200)), (".small/a.png", (33, 100))):
        columns = np.broadcast_to((np.arange(size[1]) + 0.5) / size[1] * 255, size)
        Image.fromarray(columns.astype(np.uint8)).save(folder / name)
    (folder / "metadata.csv").write_text("file_name,small\na.png,.small/a.png\n")
    options = {"train_data_dir": str(folder), "resolution": (16, 16), "validation_fraction": 0}
    data = load_data(DataOptions(**options, concat_column="small"), "concat", memory_limit=memory_limit)
    places = set()
    for epoch in range(30):
        pixels = data.train.load_levels([0], 9, [epoch]).values.float() / 127.5 - 1
        joined = data.train.conditions([0], 9, [epoch]).concat_inputs
        assert (pixels - joined).abs().max() < 0.06  # a column is 0.04
        places.add(float(pixels[0, 0, 0, 0]))
    assert len(places) > 10


def test_turned_values_of_deep_images_keep_their_dtype():
    values = (torch.arange(16, dtype=torch.int32).view(1, 4, 4) + 60_000).to(torch.uint16)
    store = PackedImages([values], "", full_range("uint16"))
    images = ImageSet(store, torch.arange(1), (4, 4), augmentation=EVERYTHING)
    seen, original = set(), np.arange(16, dtype=np.uint8).reshape(4, 4)
    for epoch in range(40):
        levels = images.load_levels([0], 0, [epoch]).values
        assert levels.dtype == torch.uint16
        seen.add(symmetry_of((levels[0, 0].int() - 60_000).numpy().astype(np.uint8), original))
    assert seen == {*range(8)}

"""The stream of batches: one order of samples for every split, number of workers and start step."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.training.data.augmentation import Augmentation
from diffusers_ddpm_ext.training.data.batches import MicroBatches, batch_stream
from diffusers_ddpm_ext.training.data.dataset import load_data
from diffusers_ddpm_ext.training.data.image_set import ImageSet, levels_to_pixels
from diffusers_ddpm_ext.training.data.image_store import PackedImages
from diffusers_ddpm_ext.training.data.weighted_turns import WeightedDraws
from diffusers_ddpm_ext.utils import random_keys as keys

DIGITS = DataOptions(resolution=(8, 8))
FLIPS = Augmentation(random_flip=True)


def numbered(n: int, height: int = 4, width: int = 4, size: tuple[int, int] = (4, 4), **options) -> ImageSet:
    """Images of which pixel (y, x) of image i is i + 10 y + x, so that every crop and flip can be recognized."""
    grid = 10 * torch.arange(height)[:, None] + torch.arange(width)[None]
    return ImageSet(
        PackedImages([(grid + i).to(torch.uint8)[None] for i in range(n)]), torch.arange(n), size, **options
    )


def take(images, steps, accumulation=1, **options):
    return list(itertools.islice(batch_stream(images, 7, accumulation=accumulation, **options), steps * accumulation))


def effective(parts):
    """Indices and pixels of each step in the order of their positions, from the batches of all ranks."""
    steps = {}
    for batch in parts:
        for row, place in enumerate(batch.positions.tolist()):
            assert place not in steps.setdefault(batch.step, {}), "a position came twice"
            steps[batch.step][place] = (int(batch.indices[row]), batch.pixels[row])
    ordered = {step: [places[i] for i in range(len(places))] for step, places in sorted(steps.items())}
    indices = [[index for index, _ in places] for places in ordered.values()]
    return indices, torch.stack([torch.stack([pixels for _, pixels in places]) for places in ordered.values()])


# ---------------------------------------------------------------- the order


@pytest.mark.parametrize("n", [3, 8, 11, 50])
def test_the_stream_is_shuffled_epochs_without_end(n):
    """Every epoch contains every image once, also if a batch contains several epochs, and no place is skipped."""
    indices = torch.cat([batch.indices for batch in take(numbered(n), 40, batch=8)])
    epochs = indices[: len(indices) // n * n].view(-1, n)
    assert (epochs.sort(1).values == torch.arange(n)).all()
    assert len({tuple(epoch.tolist()) for epoch in epochs}) > 1


def test_the_shuffle_depends_on_seed_and_epoch_only():
    batches = take(numbered(12), 3, batch=8)
    flat = torch.cat([batch.indices for batch in batches])
    for epoch in (0, 1):
        shuffle = torch.randperm(12, generator=keys.generator("order", 7, epoch))
        assert torch.equal(flat[12 * epoch : 12 * epoch + 12], shuffle)


SPLITS = {
    "accumulation 2 x 4": [{"batch": 4, "accumulation": 2}],
    "accumulation 8 x 1": [{"batch": 1, "accumulation": 8}],
    "2 ranks x 4": [{"batch": 4, "rank": rank, "world": 2} for rank in range(2)],
    "2 ranks x accumulation 2 x 2": [{"batch": 2, "accumulation": 2, "rank": rank, "world": 2} for rank in range(2)],
    "8 ranks x 1": [{"batch": 1, "rank": rank, "world": 8} for rank in range(8)],
}


@pytest.mark.parametrize("n", [5, 30])
@pytest.mark.parametrize("name", SPLITS)
def test_every_split_has_the_same_samples_at_the_same_positions(name, n):
    images = numbered(n, 6, 9, augmentation=FLIPS)
    expected_indices, expected = effective(take(images, 5, batch=8))
    indices, pixels = effective(itertools.chain(*(take(images, 5, **split) for split in SPLITS[name])))
    assert indices == expected_indices
    assert torch.equal(pixels, expected)


def test_positions_are_counted_by_micro_batch_then_rank():
    batches = take(numbered(9), 1, batch=3, accumulation=2, rank=1, world=2)
    assert [batch.positions.tolist() for batch in batches] == [[3, 4, 5], [9, 10, 11]]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_can_start_at_any_step(workers):
    images = numbered(10, 6, 9, augmentation=FLIPS)
    options = {"batch": 4, "accumulation": 2, "rank": 1, "world": 2}
    straight = take(images, 7, **options)[2 * 5 :]
    later = take(images, 2, start_step=5, num_workers=workers, **options)
    for one, other in zip(straight, later, strict=True):
        assert one.step == other.step
        for field in ("pixels", "positions", "indices"):
            assert torch.equal(getattr(one, field), getattr(other, field))


def test_a_run_can_continue_with_another_world_size():
    """The place in the stream depends on the effective batch alone."""
    images = numbered(11)
    before, _ = effective(take(images, 3, batch=8))
    after, _ = effective(
        itertools.chain(*(take(images, 3, batch=2, accumulation=2, rank=r, world=2, start_step=3) for r in range(2)))
    )
    expected, _ = effective(take(images, 6, batch=8))
    assert before + after == expected


def test_equal_seeds_give_equal_batches():
    images = numbered(30, 6, 9, augmentation=FLIPS)
    first, again = take(images, 4, batch=8), take(images, 4, batch=8)
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(first, again, strict=True))
    other = list(itertools.islice(batch_stream(images, 8, batch=8), 4))
    assert [b.indices.tolist() for b in other] != [b.indices.tolist() for b in first]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generators_are_unchanged(workers):
    before, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    take(numbered(5, 6, 9, augmentation=FLIPS), 3, batch=4, num_workers=workers)
    assert torch.equal(before, torch.get_rng_state())
    assert (np.random.get_state()[1] == numbers).all()


def test_images_can_be_pickled_for_spawned_workers():
    images = pickle.loads(pickle.dumps(numbered(5, 6, 9, augmentation=FLIPS)))
    share = MicroBatches(numbered(5, 6, 9, augmentation=FLIPS), 7, 4, 1, 0, 1)
    again = pickle.loads(pickle.dumps(share))
    assert torch.equal(share[(3, 0)][0], again[(3, 0)][0])
    assert torch.equal(take(images, 4, batch=4)[3].pixels, take(share.images, 4, batch=4)[3].pixels)


@pytest.mark.parametrize(
    "wrong", [{"batch": 0}, {"accumulation": 0}, {"world": 0}, {"rank": 1}, {"rank": -1}, {"start_step": -1}]
)
def test_impossible_splits_are_refused_immediately(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} "):
        batch_stream(numbered(3), 0, **({"batch": 2} | wrong))


def test_an_empty_set_is_refused():
    with pytest.raises(ValueError, match="image"):
        batch_stream(ImageSet(numbered(3).images, torch.arange(0), (4, 4)), 0, 2)


# ---------------------------------------------------------------- augmentation


def crops_and_flips(batch, levels=256):
    """Top, left and whether flipped, for each numbered image in a batch."""
    values = ((batch.pixels + 1) * (levels - 1) / 2).round().long()[:, 0] - batch.indices[:, None, None]
    for tile in values:
        flipped = bool(tile[0, 0] > tile[0, 1])
        upright = tile.flip(-1) if flipped else tile
        top, left = divmod(int(upright[0, 0]), 10)
        expected = 10 * torch.arange(top, top + tile.shape[0])[:, None] + torch.arange(left, left + tile.shape[1])
        assert torch.equal(upright, expected), "neither a crop nor a flipped crop"
        yield top, left, flipped


def test_crops_and_flips_follow_seed_epoch_and_index():
    """The oracle is the same image in another batch: its crop and flip must not depend on the other images."""
    images = numbered(6, 7, 9, augmentation=FLIPS)
    seen = {}
    for options in ({"batch": 5}, {"batch": 2, "accumulation": 3}, {"batch": 7}):
        position = 0
        for batch in take(images, 20, **options):
            for index, how in zip(batch.indices.tolist(), crops_and_flips(batch), strict=True):
                place = (position // 6, index)
                position += 1
                assert seen.setdefault(place, how) == how
    per_image = Counter(index for _, index in seen)
    assert min(per_image.values()) >= 15
    assert all(len({how for (_, i), how in seen.items() if i == index}) > 5 for index in range(6))


def test_crops_and_flips_are_uniform():
    """Over 4 x 6 places and two directions (chi-square within 5 sigma)."""
    images = numbered(20, 7, 9, augmentation=FLIPS)
    hows = Counter(how for batch in take(images, 300, batch=20) for how in crops_and_flips(batch))
    assert len(hows) == 4 * 6 * 2
    expected = 300 * 20 / 48
    chi2 = sum((count - expected) ** 2 / expected for count in hows.values())
    assert chi2 < 47 + 5 * (2 * 47) ** 0.5


def test_images_of_mixed_sizes_are_cropped_to_one():
    sizes = [(4, 4), (4, 9), (7, 4), (5, 5)]
    tiles = [
        (10 * torch.arange(h)[:, None] + torch.arange(w) + i).to(torch.uint8)[None] for i, (h, w) in enumerate(sizes)
    ]
    images = ImageSet(PackedImages(tiles), torch.arange(4), (4, 4), augmentation=FLIPS)
    for batch in take(images, 20, batch=3):
        for index, (top, left, _) in zip(batch.indices.tolist(), crops_and_flips(batch), strict=True):
            assert top <= sizes[index][0] - 4
            assert left <= sizes[index][1] - 4
    centers = images.pixels(range(4))
    assert centers.shape == (4, 1, 4, 4)
    assert [round((tile[0, 0, 0].item() + 1) * 127.5) - i for i, tile in enumerate(centers)] == [0, 2, 10, 0]


def test_images_are_unchanged_without_flip_and_crop():
    images = numbered(6)
    for batch in take(images, 5, batch=4):
        assert list(crops_and_flips(batch)) == [(0, 0, False)] * 4
        assert torch.equal(batch.pixels, images.pixels(batch.indices))


def test_levels_become_pixels_with_exact_ends():
    for levels in (2, 17, 256):
        values = levels_to_pixels(torch.arange(levels).to(torch.uint8), levels)
        expected = np.linspace(-1, 1, levels)
        assert values.dtype == torch.float32
        assert values[0] == -1
        assert values[-1] == 1
        np.testing.assert_allclose(values.numpy(), expected, atol=6e-8)
        assert torch.equal(values, -values.flip(0))


# ---------------------------------------------------------------- the digits


def test_digits_equal_scikit_learns_and_the_last_tenth_is_held_out():
    data = load_data(DIGITS)
    truth = torch.from_numpy(load_digits().images / 8 - 1).float()[:, None]
    assert data.validation is not None
    assert (len(data.train), len(data.validation)) == (1617, 180)
    assert torch.equal(data.train.pixels(range(1617)), truth[:1617])
    assert torch.equal(data.validation.pixels(range(180)), truth[1617:])
    assert (data.channels, data.size, data.train.levels) == (1, (8, 8), 17)
    assert data.description == (
        "1,617 digits of scikit-learn to train on, 180 to validate on, 8x8, 1 channel, 17 levels"
    )


def test_digits_in_another_size_and_in_color():
    data = load_data(DataOptions(resolution=(16, 24), channels=3, validation_fraction=0))
    assert data.validation is None
    assert data.train.shape == (3, 16, 24)
    assert data.train.levels == 256
    pixels = data.train.pixels(range(50))
    assert torch.equal(pixels[:, 0], pixels[:, 2])
    assert pixels.mean() == pytest.approx(load_digits().images[:50].mean() / 8 - 1, abs=0.1)
    assert "none to validate on" in data.description


def test_digits_without_scikit_learn(monkeypatch):
    import sys

    from diffusers_ddpm_ext.errors import ConfigError

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=r"pip install diffusers-ddpm-ext\[train\]"):
        load_data(DIGITS)


def test_the_fingerprint_identifies_the_data():
    fingerprints = [
        load_data(DIGITS).fingerprint,
        load_data(DataOptions(resolution=(8, 8), validation_fraction=0.2)).fingerprint,
        load_data(DataOptions(resolution=(8, 8), channels=3)).fingerprint,
    ]
    assert len(set(fingerprints)) == 3
    assert load_data(DIGITS).fingerprint == fingerprints[0]


# ---------------------------------------------------------------- 16 bits


def numbered_16_bit(n: int, **options) -> ImageSet:
    """The numbered images with 16 bits: level 257 v for level v, the same value."""
    eight = numbered(n, 5, 6, **options)
    images = [(eight.images.image(i).to(torch.int32) * 257).to(torch.uint16) for i in range(n)]
    return ImageSet(PackedImages(images), eight.rows, eight.size, **options)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_16_bits_are_cropped_and_flipped_like_8_bits(num_workers):
    eight, sixteen = (
        take(make, 6, batch=4, num_workers=num_workers)
        for make in (numbered(9, 5, 6, augmentation=FLIPS), numbered_16_bit(9, augmentation=FLIPS))
    )
    for one, other in zip(eight, sixteen, strict=True):
        assert torch.equal(one.indices, other.indices)
        torch.testing.assert_close(one.pixels, other.pixels, rtol=0, atol=1e-7)
    assert len({tuple(batch.pixels[0].flatten().tolist()) for batch in sixteen}) > 1


def test_16_bit_levels_have_exact_ends_and_differ():
    levels = torch.tensor([0, 1, 2, 32767, 32768, 65533, 65534, 65535]).to(torch.uint16)
    values = levels_to_pixels(levels, 65536)
    assert values[0] == -1
    assert values[-1] == 1
    assert (values.diff() > 0).all()
    torch.testing.assert_close(values.double(), levels.double() * 2 / 65535 - 1, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("top", "warned"), [(4095, True), (65535, False)])
def test_12_bits_stored_in_16_give_a_warning(tmp_path, top, warned):
    for index in range(3):
        values = np.linspace(0, top, 64).round().astype(np.uint16).reshape(8, 8)
        Image.fromarray(np.roll(values, index)).save(tmp_path / f"{index}.png")
    data = load_data(DataOptions(train_data_dir=str(tmp_path), resolution=(8, 8), validation_fraction=0.0))
    assert data.train.levels == 65536
    assert "16 bits" in data.description
    assert (data.warning is not None) == warned
    if warned:
        assert "4,095 of 65,535" in data.warning
        assert "--data_range 0 4095" in data.warning


# ---------------------------------------------------------------- weighted draws


@pytest.mark.parametrize("name", SPLITS)
def test_weighted_draws_do_not_depend_on_the_split(name):
    draws = WeightedDraws([torch.arange(0, 5), torch.arange(5, 30)], (3.0, 1.0))
    images = numbered(30, 6, 9, augmentation=FLIPS, draws=draws)
    expected_indices, expected = effective(take(images, 5, batch=8))
    indices, pixels = effective(itertools.chain(*(take(images, 5, **split) for split in SPLITS[name])))
    assert indices == expected_indices
    assert torch.equal(pixels, expected)


def test_weighted_draws_start_at_any_step_and_keep_their_shares():
    draws = WeightedDraws([torch.arange(0, 5), torch.arange(5, 30)], (3.0, 1.0))
    images = numbered(30, 6, 9, augmentation=FLIPS, draws=draws)
    straight = take(images, 40, batch=6)
    for step in (3, 17):
        later = take(images, 2, batch=6, start_step=step)
        assert [b.indices.tolist() for b in later] == [b.indices.tolist() for b in straight[step : step + 2]]
        assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(later, straight[step:], strict=False))
    counts = Counter(int(index) for batch in straight for index in batch.indices)
    assert sum(counts[index] for index in range(5)) == 180
    assert {counts[index] for index in range(5)} == {36}
    assert {counts[index] for index in range(5, 30)} == {2, 3}


def test_an_image_drawn_again_in_an_epoch_has_another_crop_and_flip():
    """Its pass over the group is the coordinate of its keys: 24 draws of one image in one epoch differ."""
    draws = WeightedDraws([torch.tensor([0]), torch.arange(1, 48)], (1.0, 1.0))
    images = numbered(48, 6, 9, augmentation=FLIPS, draws=draws)
    batches = take(images, 1, batch=48)[0]
    repeated = batches.pixels[batches.indices == 0]
    assert len(repeated) == 24
    assert len({bytes(row.numpy().tobytes()) for row in repeated}) > 10

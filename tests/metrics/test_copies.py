"""Copies of training images: found where they are, and no more of them than chance gives where there are none."""

from __future__ import annotations

import numpy as np
import pytest

from diffusers_ddpm_ext.metrics.copies import estimate_copies, nearest_training_images


def images(count: int, seed: int, dimensions: int = 10) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dimensions))


def test_the_two_nearest_by_brute_force():
    x, train = images(40, 0), images(60, 1)
    found = nearest_training_images(x, train)
    for row, image in enumerate(x):
        distances = np.linalg.norm(train - image, axis=1)
        first, second = np.argsort(distances)[:2]
        assert (found.nearest[row], found.second[row]) == (first, second)
        assert found.ratio[row] == pytest.approx(distances[first] / distances[second])


def test_duplicates_in_the_training_set_do_not_hide_a_copy():
    train = images(50, 0)
    twice = np.concatenate([train, train, train])
    found = nearest_training_images(train + 1e-3, twice)
    assert found.ratio.max() < 0.01
    assert not (found.second % 50 == found.nearest % 50).any()
    assert (nearest_training_images(train, twice).ratio == 0).all()


def test_training_images_are_copies_and_held_out_ones_are_not():
    train, unseen = images(300, 0), images(400, 1)
    copies = estimate_copies(train, train, unseen)
    assert copies.rate.value == 1
    assert copies.memorizes
    nearly = estimate_copies(train + 0.05 * images(300, 5), train, unseen)
    assert nearly.rate.value > 0.95
    assert nearly.memorizes
    same = estimate_copies(unseen, train, unseen)
    assert same.rate.value == same.chance.value == 0.01
    assert not same.memorizes


def test_chance_is_inside_its_interval():
    """200 resamplings: new images of the same distribution are flagged about as rarely as both intervals allow."""
    train, flagged, inside = images(100, 0), 0, 0
    many = nearest_training_images(images(20000, 99), train).ratio
    for seed in range(200):
        result = estimate_copies(images(100, 2 * seed + 1), train, images(100, 2 * seed + 2))
        flagged += result.memorizes
        inside += result.chance.low <= (many <= result.threshold).mean() <= result.chance.high
    assert flagged <= 2
    assert 0.90 <= inside / 200 <= 0.98


def test_a_few_copies_among_many_samples_are_counted():
    train, unseen = images(300, 0), images(400, 1)
    mixed = np.concatenate([images(900, 2), train[:100]])
    result = estimate_copies(mixed, train, unseen)
    assert result.rate.low <= 0.1 + 0.9 * result.chance.value <= result.rate.high
    assert result.memorizes


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((9, 3), (9, 3), (2, 3)), "reference has the features of 2 images"),
        (((9, 3), (3, 3), (9, 3)), "training has the features of 3 images"),
        (((9, 3), (9, 4), (9, 3)), "training 4: take one extractor"),
    ],
)
def test_refusals(shapes, message):
    with pytest.raises(ValueError, match=message):
        estimate_copies(*(np.ones(shape) for shape in shapes))

"""Whether mirror images belong to a set, on images where the answer is known."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

from diffusers_ddpm_ext.training.data.inspection.image_facts import small_gray
from diffusers_ddpm_ext.training.data.inspection.symmetry import MOVES, SymmetryTest
from diffusers_ddpm_ext.training.data.raw_image import RawImage


def mirrored_and_not(images: np.ndarray) -> SymmetryTest:
    test = SymmetryTest()
    for image in images:
        test.add(small_gray(RawImage(image.astype(np.float32)[..., None], "float32 x 1")))
    return test


def test_digits_are_not_mirrored():
    assert mirrored_and_not(load_digits().images[:500]).fits("random_flip") is False


def test_digits_of_which_half_are_mirrored_may_be_mirrored():
    images = load_digits().images[:500]
    mirrored = np.random.default_rng(0).random(len(images)) < 0.5
    images[mirrored] = images[mirrored, :, ::-1]
    assert mirrored_and_not(images).fits("random_flip") is True


def test_strokes_that_lean_to_one_side_are_found_by_their_slant():
    """Their mean image is symmetric, since they are at every place."""
    images = [np.roll(np.eye(16), shift, axis=1) for shift in np.random.default_rng(0).integers(0, 16, 200)]
    test = mirrored_and_not(np.stack(images))
    assert test.slant.effect(test.count) > 3 * test.pixels["random_flip"].effect(test.count)
    assert test.fits("random_flip") is False


def turned_at_random(images: np.ndarray) -> np.ndarray:
    """Every image in one of the 8 orientations of a square."""
    rng = np.random.default_rng(0)
    turned = [np.rot90(image, rng.integers(4)) for image in images]
    return np.stack([image[::-1] if rng.random() < 0.5 else image for image in turned])


def test_all_orientations_fit_a_set_that_has_them():
    test = mirrored_and_not(turned_at_random(load_digits().images[:500]))
    assert [test.fits(flag) for flag in MOVES] == [True, True, True]


def test_horizons_may_be_mirrored_and_not_turned():
    """Bright above and dark below, at any height and with noise: a mirror image is one of them."""
    rng = np.random.default_rng(0)
    images = rng.normal(0, 0.3, (300, 16, 16)) + (np.arange(16)[:, None] < rng.integers(4, 12, (300, 1, 1)))
    test = mirrored_and_not(images)
    assert [test.fits(flag) for flag in MOVES] == [True, False, False]


def test_lines_of_one_direction_are_not_turned():
    """Their mean is flat, and the squares of their gradients are not."""
    rng = np.random.default_rng(0)
    images = np.stack([np.tile(rng.normal(size=(16, 1)), 16) for _ in range(300)])
    test = mirrored_and_not(images)
    assert [test.fits(flag) for flag in MOVES] == [True, True, False]
    assert test.pixels["rotate90"].effect(test.count) < 0.15


def test_few_images_and_flat_images_give_no_answer():
    assert mirrored_and_not(load_digits().images[:10]).fits("random_flip") is None
    assert mirrored_and_not(np.zeros((100, 8, 8))).fits("random_flip") is None

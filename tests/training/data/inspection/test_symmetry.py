"""Whether mirror images belong to a set, on images where the answer is known."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

from diffusers_ddpm_ext.training.data.inspection.image_facts import small_gray
from diffusers_ddpm_ext.training.data.inspection.symmetry import MirrorTest
from diffusers_ddpm_ext.training.data.raw_image import RawImage


def mirrored_and_not(images: np.ndarray) -> MirrorTest:
    test = MirrorTest()
    for image in images:
        test.add(small_gray(RawImage(image.astype(np.float32)[..., None], "float32 x 1")))
    return test


def test_digits_are_not_mirrored():
    assert mirrored_and_not(load_digits().images[:500]).mirrors_belong is False


def test_digits_of_which_half_are_mirrored_may_be_mirrored():
    images = load_digits().images[:500]
    mirrored = np.random.default_rng(0).random(len(images)) < 0.5
    images[mirrored] = images[mirrored, :, ::-1]
    assert mirrored_and_not(images).mirrors_belong is True


def test_strokes_that_lean_to_one_side_are_found_by_their_slant():
    """Their mean image is symmetric, since they are at every place."""
    images = [np.roll(np.eye(16), shift, axis=1) for shift in np.random.default_rng(0).integers(0, 16, 200)]
    test = mirrored_and_not(np.stack(images))
    assert test.effects[1] > 3 * test.effects[0]
    assert test.mirrors_belong is False


def test_few_images_and_flat_images_give_no_answer():
    assert mirrored_and_not(load_digits().images[:10]).mirrors_belong is None
    assert mirrored_and_not(np.zeros((100, 8, 8))).mirrors_belong is None

"""The hash is that of the package imagehash; the pairs are those of comparing each with each."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image

from diffusers_ddpm_ext.training.data.inspection import perceptual_hash as hashing
from diffusers_ddpm_ext.training.data.inspection.image_facts import small_gray
from diffusers_ddpm_ext.training.data.raw_image import RawImage


def smooth(seed: int, size: tuple[int, int] = (100, 80)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def test_hash_is_imagehashs():
    imagehash = pytest.importorskip("imagehash")
    for seed in range(20):
        image = smooth(seed)
        assert f"{hashing.perceptual_hash(small_gray(RawImage(image, 'RGB'))):016x}" == str(imagehash.phash(image))


def brute_force(hashes: np.ndarray, limit: int) -> dict[tuple[int, int], int]:
    pairs = itertools.combinations(range(len(hashes)), 2)
    found = {(i, j): (int(hashes[i]) ^ int(hashes[j])).bit_count() for i, j in pairs}
    return {pair: bits for pair, bits in found.items() if bits <= limit}


@pytest.mark.parametrize("limit", [0, 1, 6, 10])
def test_pairs_are_those_of_comparing_each_with_each(limit):
    """Hashes around few centers, so that there are pairs at every distance."""
    rng = np.random.default_rng(limit)
    centers = rng.integers(0, 2**63, 8, dtype=np.uint64)
    flips = np.bitwise_or.reduce(np.uint64(1) << rng.integers(0, 64, (200, 5), dtype=np.uint64), axis=1)
    hashes = np.unique(rng.choice(centers, 200) ^ np.where(rng.random(200) < 0.1, np.uint64(0), flips))
    rng.shuffle(hashes)
    found = hashing.close_pairs(hashes, limit)
    assert found.complete
    assert dict(zip(map(tuple, found.pairs.tolist()), found.bits.tolist(), strict=True)) == brute_force(hashes, limit)
    assert (np.diff(found.bits) >= 0).all()


def test_equal_hashes_are_paired_with_the_first_of_them():
    hashes = np.array([5, 9, 5, 5, 2**60], dtype=np.uint64)
    found = hashing.close_pairs(hashes, 0)
    assert found.pairs.tolist() == [[0, 2], [0, 3]]


def test_too_many_pairs_are_said_and_the_closest_kept(monkeypatch):
    monkeypatch.setattr(hashing, "MAX_PAIRS", 50)
    hashes = np.arange(200, dtype=np.uint64)
    found = hashing.close_pairs(hashes, 6)
    assert not found.complete
    assert len(found.pairs) == 50
    assert (found.bits == 1).all()


def test_no_image_and_one_image():
    for count in (0, 1):
        assert len(hashing.close_pairs(np.zeros(count, dtype=np.uint64)).pairs) == 0

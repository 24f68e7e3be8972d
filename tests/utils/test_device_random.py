"""Philox against its published vectors and an implementation in plain integers, and the draws made from it."""

from __future__ import annotations

import math

import pytest
import torch

from diffusers_ddpm_ext.utils import device_random as random
from diffusers_ddpm_ext.utils import random_keys as keys

POSITIONS = torch.arange(8)
PUBLISHED = [  # Random123's kat_vectors for philox4x32-10: counter, key, words
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def plain_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """The generator in Python's unbounded integers."""
    (a, b, c, d), (k, m) = counter, key
    for number in range(10):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        own = (k + number * 0x9E3779B9) % 2**32, (m + number * 0xBB67AE85) % 2**32
        a, b, c, d = right // 2**32 ^ b ^ own[0], right % 2**32, left // 2**32 ^ d ^ own[1], left % 2**32
    return a, b, c, d


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED)
def test_the_published_vectors(counter, key, words):
    assert tuple(word.item() for word in random.philox(tuple(map(torch.tensor, counter)), key)) == words


def test_each_word_of_a_draw_is_that_of_its_coordinates():
    """Step, seed and position beyond 32 bits or at their ends."""
    seed, step = 2**40 + 3, 2**33 + 7
    positions = torch.tensor([0, 5, 2**32 - 1])
    wide = keys.wide_key("any", seed)
    got = random.random_words(seed, step, positions, 3, "any")
    for row, position in enumerate(positions.tolist()):
        for block in range(3):
            want = plain_philox((block, position, 7, 2), (wide % 2**32, wide // 2**32))
            assert tuple(int(word[row, block]) for word in got) == want


@pytest.mark.parametrize("shape", [(1,), (3,), (4,), (1, 5, 7), (3, 8, 8), (0, 2, 2)])
def test_a_sample_depends_on_its_own_coordinates_alone(shape):
    """1 x 8, 2 x 4 and any order of micro-batches have the same noise at the same position."""
    whole = random.normal_draws(3, 11, POSITIONS, shape)
    assert whole.shape == (8, *shape)
    assert torch.equal(whole, torch.cat([random.normal_draws(3, 11, part, shape) for part in POSITIONS.split(4)]))
    mixed = torch.tensor([6, 0, 3])
    assert torch.equal(whole[mixed], random.normal_draws(3, 11, mixed, shape))
    for other in (
        random.normal_draws(4, 11, POSITIONS, shape),
        random.normal_draws(3, 12, POSITIONS, shape),
        random.normal_draws(3, 11 + 2**32, POSITIONS, shape),
        random.normal_draws(3, 11, POSITIONS, shape, keys.LATENT),
    ):
        assert not (whole == other).any()


def test_normal_numbers_are_normal():
    """Moments within five standard errors, tails, and no correlation of neighbors, pixels or samples."""
    x = random.normal_draws(0, 0, torch.arange(500), (3, 16, 16)).double()
    n = x.numel()
    assert abs(x.mean().item()) < 5 / math.sqrt(n)
    assert abs(x.var().item() - 1) < 5 * math.sqrt(2 / n)
    assert abs((x**3).mean().item()) < 5 * math.sqrt(15 / n)
    assert abs((x**4).mean().item() - 3) < 5 * math.sqrt(96 / n)
    for level in (-2.5, -1.0, 0.0, 0.5, 3.0):
        share = 0.5 * math.erfc(level / math.sqrt(2))
        assert abs((x > level).double().mean().item() - share) < 5 * math.sqrt(share * (1 - share) / n)
    flat = x.flatten(1)
    for a, b in [(flat[:, 1:], flat[:, :-1]), (flat[:, 2:], flat[:, :-2]), (flat[1:], flat[:-1])]:
        assert abs((a * b).mean().item()) < 5 / math.sqrt(a.numel())
    assert torch.isfinite(x).all()
    assert x.abs().max() > 4


def test_the_extreme_words_give_finite_numbers(monkeypatch):
    ends = torch.tensor([[0, 2**32 - 1]])
    for first in (ends, ends.flip(1)):
        monkeypatch.setattr(random, "random_words", lambda *_, first=first: (first, ends, first, ends))
        assert torch.isfinite(random.normal_draws(0, 0, torch.arange(1), (8,))).all()
        u = random.uniform_draws(0, 0, torch.arange(1))
        assert 0 <= u.item() < 1


def test_uniform_numbers_are_uniform():
    u = random.uniform_draws(1, 5, torch.arange(20_000))
    assert u.dtype == torch.float64
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u, 20, 0, 1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 55  # chi-square of 19 degrees of freedom beyond 1e-5
    assert u.unique().numel() == 20_000
    assert torch.equal(u[40:50], random.uniform_draws(1, 5, torch.arange(40, 50)))


def test_permutations():
    first, second = (random.permutation(0, step, 1000, torch.device("cpu"), "order") for step in (0, 1))
    assert torch.equal(first.sort().values, torch.arange(1000))
    assert 0 <= (first == second).sum() < 10

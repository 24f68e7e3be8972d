"""Keys: the same number everywhere, different streams apart, draws that no neighbour changes."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from diffusers_ddpm_ext.utils import random_keys as keys
from diffusers_ddpm_ext.utils.random_keys import generator, key, sample_draws

STREAMS = [keys.NOISE, keys.ORDER, keys.FLIP, keys.CROP, keys.DROPOUT, keys.PREVIEW, keys.VALIDATION, keys.SPLIT]


def test_a_key_is_the_hash_of_its_written_form():
    """The form is a file format: runs are repeated and resumed by it."""
    digest = hashlib.blake2b(b"s5:noise" + b"i1:7" + b"i2:-3", digest_size=4).digest()
    assert key("noise", 7, -3) == int.from_bytes(digest, "little")
    assert 0 <= key("noise", 7, -3) < 2**32


def test_a_key_is_the_same_in_another_process():
    """Python's own hash() of a string differs from process to process."""
    code = (
        "from diffusers_ddpm_ext.utils.random_keys import key; import sys; sys.stdout.write(str(key('order', 3, 'a')))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == key("order", 3, "a")


def test_parts_do_not_run_together():
    alike = [
        ("ab", "c"),
        ("a", "bc"),
        ("abc",),
        ("a", 1),
        ("a", "1"),
        ("a", 11),
        ("a", 1, 1),
        ("a", -1),
        ("i1:1",),
        (1,),
    ]
    assert len({key(*parts) for parts in alike}) == len(alike)


def test_integers_of_every_kind_are_one_key():
    assert key("x", 5) == key("x", np.int64(5)) == key("x", torch.tensor(5))
    assert key("x", 5) != key("x", 5 + 2**32)  # torch's CPU generator would take these for the same seed


def test_file_names_that_are_no_unicode_have_a_key():
    assert key("split", "photo-\udcff.jpg") != key("split", "photo-.jpg")


@pytest.mark.parametrize("parts", [(), (1.5,), ("a", None), (b"a",)])
def test_other_parts_are_refused(parts):
    with pytest.raises(ValueError, match="key"):
        key(*parts)


def test_streams_never_meet():
    """Every stream at the same coordinates starts with other numbers."""
    assert len(set(STREAMS)) == len(STREAMS)
    starts = {tuple(torch.randn(4, generator=generator(stream, 0, 0)).tolist()) for stream in STREAMS}
    assert len(starts) == len(STREAMS)


def test_generator_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    torch.randn(9, generator=generator("noise", 1))
    sample_draws(1, 2, range(3), (1, 4, 4), 10)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (2,), ()])
def test_draws_are_those_of_one_new_generator_a_sample(shape):
    """The shared generator is an economy, not another stream (below 16 numbers torch draws in another way)."""
    t, noise = sample_draws(3, 11, [4, 0, 9], shape, 1000)
    for row, place in enumerate([4, 0, 9]):
        draw = generator("noise", 3, 11, place)
        assert t[row] == torch.randint(0, 1000, (), generator=draw)
        assert torch.equal(noise[row], torch.randn(shape, generator=draw))
    assert t.dtype == torch.int64
    assert noise.dtype == torch.float32
    assert noise.shape == (3, *shape)


def test_draws_do_not_depend_on_the_split():
    whole_t, whole = sample_draws(5, 2, range(8), (3, 4, 4), 200)
    for parts in ([[0, 1, 2, 3], [4, 5, 6, 7]], [[7], [2, 0], [5, 4, 3], [1, 6]]):
        for part in parts:
            t, noise = sample_draws(5, 2, torch.tensor(part), (3, 4, 4), 200)
            assert torch.equal(t, whole_t[part])
            assert torch.equal(noise, whole[part])


def test_seed_step_position_and_stream_all_count():
    base = sample_draws(1, 1, [1], (1, 4, 4), 1000)[1]
    others = [
        sample_draws(2, 1, [1], (1, 4, 4), 1000)[1],
        sample_draws(1, 2, [1], (1, 4, 4), 1000)[1],
        sample_draws(1, 1, [2], (1, 4, 4), 1000)[1],
        sample_draws(1 + 2**32, 1, [1], (1, 4, 4), 1000)[1],
        sample_draws(1, 1, [1], (1, 4, 4), 1000, stream=keys.VALIDATION)[1],
    ]
    assert not any(torch.equal(base, other) for other in others)


def test_draws_follow_their_laws():
    """Uniform timesteps and standard normal noise, uncorrelated from one sample to the next (5 sigma bounds)."""
    n, size, chain = 4000, 64, 10
    t, noise = sample_draws(0, 0, range(n), (size,), chain)
    expected = n / chain
    chi2 = ((torch.bincount(t, minlength=chain) - expected) ** 2 / expected).sum().item()
    assert chi2 < 9 + 5 * 18**0.5
    assert abs(noise.mean().item()) < 5 / (n * size) ** 0.5
    assert abs(noise.var().item() - 1) < 5 * (2 / (n * size)) ** 0.5
    neighbours = (noise[1:] * noise[:-1]).mean().item()
    assert abs(neighbours) < 5 / (n * size) ** 0.5


def test_a_chain_without_steps_is_refused():
    with pytest.raises(ValueError, match="num_train_timesteps=0"):
        sample_draws(0, 0, [0], (1,), 0)

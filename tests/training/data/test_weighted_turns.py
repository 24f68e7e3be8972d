"""Weighted draws against a seat-by-seat apportionment, exact shares, the binomial distribution, and plain counting."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
import scipy.stats
import torch

from diffusers_ddpm_ext.training.data.weighted_turns import WeightedDraws, WeightedTurns

WEIGHTS = {
    "3 to 1": (3.0, 1.0),
    "equal": (1.0, 1.0, 1.0),
    "tenths": (0.7, 0.2, 0.1),
    "far apart": (1000.0, 1.0, 0.01),
    "many": tuple(1 + (7 * j) % 5 for j in range(40)),
    "one": (2.5,),
}


def seat_by_seat(weights, samples):
    """Sainte-Lague's method as it is written down: one seat after the other to the largest quotient."""
    counts, history = [0] * len(weights), []
    for _ in range(samples):
        quotients = [Fraction(str(w)) / (2 * c + 1) for w, c in zip(weights, counts, strict=True)]
        counts[quotients.index(max(quotients))] += 1
        history.append(list(counts))
    return history


@pytest.mark.parametrize("name", WEIGHTS)
def test_counts_are_those_of_the_seat_by_seat_method(name):
    turns = WeightedTurns(WEIGHTS[name], 10)
    assert turns.counts(0) == [0] * len(WEIGHTS[name])
    for samples, counts in enumerate(seat_by_seat(WEIGHTS[name], 150), start=1):
        assert turns.counts(samples) == counts


@pytest.mark.parametrize(("weights", "share"), [((3, 1), [750, 250]), ((0.7, 0.3), [700, 300]), ((6, 2), [750, 250])])
def test_shares_are_exact_where_whole_numbers_allow_it(weights, share):
    assert WeightedTurns(weights, 7).counts(1000) == share


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("block", [1, 7, 64])
def test_the_draws_of_each_group_are_numbered_without_a_gap(name, block):
    turns, seen = WeightedTurns(WEIGHTS[name], block), Counter()
    for number in range(200 // block):
        for group, position in zip(*(each.tolist() for each in turns.groups_and_numbers(5, number)), strict=True):
            assert position == seen[group]
            seen[group] += 1
        assert [seen[group] for group in range(len(WEIGHTS[name]))] == turns.counts((number + 1) * block)


def test_the_order_within_a_block_is_random_and_keyed():
    turns = WeightedTurns((1, 1), 64)
    first, again = turns.groups_and_numbers(3, 0)[0], WeightedTurns((1, 1), 64).groups_and_numbers(3, 0)[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, turns.groups_and_numbers(4, 0)[0])
    assert not torch.equal(first, turns.groups_and_numbers(3, 1)[0])
    assert not torch.equal(first, first.sort().values)


def test_a_batch_has_the_counts_of_random_draws():
    """The first 32 of 1,000 samples with weights 3 and 1: hypergeometric counts, near the binomial (chi-square)."""
    turns = WeightedTurns((3, 1), 1000)
    counts = Counter(int((turns.groups_and_numbers(seed, 0)[0][:32] == 0).sum()) for seed in range(600))
    edges = range(20, 29)
    distribution = scipy.stats.hypergeom(1000, 750, 32)
    observed = [sum(c for k, c in counts.items() if k < 20)]
    observed += [counts[k] for k in edges]
    observed += [sum(c for k, c in counts.items() if k > 28)]
    expected = [distribution.cdf(19), *(distribution.pmf(k) for k in edges), distribution.sf(28)]
    assert scipy.stats.chisquare(observed, [600 * p for p in expected]).pvalue > 0.001
    mean, binomial = sum(k * c for k, c in counts.items()) / 600, scipy.stats.binom(32, 0.75)
    assert abs(mean - binomial.mean()) < 4 * binomial.std() / 600**0.5


def test_every_image_has_its_turn_before_any_has_another():
    groups = [torch.arange(0, 30), torch.arange(30, 37), torch.tensor([37])]
    draws, counts = WeightedDraws(groups, (2, 3, 1)), Counter()
    for epoch in range(25):
        indices, passes = draws.order(9, epoch)
        assert len(indices) == 38
        for index, number in zip(indices.tolist(), passes.tolist(), strict=True):
            assert number == counts[index]  # so that no image occurs twice in a pass
            counts[index] += 1
    total = 25 * 38
    for group, weight in zip(groups, (2, 3, 1), strict=True):
        drawn = [counts[index] for index in group.tolist()]
        assert max(drawn) - min(drawn) <= 1
        assert abs(sum(drawn) - total * weight / 6) <= 1
    assert {int(i) for i in draws.order(9, 0)[0]} != {int(i) for i in draws.order(9, 1)[0]}


def test_passes_are_shuffled_differently():
    draws = WeightedDraws([torch.arange(20)], (1,))
    first, second = draws.order(0, 0)[0], draws.order(0, 1)[0]
    assert torch.equal(first.sort().values, torch.arange(20))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("weights", "block"), [((), 4), ((0.0, 1.0), 4), ((-1.0, 2.0), 4), ((float("nan"), 1.0), 4), ((1.0, 2.0), 0)]
)
def test_impossible_weights_are_refused(weights, block):
    with pytest.raises(ValueError, match=r"weights=|block="):
        WeightedTurns(weights, block)

"""Weighted draws: from which group (a source, a class) each sample of a run is, and which image of it.

Both are functions of the seed and of the sample's number in the run, without a state: a run can start at any step,
with any split into processes. Samples are counted in blocks. In every block the groups have their shares as exactly as
whole numbers can, and so they have over all blocks so far; their order within a block is random.

Symbols: w_j weight of group j, W their sum, S samples so far, C_j(S) those of group j.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from diffusers_ddpm_ext.utils import random_keys as keys


@dataclass(frozen=True)
class WeightedTurns:
    """From which group each sample of a run is drawn.

    Attributes:
        weights: of the groups, finite and above 0; only their ratios matter.
        block: number of samples in a block.

    Raises:
        ValueError: there is no group, a weight is not finite and above 0, or a block has no sample.
    """

    weights: Sequence[float]
    block: int

    def __post_init__(self) -> None:
        if not self.weights or not all(math.isfinite(weight) and weight > 0 for weight in self.weights):
            raise ValueError(f"weights={self.weights}: each group needs one that is finite and above 0.")
        if self.block < 1:
            raise ValueError(f"block={self.block}: it must be at least 1.")

    @cached_property
    def _shares(self) -> list[int]:
        """The weights as whole numbers; 0.7 counts as 7/10, not as the binary fraction next to it."""
        exact = [Fraction(repr(float(weight))) for weight in self.weights]
        common = math.lcm(*(weight.denominator for weight in exact))
        return [int(weight * common) for weight in exact]

    def counts(self, samples: int) -> list[int]:
        """Return how many of the first ``samples`` samples each group has, C_j(S).

        By the method of Sainte-Lague (Webster): sample after sample goes to the group with the largest
        w_j / (C_j + 1/2), the first one of equals. So no count ever falls, and each is S w_j / W up to rounding.
        """
        shares, total = self._shares, sum(self._shares)
        counts = [(2 * samples * share + total) // (2 * total) for share in shares]  # quotas, halves rounded up
        excess = sum(counts) - samples
        if excess > 0:  # take back the last turns
            last = [
                (-Fraction(2 * count - 1, share), -j)
                for j, (count, share) in enumerate(zip(counts, shares, strict=True))
            ]
            heapq.heapify(last)
            for _ in range(excess):
                j = -last[0][1]
                counts[j] -= 1
                heapq.heapreplace(last, (-Fraction(2 * counts[j] - 1, shares[j]), -j))
        elif excess < 0:  # give the next turns
            following = [
                (Fraction(2 * count + 1, share), j)
                for j, (count, share) in enumerate(zip(counts, shares, strict=True))
            ]
            heapq.heapify(following)
            for _ in range(-excess):
                j = following[0][1]
                counts[j] += 1
                heapq.heapreplace(following, (Fraction(2 * counts[j] + 1, shares[j]), j))
        return counts

    def groups_and_numbers(self, seed: int, number: int) -> tuple[Tensor, Tensor]:
        """Return the groups of the samples of block ``number``, and which draw of its group each is.

        Args:
            seed: of the run.
            number: of the block, from 0.

        Returns:
            The groups, (block,), int64; and (block,), int64, 0 for the first sample that a group has in the run. Both
            in the order of the samples.
        """
        before, after = self.counts(number * self.block), self.counts((number + 1) * self.block)
        first = torch.tensor(before, dtype=torch.int64)
        counts = torch.tensor(after, dtype=torch.int64) - first
        in_order = torch.repeat_interleave(torch.arange(len(counts)), counts)
        shuffle = torch.randperm(self.block, generator=keys.generator(keys.MIXTURE, seed, number))
        groups = in_order[shuffle]
        of_group = torch.arange(self.block) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        numbers = torch.empty_like(groups)
        numbers[groups.argsort(stable=True)] = first[in_order] + of_group
        return groups, numbers


@dataclass(frozen=True)
class WeightedDraws:
    """How often the images of a set are drawn: by groups, within which each image has its turn before any has another.

    An epoch has as many samples as the set has images, of which some are drawn several times, and others not at all.

    Attributes:
        groups: indices of the images of each group, (n_j,), int64, n_j > 0; together all images of the set.
        weights: of the groups, finite and above 0.
    """

    groups: Sequence[Tensor]
    weights: Sequence[float]

    @cached_property
    def _turns(self) -> WeightedTurns:
        return WeightedTurns(self.weights, sum(len(group) for group in self.groups))

    def order(self, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the images of an epoch, and which pass over its group each belongs to.

        Args:
            seed: of the run.
            epoch: from 0.

        Returns:
            Indices of the images, (n,), int64; and passes from 0, (n,), int64: no image occurs twice in one.
        """
        chosen, numbers = self._turns.groups_and_numbers(seed, epoch)
        indices, passes = torch.empty_like(chosen), torch.empty_like(chosen)
        places = chosen.argsort(stable=True).split(torch.bincount(chosen, minlength=len(self.groups)).tolist())
        for j, (group, at) in enumerate(zip(self.groups, places, strict=True)):
            if len(at) == 0:
                continue
            start, stop = int(numbers[at[0]]), int(numbers[at[-1]]) + 1
            first = start // len(group)
            shuffles = [self._shuffle(seed, j, each) for each in range(first, -(-stop // len(group)))]
            offset = first * len(group)
            indices[at] = torch.cat(shuffles)[start - offset : stop - offset]
            passes[at] = numbers[at] // len(group)
        return indices, passes

    def _shuffle(self, seed: int, j: int, number: int) -> Tensor:
        """The images of a group in the order of a pass."""
        group = self.groups[j]
        if len(group) == 1:
            return group
        return group[torch.randperm(len(group), generator=keys.generator(keys.ORDER, seed, number, j))]

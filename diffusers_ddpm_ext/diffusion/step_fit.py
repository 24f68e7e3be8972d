"""The K steps whose samples are closest to those of many steps: a search over positions, for any sampler.

Symbols:

    T    steps of the training chain                K       steps of the sampler
    t_i  position of step i, descending             error   distance of the samples of t_1, ..., t_K to those of many
                                                            steps from the same noise, of any kind and unit

The search knows a sampler by the error of its samples alone, so that it is the same for first-order and multistep
solvers, with or without guidance. It moves one step at a time between its neighbors, by half of the gap, then a
quarter and an eighth, and keeps what lowers the error (coordinate descent). The error of the final samples counts what
a local error cannot: that errors at high noise shrink on the way, and that those of neighbors cancel.

It begins at the best of evenly spaced and power-law steps with several first steps. From more than 6 steps on it
begins also at a solution for half as many, interpolated, since the best density of steps hardly depends on K.

Compare Pei et al. 2025, arXiv 2503.21774, which finds steps by dynamic programming over local errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from diffusers_ddpm_ext.diffusion.respacing import TIMESTEP_SPACINGS, spaced_timesteps

Steps = tuple[int, ...]
Error = Callable[[Steps], float]
FIRST_STEPS, POWERS = (1.0, 0.8, 0.65), (1.0, 1.5, 2.0)
"""First steps in units of T, and powers of the spacing, of the starting points."""
RADII = (1 / 2, 1 / 4, 1 / 8)
"""By which part of the gap to a neighbor a step is moved, one after the other."""
LARGEST_DIRECT = 6
"""Most steps that are searched without a solution for half as many."""


@dataclass(frozen=True)
class StepFit:
    """Result of a search.

    Attributes:
        steps: t_1, ..., t_K, descending.
        error: of their samples.
        error_even: the smallest one of evenly spaced steps.
    """

    steps: Steps
    error: float
    error_even: float


def fit_steps(error: Error, count: int, total: int, start: Steps | None = None) -> StepFit:
    """Search for the steps with the smallest error.

    Args:
        error: of descending steps in [0, T), at least one; finite.
        count: K, in [1, T].
        total: T.
        start: steps of a search for another K, to begin at.

    Raises:
        ValueError: K is out of its range.
    """
    if not 1 <= count <= total:
        raise ValueError(f"num_inference_steps={count} must be in [1, {total}].")
    errors: dict[Steps, float] = {}

    def evaluate(steps: Steps) -> float:
        if steps not in errors:
            errors[steps] = error(steps)
        return errors[steps]

    best = _search(evaluate, count, total, start)
    even = [tuple(spaced_timesteps(count, total, spacing).tolist()) for spacing in TIMESTEP_SPACINGS]
    return StepFit(best, evaluate(best), min(map(evaluate, even)))


def most_calls(count: int, has_start: bool = False) -> int:
    """The largest number of the network's calls per sample that a search can need."""
    starts = len(TIMESTEP_SPACINGS) + len(FIRST_STEPS) * len(POWERS)
    if has_start or count > LARGEST_DIRECT:
        calls = count * (starts + 1 + 2 * count * len(RADII[1:]))
        return calls if has_start else calls + most_calls(-(-count // 2))
    return count * (starts + 2 * count * len(RADII))


def interpolate_steps(steps: Steps, count: int, total: int) -> Steps:
    """Steps of the same density for another number of steps, descending and distinct.

    Args:
        steps: descending, in [0, T).
        count: K of the result, in [1, T].
        total: T.
    """
    known = np.append(steps, -1.0)  # the last step leads to the clean sample
    return _distinct(np.interp(np.arange(count) / count, np.linspace(0, 1, len(known)), known), total)


def _search(evaluate: Error, count: int, total: int, start: Steps | None) -> Steps:
    if start is None and count > LARGEST_DIRECT:
        start = _search(evaluate, -(-count // 2), total, None)
    starts = dict.fromkeys(_starting_points(count, total))
    radii: tuple[float, ...] = RADII
    if start is not None:
        starts[interpolate_steps(start, count, total)] = None
        radii = RADII[1:]
    best = min(starts, key=evaluate)
    for radius in radii:
        best = _descend(evaluate, best, radius, total)
    return best


def _descend(evaluate: Error, steps: Steps, radius: float, total: int) -> Steps:
    """Move every step once, the first one first."""
    for i in range(len(steps)):
        for candidate in _moved(steps, i, radius, total):
            if evaluate(candidate) < evaluate(steps):
                steps = candidate
                break
    return steps


def _moved(steps: Steps, i: int, radius: float, total: int) -> Iterator[Steps]:
    """The steps with step i moved down and up."""
    above, below = ((total, *steps)[i], (*steps, -1)[i + 1])
    for target in (below, above):
        position = steps[i] + round(radius * (target - steps[i]))
        if below < position < above and position != steps[i]:
            yield (*steps[:i], position, *steps[i + 1 :])


def _starting_points(count: int, total: int) -> Iterator[Steps]:
    for spacing in TIMESTEP_SPACINGS:
        yield tuple(spaced_timesteps(count, total, spacing).tolist())
    for first in FIRST_STEPS:
        for power in POWERS:
            yield _distinct(first * total * (1 - np.arange(count) / count) ** power - 1, total)


def _distinct(positions: np.ndarray, total: int) -> Steps:
    """The nearest descending whole steps in [0, T): each at least 1 above the next, and room for those above it."""
    count = len(positions)
    lowest = np.arange(count)[::-1]
    rounded = np.clip(np.round(positions).astype(np.int64), lowest, total - 1 - np.arange(count))
    # Distances to the lowest possible steps must not increase from one step to the next lower one.
    return tuple(int(step) for step in np.maximum.accumulate((rounded - lowest)[::-1])[::-1] + lowest)

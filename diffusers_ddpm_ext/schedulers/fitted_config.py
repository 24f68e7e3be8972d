"""What a fit writes into a scheduler's config, as JSON can hold it: v of each step, and the best steps for each K."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusers_ddpm_ext.diffusion.respacing import custom_timesteps
from diffusers_ddpm_ext.diffusion.schedule import checked_v_posterior
from diffusers_ddpm_ext.schedulers.config import as_floats


def dial(name: str, value: Any) -> float | list[float]:
    """``v_posterior`` or ``v_decoder`` as JSON can hold it; its range and length are checked with the tables."""
    if isinstance(value, (bool, str)) or np.ndim(value) == 0:
        return float(checked_v_posterior(value, 1, name))  # a scalar gives a scalar
    return as_floats(value, name)


def checked_choices(choices: Any, num_train_timesteps: int) -> dict[str, list[int]] | None:
    """``optimal_timesteps`` as JSON can hold it.

    Raises:
        ValueError: it is not a mapping from K to K descending steps.
    """
    if choices is None:
        return None
    if not isinstance(choices, Mapping):
        raise ValueError(f"optimal_timesteps={choices!r} must map a number of steps to the steps, or be None.")
    checked = {}
    for count, steps in choices.items():
        kept = custom_timesteps(list(steps), num_train_timesteps).tolist()
        if str(count) != str(len(kept)):
            raise ValueError(f"optimal_timesteps[{count!r}] holds {len(kept)} steps; it must hold {count}.")
        checked[str(count)] = kept
    return checked


def ranges(known: Mapping[str, Any]) -> str:
    """Numbers of steps as a person writes them: 1-4, 10."""
    counts = sorted(map(int, known))
    starts = [k for k in counts if k - 1 not in counts]
    ends = [k for k in counts if k + 1 not in counts]
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))

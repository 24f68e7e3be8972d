"""Timesteps that were fitted to a network and are kept in its scheduler's config, by name and number. Loads no torch.

``samples``: those whose samples are closest to samples of many steps, for one class of schedulers each
(``config.sample_timesteps``, of `ddpm-ext fit-steps`); ``bound``: those of the least variational bound
(``config.optimal_timesteps``, of `ddpm-ext fit-variance`); ``even``: those of the scheduler's own spacing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_ddpm_ext.schedulers.config import checked_optimal_timesteps, format_ranges
from diffusers_ddpm_ext.utils.checks import check_one_of, describe
from diffusers_ddpm_ext.utils.vocabulary import NAMED_TIMESTEPS, SAMPLE_TIMESTEPS


def named_timesteps(
    name: str, count: int | None, scheduler: str, config: Mapping[str, Any], total: int
) -> list[int] | None:
    """Fitted timesteps of a scheduler's config.

    Args:
        name: ``samples``, ``bound`` or ``even``.
        count: K.
        scheduler: class that samples.
        config: of the trained scheduler.
        total: T.

    Returns:
        (K,), descending; None for ``even``.

    Raises:
        ValueError: the name is unknown, there is no K, or no such timesteps are in the config: which ones are, and the
            command that fits them.
    """
    check_one_of("timesteps", name, NAMED_TIMESTEPS, ", or a list of steps")
    if name == "even":
        return None
    if count is None:
        raise ValueError(f"timesteps={name!r} needs num_inference_steps: how many of them.")
    label = f"timesteps={name!r} with num_inference_steps={describe(count)}"
    if name == "bound":
        known = checked_optimal_timesteps(config.get("optimal_timesteps"), total) or {}
        fit = "ddpm-ext fit-variance FOLDER"
        found = f"known are those for {format_ranges(known)} steps" if known else "none are known"
    else:
        fitted = checked_sample_timesteps(config.get(SAMPLE_TIMESTEPS), total) or {}
        known = fitted.get(scheduler) or {}
        fit = f"ddpm-ext fit-steps FOLDER --scheduler {scheduler} --num_inference_steps {describe(count)}"
        others = "; ".join(f"{format_ranges(steps)} of {each}" for each, steps in fitted.items())
        found = f"none are fitted for {scheduler}" + (f", but {others}" if others else "")
        if known:
            found = f"for {scheduler} those of {format_ranges(known)} steps are fitted"
    if str(count) not in known:
        raise ValueError(f"{label}: {found}; find them with `{fit}`, or use 'even'.")
    return known[str(count)]


def checked_sample_timesteps(value: Any, num_train_timesteps: int) -> dict[str, dict[str, list[int]]] | None:
    """``sample_timesteps`` as a JSON value; ValueError unless it maps classes to K to K descending steps."""
    if value is None:
        return None
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ValueError(
            f"sample_timesteps={describe(value)} must map the class of a scheduler to numbers of steps and these to "
            "the steps, or be None."
        )
    checked = {}
    for name, steps in value.items():
        try:
            checked[name] = checked_optimal_timesteps(steps, num_train_timesteps) or {}
        except ValueError as error:
            raise ValueError(f"sample_timesteps of {describe(name)}: {error}") from None
    return checked

"""Scheduler configs: noise schedules and fitted values in a form that every Diffusers scheduler reads correctly.

Two things can go wrong when a config is handed from one scheduler class to another:

- the other class has no name for our betas. The config then has them as ``trained_betas``, in addition to their name;
- a class drops the keys that are at *its* defaults, and the next class fills in its own: other betas, silently.

Source: ``ConfigMixin.extract_init_dict`` of Diffusers, whose list of such keys is ``_use_default_values``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import numpy as np

from diffusers_ddpm_ext.diffusion.respacing import custom_timesteps
from diffusers_ddpm_ext.diffusion.schedule import as_table, checked_v_posterior, make_betas
from diffusers_ddpm_ext.utils.checks import describe
from diffusers_ddpm_ext.utils.vocabulary import FROM_COMPVIS_ARGUMENT, BetaSchedule

DEFAULT_NUM_TRAIN_TIMESTEPS = 1000
DEFAULT_COSINE_S = 0.008
# Keys that determine the betas of a named schedule.
BETA_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "cosine_s")
# Keys that a trained network depends on.
PROCESS_KEYS = (*BETA_KEYS, "trained_betas", "rescale_betas_zero_snr", "prediction_type")

SIMILAR = 0.88  # of a misspelled key; the nearest key of another scheduler (timestep_scaling) has 0.875


def needs_explicit_betas(beta_schedule: str, cosine_s: float) -> bool:
    """Whether some stock scheduler has no name for these betas, so that the config must contain them."""
    if beta_schedule == "squaredcos_cap_v2":
        return cosine_s != DEFAULT_COSINE_S
    return beta_schedule not in ("linear", "scaled_linear")


def resolve_betas(
    num_train_timesteps: int,
    beta_start: float,
    beta_end: float,
    beta_schedule: BetaSchedule,
    trained_betas: Any,
    cosine_s: float,
) -> tuple[int, list[float] | None]:
    """Number of steps and explicit betas for a config.

    Args:
        num_train_timesteps: T; its default is replaced by the number of ``trained_betas``, if there are any.
        beta_start: first beta.
        beta_end: last beta.
        beta_schedule: name in Diffusers.
        trained_betas: list, array or tensor, (T,), or None.
        cosine_s: offset of the cosine.

    Returns:
        T, and the betas as a list of floats if the config must contain them, else None.

    Raises:
        ValueError: T is neither the default nor the number of ``trained_betas``, or an argument is out of its range.
    """
    if trained_betas is not None:
        betas = as_table("trained_betas", trained_betas).tolist()
        if num_train_timesteps not in (DEFAULT_NUM_TRAIN_TIMESTEPS, len(betas)):
            raise ValueError(
                f"num_train_timesteps={num_train_timesteps} contradicts the {len(betas)} trained_betas: leave "
                "num_train_timesteps out, or pass as many betas."
            )
        return len(betas), betas
    if needs_explicit_betas(beta_schedule, cosine_s):
        named = make_betas(beta_schedule, num_train_timesteps, beta_start, beta_end, cosine_s)
        return num_train_timesteps, named.tolist()
    return num_train_timesteps, None


def normalize_config(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A config of this or another scheduler class, prepared for ours and for the new values of ``overrides``.

    The copy keeps what the network was trained with even if it is the other class's default. Explicit betas go if the
    caller replaces a value that they were computed from, the number of steps if the caller replaces the betas.
    """
    config = dict(config)
    defaults = config.get("_use_default_values", [])
    config["_use_default_values"] = [key for key in defaults if key not in PROCESS_KEYS]
    if config.get("variance_type", "") is None:  # multistep solvers write null
        del config["variance_type"]
    if overrides.get("trained_betas") is not None:
        if "num_train_timesteps" not in overrides:
            config.pop("num_train_timesteps", None)
    elif "trained_betas" not in overrides and set(BETA_KEYS) & set(overrides) and _betas_follow_from_name(config):
        config["trained_betas"] = None
    return config


def _betas_follow_from_name(config: Mapping[str, Any]) -> bool:
    betas, name = config.get("trained_betas"), config.get("beta_schedule")
    cosine_s = config.get("cosine_s", DEFAULT_COSINE_S)
    if betas is None or name is None or not needs_explicit_betas(name, cosine_s):
        return False
    try:
        named = make_betas(name, len(betas), config.get("beta_start", 1e-4), config.get("beta_end", 0.02), cosine_s)
    except ValueError:
        return False
    return np.array_equal(named, np.asarray(betas, dtype=np.float64))


def check_names(names: Iterable[str], own: Mapping[str, Any]) -> None:
    """Raise ValueError for names that Diffusers would ignore: CompVis' names of our keys, and near misses of them.

    Other unknown names are keys of other schedulers, which a config keeps for them.
    """
    for name in names:
        meant = (
            [FROM_COMPVIS_ARGUMENT[name]]
            if name in FROM_COMPVIS_ARGUMENT
            else get_close_matches(name, own, 1, SIMILAR)
        )
        if name not in own and meant:
            raise ValueError(f"{name} is no key of a scheduler's config and would be ignored: use {meant[0]}.")


def interpolation_weight(name: str, value: Any) -> float | list[float]:
    """``v_posterior`` or ``v_decoder`` as a JSON value; the tables check its range and length."""
    if isinstance(value, (list, tuple)) or len(getattr(value, "shape", ())) > 0:
        return as_table(name, value).tolist()
    return float(checked_v_posterior(value, 1, name))


def checked_optimal_timesteps(optimal_timesteps: Any, num_train_timesteps: int) -> dict[str, list[int]] | None:
    """``optimal_timesteps`` as a JSON value; ValueError unless it maps each K to K descending steps."""
    if optimal_timesteps is None:
        return None
    if not isinstance(optimal_timesteps, Mapping):
        raise ValueError(
            f"optimal_timesteps={describe(optimal_timesteps)} must map a number of steps to the steps, or be None."
        )
    checked = {}
    for count, steps in optimal_timesteps.items():
        if not isinstance(steps, (list, tuple, np.ndarray)):
            raise ValueError(f"optimal_timesteps[{describe(count)}]={describe(steps)} must be a list of steps.")
        kept = custom_timesteps(steps, num_train_timesteps).tolist()
        if str(count) != str(len(kept)):
            raise ValueError(f"optimal_timesteps[{describe(count)}] holds {len(kept)} steps; it must hold {count}.")
        checked[str(count)] = kept
    return checked


def format_ranges(known: Mapping[str, Any]) -> str:
    """The numbers of steps (keys) as ranges: 1-4, 10."""
    counts = sorted(map(int, known))
    starts = [k for k in counts if k - 1 not in counts]
    ends = [k for k in counts if k + 1 not in counts]
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))

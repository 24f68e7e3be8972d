"""What a scheduler's config stands for: its noise schedule and its checked values, without torch and Diffusers.

The constructor of `DDPMExtScheduler` resolves its arguments here, and commands that only need the numbers of a saved
scheduler (plots, the page of a run) read its file here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffusers_ddpm_ext.diffusion.respacing import TIMESTEP_SPACINGS
from diffusers_ddpm_ext.diffusion.schedule import NoiseSchedule, check_prediction_type
from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.schedulers.config import (
    DEFAULT_COSINE_S,
    DEFAULT_NUM_TRAIN_TIMESTEPS,
    check_names,
    checked_optimal_timesteps,
    interpolation_weight,
    normalize_config,
    resolve_betas,
)
from diffusers_ddpm_ext.utils.checks import check_one_of, checked_flag, checked_integer, checked_number, describe
from diffusers_ddpm_ext.utils.input_files import file_name, read_json_object
from diffusers_ddpm_ext.utils.vocabulary import VARIANCE_TYPES

MAX_RANGE = 1e30  # data units, within float32
DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": DEFAULT_NUM_TRAIN_TIMESTEPS,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "variance_type": "fixed_small",
    "clip_sample": True,
    "prediction_type": "epsilon",
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "clip_sample_range": 1.0,
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
    "v_posterior": None,
    "cosine_s": DEFAULT_COSINE_S,
    "v_decoder": None,
    "optimal_timesteps": None,
}
"""Arguments of `DDPMExtScheduler` and their defaults; a test compares them with its signature."""


@dataclass(frozen=True)
class ResolvedConfig:
    """The meaning of a scheduler's arguments.

    Attributes:
        schedule: of all T steps.
        values: of the config, all of `DEFAULTS`, as JSON values.
    """

    schedule: NoiseSchedule
    values: dict[str, Any]


def resolve_config(arguments: Mapping[str, Any]) -> ResolvedConfig:
    """Check the arguments of `DDPMExtScheduler`, all of them, and make its schedule.

    Raises:
        ValueError: an argument is out of its range, or two contradict each other.
    """
    values = dict(arguments)
    variance_type, prediction_type = values["variance_type"], values["prediction_type"]
    check_one_of("variance_type", variance_type, VARIANCE_TYPES)
    check_one_of("timestep_spacing", values["timestep_spacing"], TIMESTEP_SPACINGS)
    check_prediction_type(prediction_type)
    weight = None
    if values["v_posterior"] is not None:
        if variance_type not in ("fixed_small", "fixed_large"):
            raise ValueError(
                f"v_posterior={describe(values['v_posterior'])} contradicts variance_type={variance_type!r}: leave "
                "v_posterior out, or leave variance_type at 'fixed_small'."
            )
        # The closest value for a reader that does not know v_posterior.
        weight = interpolation_weight("v_posterior", values["v_posterior"])
        variance_type = "fixed_small" if np.mean(weight) < 0.5 else "fixed_large"
    decoder: Any = None if values["v_decoder"] is None else interpolation_weight("v_decoder", values["v_decoder"])
    beta_start = checked_number("beta_start", values["beta_start"], "a finite number")
    beta_end = checked_number("beta_end", values["beta_end"], "a finite number")
    rescale = checked_flag("rescale_betas_zero_snr", values["rescale_betas_zero_snr"])
    num_train_timesteps, trained_betas = resolve_betas(
        values["num_train_timesteps"],
        beta_start,
        beta_end,
        values["beta_schedule"],
        values["trained_betas"],
        values["cosine_s"],
    )
    schedule = NoiseSchedule(
        num_train_timesteps,
        beta_start,
        beta_end,
        values["beta_schedule"],
        trained_betas,
        cosine_s=values["cosine_s"],
        rescale_betas_zero_snr=rescale,
        v_posterior=float(variance_type.startswith("fixed_large")) if weight is None else weight,
        prediction_type=prediction_type,
        v_decoder=decoder,
    )
    values |= {
        "num_train_timesteps": len(schedule),
        "beta_start": beta_start,
        "beta_end": beta_end,
        "trained_betas": trained_betas,
        "variance_type": variance_type,
        "clip_sample": checked_flag("clip_sample", values["clip_sample"]),
        "thresholding": checked_flag("thresholding", values["thresholding"]),
        "dynamic_thresholding_ratio": _checked_ratio(values["dynamic_thresholding_ratio"]),
        "clip_sample_range": _checked_range("clip_sample_range", values["clip_sample_range"]),
        "sample_max_value": _checked_range("sample_max_value", values["sample_max_value"]),
        "steps_offset": checked_integer("steps_offset", values["steps_offset"]),
        "rescale_betas_zero_snr": rescale,
        "v_posterior": weight,
        "cosine_s": checked_number("cosine_s", values["cosine_s"], "a finite number"),
        "v_decoder": decoder,
        "optimal_timesteps": checked_optimal_timesteps(values["optimal_timesteps"], len(schedule)),
    }
    return ResolvedConfig(schedule, values)


def read_scheduler_config(folder: Path) -> ResolvedConfig:
    """What `DDPMExtScheduler.from_pretrained` reads from ``scheduler/`` of a pipeline's folder, of any scheduler.

    Raises:
        ConfigError: the file is missing or damaged, or no scheduler of ours can have such a config.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    content = read_json_object(file, allow_infinity=True).content
    try:
        config = normalize_config(content, {})
        if not isinstance(config.get("_class_name", ""), (str, list)):
            raise ValueError(f"_class_name={describe(config['_class_name'])} must be the name of a class.")
        dropped = config.pop("_use_default_values")
        stored = {name: value for name, value in config.items() if name not in dropped}
        resolved = resolve_config(DEFAULTS | {name: value for name, value in stored.items() if name in DEFAULTS})
        check_names(stored, DEFAULTS)
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
        text = printable(" ".join(str(error).split()), 300)
        raise ConfigError(f"{file_name(file)} cannot be used: {text}") from None
    return resolved


def _checked_ratio(ratio: Any) -> float:
    allowed = "in (0, 1]; the usual value is 0.995"
    return checked_number("dynamic_thresholding_ratio", ratio, allowed, lambda number: 0 < number <= 1)


def _checked_range(name: str, value: Any) -> float:
    allowed = f"above 0 and at most {MAX_RANGE:g}; the usual value is 1"
    return checked_number(name, value, allowed, lambda number: 0 < number <= MAX_RANGE)

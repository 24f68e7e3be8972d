"""Checks of the training objective's options."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from diffusers_ddpm_ext.diffusion.likelihood import SchedulerLike
from diffusers_ddpm_ext.diffusion.reverse_step import LEARNED_VARIANCES
from diffusers_ddpm_ext.diffusion.schedule import NoiseSchedule
from diffusers_ddpm_ext.losses.distances import Distance
from diffusers_ddpm_ext.utils.checks import checked_number, describe
from diffusers_ddpm_ext.utils.vocabulary import (
    FROM_COMPVIS_PREDICTION_TYPE,
    PREDICTION_TYPES,
    PredictionType,
    VarianceType,
)

LossType = Literal["l2", "l1", "huber", "perceptual", "hybrid", "vlb"]
BOUND_LOSSES = ("hybrid", "vlb")
OBJECTIVE_KEYS = (  # of a scheduler's config, on which an objective depends
    "prediction_type", "variance_type", "v_posterior", "num_train_timesteps", "beta_schedule", "beta_start",
    "beta_end", "cosine_s", "trained_betas", "rescale_betas_zero_snr",
)  # fmt: skip
OBJECTIVE_LOSSES: tuple[LossType, ...] = get_args(LossType)


def checked_weight(name: str, value: Any) -> float:
    """A finite number of 0 or more."""
    return float(checked_number(name, value, "a finite number of 0 or more", lambda number: 0 <= number < math.inf))


def checked_schedule(scheduler: SchedulerLike, prediction_type: PredictionType | None) -> NoiseSchedule:
    """The schedule of a scheduler, checked for training."""
    schedule = getattr(scheduler, "schedule", None)
    if not isinstance(schedule, NoiseSchedule):
        raise ValueError(
            f"scheduler={type(scheduler).__name__} has no NoiseSchedule: pass a DDPMExtScheduler, or convert another "
            "scheduler with DDPMExtScheduler.from_config(scheduler.config)."
        )
    own = scheduler.config.prediction_type
    if prediction_type is not None and prediction_type not in list(PREDICTION_TYPES):
        hint = FROM_COMPVIS_PREDICTION_TYPE.get(str(prediction_type))
        way_out = f"use {hint!r}" if hint else f"choose one of {', '.join(PREDICTION_TYPES)}"
        raise ValueError(f"prediction_type={describe(prediction_type)} is unknown: {way_out}.")
    if prediction_type is not None and prediction_type != own:
        raise ValueError(
            f"prediction_type={prediction_type!r} differs from the scheduler's {own!r}; "
            f"leave it out, or create the scheduler with prediction_type={prediction_type!r}."
        )
    if schedule.zero_terminal_snr and own == "epsilon":
        raise ValueError(
            "prediction_type='epsilon' cannot be trained at zero terminal SNR, where the last step has no signal: "
            "use prediction_type='v_prediction' or 'sample', or rescale_betas_zero_snr=False."
        )
    return schedule if schedule.prediction_type == own else schedule.with_prediction_type(own)


class ObservedConfig:
    """Notices when the config of an objective's scheduler changes, so that both never disagree.

    Args:
        scheduler: of the objective; a copy of the objective observes its copy of the scheduler.
    """

    def __init__(self, scheduler: SchedulerLike) -> None:
        self.scheduler = scheduler
        self.seen = scheduler.config
        self.values = self._read()

    def _read(self) -> dict[str, Any]:
        return {key: getattr(self.scheduler.config, key, None) for key in OBJECTIVE_KEYS}

    def check(self) -> None:
        """Raise ValueError if the objective was made for other values than the scheduler has now."""
        if self.scheduler.config is self.seen:
            return
        now = self._read()
        changed = [key for key in OBJECTIVE_KEYS if now[key] != self.values[key]]
        if changed:
            key = changed[0]
            raise ValueError(
                f"the scheduler's config has changed since this objective was made ({key}={describe(now[key])}, "
                f"not {describe(self.values[key])}): make a new DDPMObjective(scheduler)."
            )
        self.seen = self.scheduler.config


def check_bound(loss_type: str, variance_type: VarianceType, learn_logvar: bool) -> None:
    """Raise ValueError unless loss and variance are compatible."""
    learned = variance_type in LEARNED_VARIANCES
    if learned and loss_type not in BOUND_LOSSES:
        raise ValueError(
            f"variance_type={variance_type!r} is learned only from the bound: use loss_type='hybrid' (or 'vlb'), "
            f"not {loss_type!r}, or a fixed variance."
        )
    if loss_type == "hybrid" and not learned:
        raise ValueError(
            f"loss_type='hybrid' has nothing to learn from the bound with variance_type={variance_type!r}: "
            "use variance_type='learned_range' (or 'learned'), or loss_type='l2'."
        )
    if loss_type == "vlb" and learn_logvar:
        raise ValueError("learn_logvar has no effect with loss_type='vlb': use 'hybrid' or 'l2', or leave it out.")


def check_bound_alone(loss_weighting: str, l_simple_weight: float, original_elbo_weight: float) -> None:
    """Raise ValueError if an option weighs a part of the loss that ``vlb`` does not have."""
    unused = {
        f"loss_weighting={loss_weighting!r}": loss_weighting != "simple",
        f"l_simple_weight={l_simple_weight:g}": l_simple_weight != 1,
        f"original_elbo_weight={original_elbo_weight:g}": original_elbo_weight != 0,
    }
    option = next((option for option, is_set in unused.items() if is_set), None)
    if option is not None:
        raise ValueError(
            f"{option} has no effect with loss_type='vlb', which is the bound alone, times vlb_weight: leave it "
            "out, or use loss_type='hybrid'."
        )


def checked_features(loss_type: str, features: Distance | None) -> Distance | None:
    """The feature distance, which ``perceptual`` needs and no other loss may have."""
    if loss_type == "perceptual" and not callable(features):
        raise ValueError("loss_type='perceptual' needs features: a callable features(pred_x0, x0) -> (B,).")
    if loss_type != "perceptual" and features is not None:
        raise ValueError(f"features are only used by loss_type='perceptual', not {loss_type!r}: leave them out.")
    return features


def checked_share(name: str, value: Any) -> float:
    """A number in [0, 1]."""
    return float(checked_number(name, value, "in [0, 1]", lambda number: 0 <= number <= 1))

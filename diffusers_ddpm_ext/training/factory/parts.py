"""From options and images to the parts of a run: network, scheduler, objective, moving average.

Whatever a library refuses here is an option that a person can put right, and says so as a ConfigError.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DModel

from diffusers_ddpm_ext.diffusion.timesteps import TimestepSampler, make_sampler
from diffusers_ddpm_ext.losses.distances import PerceptualDistance
from diffusers_ddpm_ext.losses.objective import DDPMObjective
from diffusers_ddpm_ext.models.conditioning import Join
from diffusers_ddpm_ext.models.ema import LitEMA
from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler
from diffusers_ddpm_ext.training.config.options import EmaOptions, ModelOptions, ObjectiveOptions, ScheduleOptions
from diffusers_ddpm_ext.training.data.condition_dropout import ConditionDropout, make_condition_dropout
from diffusers_ddpm_ext.training.data.conditions import ConditionColumns
from diffusers_ddpm_ext.training.factory.denoiser import as_config_error, build_denoiser, denoiser_shape


@dataclass(frozen=True)
class Parts:
    """What is trained, on the CPU, in float32, and how conditions reach it.

    Attributes:
        denoiser: the network.
        scheduler: of the run.
        objective: the loss.
        join: how conditions reach the network.
        dropout: of conditions.
        null_class: that stands for no class; None where there is none.
        num_classes: that can be asked for; None where labels are no classes.
        sampler: of the steps that a batch trains on; None draws them evenly.
    """

    denoiser: UNet2DModel
    scheduler: DDPMExtScheduler
    objective: DDPMObjective
    join: Join = field(default_factory=Join)
    dropout: ConditionDropout | None = None
    null_class: int | None = None
    num_classes: int | None = None
    sampler: TimestepSampler | None = None

    @property
    def pipeline_kwargs(self) -> dict[str, Any]:
        """Arguments of the pipeline that say how conditions reach the network."""
        return {
            "conditioning_key": self.join.conditioning_key,
            "use_positional_encodings": self.join.use_positional_encodings,
            "null_class_label": self.null_class,
        }


def build_parts(
    model: ModelOptions,
    schedule: ScheduleOptions,
    objective: ObjectiveOptions,
    size: tuple[int, int],
    channels: int,
    seed: int,
    columns: ConditionColumns | None = None,
    conditioning_dropout: Mapping[str, Any] | None = None,
    levels: int = 256,
) -> Parts:
    """Everything that is trained, and what it is trained on.

    Args:
        model: section ``model``.
        schedule: section ``schedule``.
        objective: section ``objective``.
        size: height and width of the images, pixels.
        channels: of the images.
        seed: of the run.
        columns: what the images are conditioned on.
        conditioning_dropout: see `make_condition_dropout`.
        levels: values that a pixel can take.

    Returns:
        The parts, the cheap ones checked before the network is made.

    Raises:
        ConfigError: an option that cannot be met, by name.
    """
    scheduler = build_scheduler(schedule)
    loss = build_objective(objective, scheduler, levels)
    with as_config_error(""):
        sampler = make_sampler(
            objective.timestep_sampler, loss.schedule, objective.log_snr_mean, objective.log_snr_std
        )
    classes = None if columns is None else len(columns.class_names) or None
    dropout, null_class = make_condition_dropout(conditioning_dropout, model.conditioning_key, classes)
    shape = denoiser_shape(model, size, channels, columns, null_class, schedule.variance_type)
    denoiser = build_denoiser(model, shape, seed)
    return Parts(denoiser, scheduler, loss, shape.join, dropout, null_class, classes, sampler)


def build_scheduler(options: ScheduleOptions) -> DDPMExtScheduler:
    """The scheduler of a run.

    Args:
        options: section ``schedule``.

    Returns:
        A scheduler over the full chain.

    Raises:
        ConfigError: options that contradict each other or lie outside their range.
    """
    known = inspect.signature(DDPMExtScheduler.__init__).parameters
    values = {name: value for name, value in vars(options).items() if name in known}
    if values.get("trained_betas") is not None:
        values["trained_betas"] = list(values["trained_betas"])
        values["num_train_timesteps"] = len(values["trained_betas"])
    with as_config_error(""):
        return DDPMExtScheduler(**values)


def build_objective(options: ObjectiveOptions, scheduler: DDPMExtScheduler, levels: int = 256) -> DDPMObjective:
    """The loss of a run.

    Args:
        options: section ``objective``.
        scheduler: whose tables and prediction type the loss takes.
        levels: values that a pixel can take, which make the bins of the bound.

    Returns:
        The objective, with its log-variances.

    Raises:
        ConfigError: options that contradict each other or lie outside their range.
    """
    known = inspect.signature(DDPMObjective.__init__).parameters
    values = {name: value for name, value in vars(options).items() if name in known}
    values["bin_width"] = bin_width_of(options, levels)
    with as_config_error(""):
        if options.loss_type == "perceptual":
            values["features"] = PerceptualDistance.from_pretrained(str(options.perceptual_model))
        return DDPMObjective(scheduler, **values)


def bin_width_of(options: ObjectiveOptions, levels: int) -> float:
    """Distance of two levels of the data, in data units, unless the options name it."""
    return 2 / (levels - 1) if options.bin_width is None else options.bin_width


def build_ema(options: EmaOptions, denoiser: torch.nn.Module) -> LitEMA | None:
    """The moving average of a run's network.

    Args:
        options: section ``ema``.
        denoiser: on its final device, free of wrappers.

    Returns:
        None where the run keeps no average.

    Raises:
        ConfigError: a decay outside its range.
    """
    if not options.use_ema:
        return None
    with as_config_error("--ema_decay"):
        return LitEMA(denoiser, options.ema_decay, options.ema_use_num_updates)

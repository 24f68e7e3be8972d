"""Network, scheduler, objective and moving average of a run, built from its options.

An option that a library rejects is reported as a ConfigError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import nn

from diffusers_ddpm_ext.diffusion.levels import choose_bins
from diffusers_ddpm_ext.diffusion.timesteps import TimestepSampler, make_sampler
from diffusers_ddpm_ext.errors import as_config_error
from diffusers_ddpm_ext.losses.checks import BOUND_LOSSES
from diffusers_ddpm_ext.losses.distances import PerceptualDistance, check_perceptual_channels
from diffusers_ddpm_ext.losses.objective import DDPMObjective
from diffusers_ddpm_ext.models.class_token_unet import CLASS_TABLE, ClassTokenUNet
from diffusers_ddpm_ext.models.conditioning import Conditioning
from diffusers_ddpm_ext.models.ema import LitEMA
from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler
from diffusers_ddpm_ext.training.config.condition_checks import data_conditions, embeds_classes
from diffusers_ddpm_ext.training.config.options import EmaOptions, ObjectiveOptions, ScheduleOptions
from diffusers_ddpm_ext.training.config.train_config import TrainConfig
from diffusers_ddpm_ext.training.data.caption_encoder import CaptionEncoder
from diffusers_ddpm_ext.training.data.condition_dropout import ConditionDropout, make_condition_dropout
from diffusers_ddpm_ext.training.data.image_set import ImageSet
from diffusers_ddpm_ext.training.data.latents import LatentEncoder
from diffusers_ddpm_ext.training.factory.denoiser import build_denoiser
from diffusers_ddpm_ext.training.factory.denoiser_shape import denoiser_shape
from diffusers_ddpm_ext.training.factory.task import DenoisingTask

NOT_OF_THE_OBJECTIVE = (
    "logvar_learning_rate",
    "timestep_sampler",
    "log_snr_mean",
    "log_snr_std",
    "bin_width",
    "perceptual_model",
)
"""Options of the section ``objective`` that `DDPMObjective` does not take under their names."""


@dataclass(frozen=True)
class Parts:
    """What is trained, on the CPU in float32, and how conditions reach it.

    Attributes:
        denoiser: the network.
        scheduler: the noise scheduler.
        objective: the loss.
        conditioning: how conditions reach the network.
        dropout: random dropout of conditions, applied where batches are made.
        null_class: label that stands for no class; None where there is none.
        num_classes: number of classes of the data; None where labels are not classes.
        class_names: their names by number; empty where classes have only numbers.
        sampler: of the timesteps of a batch; None samples uniformly.
        latents: the first stage, which is not trained; None for a run on pixels.
        captions: the text encoder; None for a run without captions.
    """

    denoiser: UNet2DModel
    scheduler: DDPMExtScheduler
    objective: DDPMObjective
    conditioning: Conditioning = field(default_factory=Conditioning)
    dropout: ConditionDropout | None = None
    null_class: int | None = None
    num_classes: int | None = None
    class_names: Mapping[int, str] = field(default_factory=dict)
    sampler: TimestepSampler | None = None
    latents: LatentEncoder | None = None
    captions: CaptionEncoder | None = None

    @property
    def network(self) -> UNet2DModel:
        """The network."""
        return self.denoiser

    @property
    def weights(self) -> list[nn.Parameter]:
        """Those of the network, and of a text encoder that is trained."""
        is_trained = self.captions is not None and self.captions.is_trained
        text = self.captions.module.parameters() if self.captions is not None and is_trained else ()
        return [*self.denoiser.parameters(), *(weight for weight in text if weight.requires_grad)]

    @property
    def logvar_parameters(self) -> list[nn.Parameter]:
        """Parameters of the log-variances; empty where they are not learned."""
        return list(self.objective.parameters())

    @property
    def num_train_timesteps(self) -> int:
        """Length T of the chain."""
        return self.objective.schedule.num_train_timesteps

    def noise_shape(self, image_shape: Sequence[int]) -> Sequence[int]:
        """The shape of the image."""
        return image_shape

    @property
    def compiled_modules(self) -> list[nn.Module]:
        """The network alone."""
        return [self.denoiser]

    def enable_gradient_checkpointing(self) -> None:
        """Of the network, and of a text encoder that is trained."""
        self.denoiser.enable_gradient_checkpointing()
        if self.captions is not None and self.captions.is_trained:
            self.captions.stage.enable_gradient_checkpointing()

    @property
    def train_metrics(self) -> list[str]:
        """Names of the metrics of each step."""
        names = ["train/loss", "train/loss_simple", "train/loss_vlb"]
        if self.objective.loss_type in BOUND_LOSSES:
            names.append("train/loss_bound")
        return names + (["train/loss_gamma", "logvar"] if self.objective.learn_logvar else [])

    @property
    def bound_metric(self) -> str:
        """Name of the bound among the metrics: bits per dimension of pixels and of latents cannot be compared."""
        return "bpd" if self.latents is None else "latent_bpd"

    def validation_kinds(self, with_bound: bool) -> list[str]:
        """Losses of a validation, and the bound."""
        return ["loss_simple", "loss", "loss_vlb", *([self.bound_metric] if with_bound else [])]

    def make_task(self) -> DenoisingTask:
        """Network and objective in one module."""
        return DenoisingTask(self.denoiser, self.objective, self.conditioning, self.sampler, self.captions)

    @property
    def pipeline_kwargs(self) -> dict[str, Any]:
        """Arguments of the pipeline that state how conditions reach the network."""
        stages: dict[str, Any] = {}
        if self.latents is not None:
            through = self.latents.concat_through_vae
            stages = {"vae": self.latents.stage.autoencoder, "concat_through_vae": through}
        if self.captions is not None:
            stages |= {"text_encoder": self.captions.module, "tokenizer": self.captions.stage.tokenizer}
        return stages | {
            "conditioning_key": self.conditioning.conditioning_key,
            "use_positional_encodings": self.conditioning.use_positional_encodings,
            "null_class_label": self.null_class,
            "id2label": dict(self.class_names) or None,
        }


def build_parts(
    config: TrainConfig, images: ImageSet, latents: LatentEncoder | None = None, captions: CaptionEncoder | None = None
) -> Parts:
    """Build everything that is trained on these images, or their latents; the network, which takes longest, last.

    Args:
        config: of the run.
        images: the training set.
        latents: the first stage; None for a run on pixels.
        captions: the text encoder; None for a run without captions.

    Raises:
        ConfigError: an option cannot be satisfied; the message names it.
    """
    scheduler = build_scheduler(config.schedule)
    objective = build_objective(config.objective, scheduler, images.levels)
    if config.perceptual_model is not None:
        with as_config_error("--perceptual_model"):
            check_perceptual_channels(images.shape[0])
    options = config.objective
    with as_config_error():
        sampler = make_sampler(options.timestep_sampler, objective.schedule, options.log_snr_mean, options.log_snr_std)
    classes = None if images.columns is None else len(images.columns.class_names) or None
    labels = None if images.columns is None else images.columns.class_labels
    names = dict(enumerate(labels.names)) if labels is not None and labels.are_named else {}
    conditioning_key = config.model.conditioning_key
    conditioning = Conditioning(
        conditioning_key,
        config.model.use_positional_encodings,
        embeds_classes=embeds_classes(conditioning_key, vars(config.data)),
    )
    conditions = data_conditions(conditioning_key, vars(config.data))
    dropout, null_class = make_condition_dropout(config.data.conditioning_dropout, conditions, classes)
    if latents is not None and dropout is not None:
        latents.concat_dropout = dropout.only("concat_inputs")
        dropout = dropout.only("class_labels", "encoder_hidden_states", "captions")
    shape = denoiser_shape(config.model, conditioning, images, null_class, config.schedule.variance_type, latents)
    if captions is not None:
        shape = replace(shape, context_shape=captions.shape, token_source="--text_encoder")
    denoiser = build_denoiser(config.model, shape, config.loop.seed)
    return Parts(
        denoiser,
        scheduler,
        objective,
        shape.conditioning,
        dropout,
        null_class,
        classes,
        names,
        sampler,
        latents,
        captions,
    )


def build_scheduler(options: ScheduleOptions) -> DDPMExtScheduler:
    """The scheduler of a run, over all T steps; each option of the section is one of its arguments.

    Raises:
        ConfigError: options are out of range or contradict each other.
    """
    values = dict(vars(options))
    if options.trained_betas is not None:
        values |= {"trained_betas": list(options.trained_betas), "num_train_timesteps": len(options.trained_betas)}
    with as_config_error():
        return DDPMExtScheduler(**values)


def build_objective(options: ObjectiveOptions, scheduler: DDPMExtScheduler, levels: int | None = 256) -> DDPMObjective:
    """The loss of a run, with its log-variances.

    Args:
        options: section ``objective``.
        scheduler: its tables and prediction type are those of the loss.
        levels: number of values of a pixel, which sets the bins of the bound; None for floats, whose bound is that of
            a density unless ``bin_width`` is set.

    Raises:
        ConfigError: options are out of range or contradict each other.
    """
    values = {name: value for name, value in vars(options).items() if name not in NOT_OF_THE_OBJECTIVE}
    requested = None if options.decoder == "exact" else options.decoder
    with as_config_error("--decoder"):
        values["decoder"], values["bin_width"] = choose_bins(requested, options.bin_width, levels)
    with as_config_error():
        features = None
        if options.loss_type == "perceptual":
            features = PerceptualDistance.from_pretrained(str(options.perceptual_model))
        return DDPMObjective(scheduler, features=features, **values)


def build_ema(options: EmaOptions, denoiser: torch.nn.Module) -> LitEMA | None:
    """The moving average of a network on its final device, free of wrappers; None without ``use_ema``.

    A table of class tokens is not averaged, as in the original: a pipeline has one, for both kinds of weights.

    Raises:
        ConfigError: the decay is out of range.
    """
    if not options.use_ema:
        return None
    with as_config_error("--ema_decay"):
        untracked = [CLASS_TABLE] if isinstance(denoiser, ClassTokenUNet) else []
        dtype = torch.bfloat16 if options.ema_dtype == "bfloat16" else None
        decay, warms_up = options.ema_decay, options.ema_use_num_updates
        return LitEMA(denoiser, decay, warms_up, untracked, dtype, options.offload_ema)

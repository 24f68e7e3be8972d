"""What a `DDPMExtPipeline` knows about its model and about its current call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffusers_ddpm_ext.diffusion.reverse_step import LEARNED_VARIANCES
from diffusers_ddpm_ext.models.conditioning import Conditioning
from diffusers_ddpm_ext.pipelines.call_arguments import check_finite_samples, checked_number
from diffusers_ddpm_ext.pipelines.call_state import RUNNING_CALLS, PipelineCall
from diffusers_ddpm_ext.pipelines.class_names import read_class_names
from diffusers_ddpm_ext.pipelines.guidance import ConditionedModel
from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler
from diffusers_ddpm_ext.utils.wrappers import unwrap


class PipelineAttributes:
    """Properties of a `DDPMExtPipeline`."""

    if TYPE_CHECKING:
        unet: Any
        scheduler: Any
        config: Mapping[str, Any]
        _conditioning: Conditioning
        _logvar: Tensor | None
        _class_embedder: Tensor | None
        _last_call: PipelineCall
        text_encoder_stage: Any

    # ------------------------------------------------------------------ the model

    @property
    def logvar(self) -> Tensor | None:
        """The learned log-variance of the training loss, one per timestep: (T,), float32, CPU. None if not learned.

        `from_pretrained` of this class reads it; that of the generic ``DiffusionPipeline`` only from a local folder.
        """
        return self._logvar

    @logvar.setter
    def logvar(self, table: Tensor | None) -> None:
        steps = self.scheduler.config.num_train_timesteps
        if table is not None:
            table = torch.as_tensor(table).detach().to(device="cpu", dtype=torch.float32, copy=True)
            if table.shape != (steps,):
                raise ValueError(
                    f"logvar has shape {tuple(table.shape)}; this pipeline's scheduler has {steps} steps, so it must "
                    f"be ({steps},). Take the table of the objective that trained with this schedule."
                )
            check_finite_samples(table, "logvar")
        self._logvar = table

    @property
    def class_embedder(self) -> Tensor | None:
        """Embedding of class labels as ``encoder_hidden_states``: (num_classes, dim), float32, CPU, or None."""
        return self._class_embedder

    @class_embedder.setter
    def class_embedder(self, table: Tensor | None) -> None:
        if table is not None:
            table = torch.as_tensor(table).detach().to(device="cpu", dtype=torch.float32, copy=True)
            width = self._network.config.get("cross_attention_dim")
            if table.ndim != 2 or table.shape[1] != width:
                raise ValueError(
                    f"class_embedder has shape {tuple(table.shape)}; it must be (num_classes, {width}), as wide as "
                    "the network's cross attention."
                )
            check_finite_samples(table, "class_embedder")
        self._class_embedder = table

    @property
    def num_classes(self) -> int | None:
        """Number of classes, the null class included; None for a model without classes."""
        model = self._model(torch.device("cpu"))
        return model.num_classes if model.takes_labels else None

    @property
    def is_latent(self) -> bool:
        """Whether the samples are latents of an autoencoder, not images."""
        return self.config.get("latent_scaling_factor") is not None

    @property
    def trained_scheduler(self) -> DDPMExtScheduler:
        """A `DDPMExtScheduler` with the training schedule and the prediction type of the network.

        It is the last one assigned to ``scheduler`` (the folder's, when ``from_pretrained`` gets another scheduler);
        without one it is made from ``scheduler``'s config.
        """
        scheduler: DDPMExtScheduler | None = self.__dict__.get("_trained_scheduler")
        return DDPMExtScheduler.from_config(self.scheduler.config) if scheduler is None else scheduler

    @property
    def class_names(self) -> dict[int, str]:
        """Names of classes by their numbers, from ``id2label``; empty where they have none."""
        return read_class_names(self.config.get("id2label"))

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        device: torch.device = self._network.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the network."""
        dtype: torch.dtype = self._network.dtype
        return dtype

    @property
    def _network(self) -> Any:
        """The network without wrappers, which lack its ``config``, ``dtype`` and ``device``."""
        return unwrap(self.unet)

    @property
    def conditioning(self) -> Conditioning:
        """How the network receives its conditions."""
        return self._conditioning

    @property
    def channels(self) -> int:
        """Channels C of a sample."""
        config = self._network.config
        if not self._conditioning.widens_input:
            return int(config.in_channels)
        learned = self.scheduler.config.get("variance_type") in LEARNED_VARIANCES
        return int(config.out_channels) // (2 if learned else 1)

    def _model(self, device: torch.device) -> ConditionedModel:
        null = self.config.get("null_class_label")
        return ConditionedModel(
            self.unet,
            self._conditioning,
            self._class_embedder,
            null,
            self.channels,
            device,
            self._network.dtype,
            self.class_names,
            self.text_encoder_stage,
        )

    # ------------------------------------------------------------------ the call

    @property
    def _call(self) -> PipelineCall:
        """The call that runs in this thread, else the last one."""
        return RUNNING_CALLS.get().get(id(self), self._last_call)

    @property
    def num_timesteps(self) -> int:
        """Number of steps of this call, or of the last one."""
        return self._call.num_timesteps

    @property
    def num_network_calls(self) -> int:
        """Network calls of the last pipeline call: with many samplers more than ``num_inference_steps``."""
        return self._call.num_network_calls

    @property
    def guidance_scale(self) -> float:
        """Scale of guidance of this call, or of the last one; a callback changes it by ``_guidance_scale``."""
        return self._call.guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether this call, or the last one, has guidance."""
        return self._call.guidance_scale != 1

    @property
    def interrupt(self) -> bool:
        """Whether a callback has stopped the call, by ``pipeline._interrupt = True``."""
        return self._call.interrupt

    @property
    def _guidance_scale(self) -> float:
        return self._call.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, scale: float) -> None:
        self._call.guidance_scale = checked_number("guidance_scale", scale)

    @property
    def _interrupt(self) -> bool:
        return self._call.interrupt

    @_interrupt.setter
    def _interrupt(self, stop: bool) -> None:
        self._call.interrupt = bool(stop)

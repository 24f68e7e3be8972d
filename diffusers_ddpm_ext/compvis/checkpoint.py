"""An original checkpoint and its configuration, read: what a pipeline is made of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn

from diffusers_ddpm_ext.compvis.config.ddpm import CompVisConfig
from diffusers_ddpm_ext.compvis.first_stage.architecture import FirstStageConfig
from diffusers_ddpm_ext.compvis.first_stage.weights import convert_first_stage
from diffusers_ddpm_ext.compvis.load_conditioners import ConditioningStages
from diffusers_ddpm_ext.compvis.load_options import WeightSet
from diffusers_ddpm_ext.compvis.schema import (
    CONDITION_STAGE,
    CONDITIONERS,
    FIRST_STAGE_SECTION,
    FIXED_LOGVAR,
    MODEL_CLASS,
    SCALE_FACTOR_BUFFER,
)
from diffusers_ddpm_ext.compvis.state_dict import CheckpointContents
from diffusers_ddpm_ext.compvis.weights import ConvertedTensor, build_network
from diffusers_ddpm_ext.models.ema_metadata import EmaMetadata
from diffusers_ddpm_ext.pipelines.pipeline_ddpm_ext import DDPMExtPipeline
from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler


@dataclass(frozen=True)
class CompVisCheckpoint:
    """A checkpoint and its configuration, read and checked; no network is built yet.

    Attributes:
        config: translated.
        contents: the tensors by role.
        scheduler: with the requested schedule.
        first_stage_config: of the first stage in the file; None if there is none, or it is left out.
        conditioning: its conditioning stages that are converted, and the tokenizer.
        notes: sentences for the user.
    """

    config: CompVisConfig
    contents: CheckpointContents
    scheduler: DDPMExtScheduler
    first_stage_config: FirstStageConfig | None
    conditioning: ConditioningStages
    notes: list[str]

    def weights(self, which: WeightSet) -> dict[str, Tensor]:
        """One set of weights by UNetModel's keys; empty if the file does not have it."""
        return self.contents.ema if which == "ema" else self.contents.raw

    def network(self, which: WeightSet) -> tuple[nn.Module, list[ConvertedTensor]]:
        """Build the Diffusers network with one set of weights, float32, in eval mode; also one row per tensor."""
        config = self.config
        return build_network(self.weights(which), config.unet_params, config.conditioning_key, self.contents.ignored)

    @cached_property
    def first_stage(self) -> tuple[AutoencoderKL | VQModel, list[ConvertedTensor]] | None:
        """The first stage with the scale of its latents, float32, in eval mode; also one row per tensor."""
        if self.first_stage_config is None:
            return None
        scale = 1.0 if self.scale_factor is None else self.scale_factor
        return convert_first_stage(self.contents.first_stage, self.first_stage_config, scale)

    def pipeline(self, network: nn.Module, rows: list[ConvertedTensor]) -> DDPMExtPipeline:
        """Make a pipeline of a network and its rows, with everything else that the checkpoint has."""
        is_latent, first_stage = self.config.samples.latent, self.first_stage
        pipeline = DDPMExtPipeline(
            network,
            self.scheduler,
            conditioning_key=self.config.conditioning_key,
            latent_scaling_factor=self.scale_factor if is_latent and first_stage is None else None,
            concat_through_vae=self.config.concat_through_vae,
            vae=None if first_stage is None else first_stage[0],
            **self.conditioning.components,
        )
        pipeline.compvis_facts, pipeline.compvis_weights = self.facts, (self.contents, rows)  # for save_compvis
        if self.learns_logvar:
            pipeline.logvar = self.contents.logvar
        if self.contents.class_embedding is not None:
            pipeline.class_embedder = self.contents.class_embedding.float()
        return pipeline

    @property
    def scale_factor(self) -> float | None:
        """Factor of the latents: the file's, which may have been measured, else the configuration's."""
        own = self.contents.scale_factor
        return self.config.samples.scale_factor if own is None else own

    @property
    def learns_logvar(self) -> bool:
        """Whether the file has a logvar that was learned; forks also save one that was not."""
        return self.contents.logvar is not None and self.config.objective["learn_logvar"]

    @property
    def facts(self) -> dict[str, Any]:
        """What going back to an original checkpoint needs, and the pipeline does not have."""
        facts: dict[str, Any] = {"unet_params": dict(self.config.unet_params)}
        if self.config.cond_stage is not None:
            facts[CONDITION_STAGE] = self.config.cond_stage
        if self.config.subclass:
            facts[MODEL_CLASS] = self.config.subclass
        if self.first_stage_config is not None:
            facts[FIRST_STAGE_SECTION] = self.first_stage_config.section
        if self.conditioning.configs:
            facts[CONDITIONERS] = self.conditioning.facts
        if self.contents.scale_factor is not None:
            facts[SCALE_FACTOR_BUFFER] = True
        if self.contents.logvar is not None and not self.learns_logvar:
            values = self.contents.logvar.float().tolist()
            facts[FIXED_LOGVAR] = values[0] if len(set(values)) == 1 else values
        return facts

    @property
    def ema_metadata(self) -> EmaMetadata | None:
        """Decay and number of updates of the EMA; None if the file has none."""
        return self.contents.ema_metadata if self.contents.ema else None

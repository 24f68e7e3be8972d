"""Export of a run's networks: for sampling, and as a pipeline in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor

from diffusers_ddpm_ext.losses.logvar import ContinuousLogvar
from diffusers_ddpm_ext.losses.objective import DDPMObjective
from diffusers_ddpm_ext.models.class_token_unet import CLASS_TABLE, ClassTokenUNet
from diffusers_ddpm_ext.models.ema import LitEMA
from diffusers_ddpm_ext.models.ema_metadata import EmaMetadata, save_ema_metadata
from diffusers_ddpm_ext.pipelines.pipeline_ddpm_ext import DDPMExtPipeline
from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler
from diffusers_ddpm_ext.training.factory.parts import Parts
from diffusers_ddpm_ext.utils.dtensor import full_tensor, is_main_process, is_sharded
from diffusers_ddpm_ext.utils.files import os_errors
from diffusers_ddpm_ext.utils.generations import replace_pipeline
from diffusers_ddpm_ext.utils.wrappers import network_class


@dataclass(frozen=True)
class ExportedNetworks:
    """A run's networks, unsharded and without wrappers. They share the run's memory unless it is sharded.

    Attributes:
        default: the Diffusers model that is saved: with the EMA weights, or the raw ones where there is no average.
        raw: the raw weights; None where they are the default.
        ema_metadata: decay and updates of the average; None where there is none.
        logvar: the learned log-variances, (T,); None where they are not learned.
        logvar_network: the function that computes them, of the continuous kind; None where it is sharded.
        class_embedder: the tokens of the classes, (num_classes, dim); None where classes do not become tokens.
        text_encoder: one that is trained and sharded, gathered; None where the run's own can be used.
    """

    default: Any
    raw: Any
    ema_metadata: EmaMetadata | None
    logvar: Tensor | None
    logvar_network: ContinuousLogvar | None
    class_embedder: Tensor | None = None
    text_encoder: Any = None

    def pipeline_kwargs(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the run's pipeline, with the gathered text encoder in place of the sharded one."""
        return dict(own) | ({} if self.text_encoder is None else {"text_encoder": self.text_encoder})


@torch.no_grad()
def export_networks(denoiser: Any, ema: LitEMA | None, objective: DDPMObjective | None) -> ExportedNetworks | None:
    """Gather a run's networks and log-variances between two steps. Collective call: every process must make it.

    Args:
        denoiser: a Diffusers model, without wrappers.
        ema: its average; None without one.
        objective: with the log-variances; None for a model without them.

    Returns:
        The networks in the main process, on the run's device, or on the CPU where the weights were sharded; None in
        the others.
    """
    raw = {name: _unshard(tensor) for name, tensor in denoiser.state_dict().items()}
    average = {} if ema is None else {name: _unshard(tensor) for name, tensor in ema.shadow.items()}
    logvar = None if objective is None else gather_logvar(objective)
    if not is_main_process():
        return None
    sharded = any(map(is_sharded, denoiser.parameters()))
    logvar_network = None if sharded or objective is None else objective.logvar_network
    table = raw.pop(CLASS_TABLE, None)
    if ema is None:
        return ExportedNetworks(_network(denoiser, raw), None, None, logvar, logvar_network, table)
    average = {name: tensor.to(raw[name]) for name, tensor in average.items()}
    metadata = EmaMetadata(ema.decay, ema.num_updates)
    default = _network(denoiser, raw | average)
    return ExportedNetworks(default, _network(denoiser, raw), metadata, logvar, logvar_network, table)


def export_parts(parts: Parts, ema: LitEMA | None) -> ExportedNetworks | None:
    """`export_networks` of a diffusion model, with a text encoder that is trained and sharded. Collective call."""
    networks = export_networks(parts.denoiser, ema, parts.objective)
    captions = parts.captions
    if captions is None or not any(map(is_sharded, captions.module.parameters())):
        return networks
    weights = {name: _unshard(tensor) for name, tensor in captions.module.state_dict().items()}
    if networks is None:
        return None
    encoder: Any = captions.module
    with init_empty_weights(include_buffers=False):
        copy = network_class(encoder)(encoder.config)
    copy.load_state_dict(weights, assign=True)
    return replace(networks, text_encoder=copy.eval())


@torch.no_grad()
def gather_logvar(objective: DDPMObjective) -> Tensor | None:
    """The present log-variances, (T,); None where they are not learned. Collective call."""
    if not objective.learn_logvar:
        return None
    network = objective.logvar_network
    return (
        full_tensor(objective.logvar.detach())
        if network is None
        else network.table(full_tensor(network.weights.detach()))
    )


def _unshard(tensor: Tensor) -> Tensor:
    """A sharded tensor as a plain one on the CPU of the main process, empty elsewhere; a plain one as it is.

    One whose channels are last in memory becomes contiguous, as files hold it.
    """
    if not is_sharded(tensor):
        return tensor.detach().contiguous()
    gathered = full_tensor(tensor)
    return gathered.cpu() if is_main_process() else gathered.new_empty(0)


def _network(like: UNet2DModel, tensors: dict[str, Tensor]) -> UNet2DModel:
    """A network of the same class and configuration that uses the given tensors without a copy."""
    cls = UNet2DConditionModel if isinstance(like, ClassTokenUNet) else type(like)
    with init_empty_weights(include_buffers=False):
        network: UNet2DModel = cls.from_config(like.config)
    network.load_state_dict(tensors, assign=True)
    network.eval()
    return network


@torch.no_grad()
def save_pipeline(
    folder: Path, networks: ExportedNetworks, scheduler: DDPMExtScheduler, pipeline_kwargs: Mapping[str, Any]
) -> DDPMExtPipeline:
    """Save a pipeline into a folder that loads at every moment: all files replace the old pipeline's at once.

    The EMA weights are the default files and the raw ones ``variant="raw"``; without EMA the raw ones are the default.
    Files that no pipeline owns stay.

    Args:
        folder: whose top level gets ``model_index.json``.
        networks: from `export_networks`.
        scheduler: of the run.
        pipeline_kwargs: how conditions reach the network: arguments of the pipeline.

    Returns:
        The pipeline.

    Raises:
        OSError: the disk is full, or the folder cannot be written; the existing files stay.
    """
    kwargs = networks.pipeline_kwargs(pipeline_kwargs)
    pipeline = DDPMExtPipeline(unet=networks.default, scheduler=scheduler, **kwargs)
    pipeline.logvar = None if networks.logvar is None else networks.logvar.detach().float().cpu()
    pipeline.logvar_network = networks.logvar_network
    pipeline.class_embedder = networks.class_embedder
    with replace_pipeline(folder) as draft, os_errors():
        pipeline.write_files(draft)
        if networks.raw is not None:
            networks.raw.save_pretrained(draft / "unet", variant="raw")
        if networks.ema_metadata is not None:
            save_ema_metadata(draft, networks.ema_metadata)
    return pipeline

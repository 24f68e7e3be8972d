"""Classes that the folder of a pipeline names, so that stock Diffusers opens what it can sample, and no other.

An unconditional model becomes ``DDPMPipeline``, or ``LDMPipeline`` with its first stage in the slot ``vqvae``.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import FrozenDict
from torch import nn

from diffusers_ddpm_ext.diffusion.reverse_step import LEARNED_VARIANCES
from diffusers_ddpm_ext.models.conditioning import Conditioning
from diffusers_ddpm_ext.models.fold_scale import fold_scale, reason_not_to_fold
from diffusers_ddpm_ext.models.latent_scale import SLOTS
from diffusers_ddpm_ext.models.unet_2d_ext import UNet2DExtModel
from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler
from diffusers_ddpm_ext.utils.dtensor import full_tensor
from diffusers_ddpm_ext.utils.wrappers import has_inner_wrappers, network_class, plain_state_dict, unwrap

NAN_IN_STOCK = ("learned", "fixed_large_log")
"""Variance types of which stock DDPMScheduler takes the square root of a log-variance: every sample becomes NaN."""


def reason_to_refuse_stock(unet: Any, scheduler: Any, config: Mapping[str, Any], vae: Any) -> str:
    """Why a stock pipeline would fail on this model or sample it wrongly, as one phrase; empty if it would not.

    Args:
        unet: the network.
        scheduler: its scheduler.
        config: of the pipeline.
        vae: the first stage, or None: it decides between ``LDMPipeline`` and ``DDPMPipeline``.
    """
    variance_type = scheduler.config.get("variance_type")
    if config.get("conditioning_key") is not None:
        return f"conditioning_key {config['conditioning_key']}"
    if config.get("use_positional_encodings"):
        return "use_positional_encodings"
    if config.get("latent_scaling_factor") is not None:
        return "its samples are latents"
    if isinstance(scheduler, DDPMExtScheduler) and variance_type in NAN_IN_STOCK:
        return f"variance_type {variance_type}"
    if network_class(unet) is not UNet2DModel:
        return f"a {network_class(unet).__name__}"
    network: Any = unwrap(unet).config
    if vae is not None:
        if not isinstance(network.sample_size, int):  # LDMPipeline draws squares
            return "its latents are not square"
        if reason_not_to_fold(vae):
            return reason_not_to_fold(vae)
    if isinstance(scheduler, DDPMExtScheduler):
        return ""
    twice = network.out_channels == 2 * network.in_channels
    # A scheduler swapped in by its config keeps the key, even if its class ignores it.
    ignored = "variance_type" not in inspect.signature(type(scheduler).__init__).parameters
    return f"variance_type {variance_type}" if variance_type in LEARNED_VARIANCES and twice and ignored else ""


def needs_guard(scheduler: Any, config: Mapping[str, Any]) -> bool:
    """Whether stock Diffusers would run the network with wrong inputs or outputs, so that its class must be ours."""
    learned = isinstance(scheduler, DDPMExtScheduler) and scheduler.config.variance_type == "learned"
    key, coordinates = config.get("conditioning_key"), bool(config.get("use_positional_encodings"))
    return learned or Conditioning(key, coordinates).widens_input


def plain_network(unet: nn.Module, guarded: bool) -> Any:
    """The network to save: without wrappers, under its tensors' own names, which it shares.

    Args:
        unet: with or without wrappers.
        guarded: whether a stock network becomes a `UNet2DExtModel`, which stock Diffusers refuses.
    """
    network: Any = unwrap(unet)
    kind: Any = network_class(unet)
    kind = UNet2DExtModel if guarded and kind is UNet2DModel else kind
    if type(network) is kind and not has_inner_wrappers(network):
        return network
    with torch.device("meta"):
        plain = kind.from_config(network.config)
    tensors = {name: full_tensor(tensor) for name, tensor in plain_state_dict(network).items()}
    plain.load_state_dict(tensors, strict=True, assign=True)
    return plain


def saved_first_stage(vae: nn.Module, is_stock: bool) -> tuple[str, Any]:
    """The slot of a first stage in a folder, and what is saved there.

    Args:
        vae: with or without wrappers.
        is_stock: whether the folder names ``LDMPipeline``, which reads a ``scaling_factor`` alone.
    """
    plain = plain_network(vae, guarded=False)
    saved = fold_scale(plain) if is_stock else copy.copy(plain)
    # VQModel's default scale is not 1, so it is always written; where this copy came from may be a private path.
    config = {"scaling_factor": 1.0} | dict(saved.config)
    saved._internal_dict = FrozenDict({key: value for key, value in config.items() if key != "_name_or_path"})
    return ("vqvae" if is_stock else "vae"), saved


def stock_model_index(
    index: dict[str, Any], unet: Any, scheduler: Any, config: Mapping[str, Any], vae: Any
) -> dict[str, Any]:
    """A copy of the content that Diffusers would write into ``model_index.json``, with class names that readers know.

    Diffusers names our classes by their modules. Subclasses of ours, and other schedulers, keep their own names.
    """
    index = {key: value for key, value in index.items() if value is not None and (key not in SLOTS or any(value))}
    index.pop("_name_or_path", None)  # where this copy was loaded from, maybe a private path
    ours = bool(reason_to_refuse_stock(unet, scheduler, config, vae))
    # By a module path, a Hub id would not load: Diffusers looks for that file in the repository.
    if type(scheduler) is DDPMExtScheduler:
        index["scheduler"] = ["diffusers", "DDPMExtScheduler" if ours else "DDPMScheduler"]
    if network_class(unet) is UNet2DExtModel:
        index["unet"] = ["diffusers", "UNet2DExtModel"]
    if index["_class_name"] == "DDPMExtPipeline":
        # With the package in front, the error of a stock reader that did not import the package names it.
        index["_class_name"] = "diffusers_ddpm_ext.DDPMExtPipeline" if ours else _stock_class(vae)
    return index


def _stock_class(vae: Any) -> str:
    return "DDPMPipeline" if vae is None else "LDMPipeline"

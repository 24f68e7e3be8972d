"""Classes that the folder of a pipeline names, so that stock Diffusers opens what it can sample, and no other.

An unconditional model becomes ``DDPMPipeline``, or ``LDMPipeline`` with its first stage in the slot ``vqvae``; a model
with a text encoder ``StableDiffusionPipeline`` or ``LDMTextToImagePipeline`` (see `stock_text`).
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
from diffusers_ddpm_ext.models.unet_2d_ext import UNet2DExtModel
from diffusers_ddpm_ext.pipelines.pipeline_parts import PipelineParts
from diffusers_ddpm_ext.pipelines.stock_text import LDM_TEXT, STABLE_DIFFUSION, text_class
from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler
from diffusers_ddpm_ext.utils.dtensor import full_tensor
from diffusers_ddpm_ext.utils.wrappers import has_inner_wrappers, network_class, plain_state_dict, unwrap

NAN_IN_STOCK = ("learned", "fixed_large_log")
"""Variance types of which stock DDPMScheduler takes the square root of a log-variance: every sample becomes NaN."""
KEPT_PRIVATE = ("_class_name", "_diffusers_version")
"""Private keys of ``model_index.json``."""


def reason_to_refuse_stock(parts: PipelineParts) -> str:
    """Why a stock pipeline would fail on this model or sample it wrongly, as one phrase; empty if it would not.

    Args:
        parts: the model; with a text encoder they decide between the classes of `stock_text`, else between
            ``LDMPipeline`` and ``DDPMPipeline``.
    """
    unet, scheduler, config = parts.unet, parts.scheduler, parts.config
    variance_type = scheduler.config.get("variance_type")
    has_text = parts.text_encoder is not None
    if config.get("conditioning_key") is not None and not has_text:
        return f"conditioning_key {config['conditioning_key']}"
    if config.get("use_positional_encodings"):
        return "use_positional_encodings"
    if config.get("latent_scaling_factor") is not None:
        return "its samples are latents"
    if isinstance(scheduler, DDPMExtScheduler) and variance_type in NAN_IN_STOCK:
        return f"variance_type {variance_type}"
    if has_text:
        return text_class(parts)[1]
    if parts.has_other_encoders:
        return "encoders of pictures"
    network: Any = unwrap(unet).config
    if network_class(unet) is not UNet2DModel:
        return f"a {network_class(unet).__name__}"
    if parts.vae is not None:
        if not isinstance(network.sample_size, int):  # LDMPipeline draws squares
            return "its latents are not square"
        if reason_not_to_fold(parts.vae):
            return reason_not_to_fold(parts.vae)
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


def saved_first_stage(vae: nn.Module, stock_name: str) -> tuple[str, Any]:
    """The slot of a first stage in a folder, and what is saved there.

    Args:
        vae: with or without wrappers.
        stock_name: the stock class that the folder names, which reads a ``scaling_factor`` alone; empty for ours.
    """
    plain = plain_network(vae, guarded=False)
    saved = fold_scale(plain) if stock_name else copy.copy(plain)
    # VQModel's default scale is not 1, so it is always written; where this copy came from may be a private path.
    config = {"scaling_factor": 1.0} | dict(saved.config)
    saved._internal_dict = FrozenDict({key: value for key, value in config.items() if key != "_name_or_path"})
    return ("vqvae" if stock_name in ("LDMPipeline", LDM_TEXT) else "vae"), saved


def stock_class(parts: PipelineParts) -> str:
    """The class that a folder names instead of ours; empty where stock Diffusers cannot sample the model right."""
    if reason_to_refuse_stock(parts):
        return ""
    if parts.text_encoder is not None:
        return text_class(parts)[0]
    return "DDPMPipeline" if parts.vae is None else "LDMPipeline"


def stock_model_index(index: dict[str, Any], parts: PipelineParts) -> dict[str, Any]:
    """A copy of the content that Diffusers would write into ``model_index.json``, with class names that readers know.

    Diffusers names our classes by their modules. Subclasses of ours, and other schedulers, keep their own names.
    """
    index = {key: value for key, value in index.items() if value is not None and value not in ([None, None],)}
    # Where this copy was loaded from, maybe a private path, and what `from_pipe` keeps of a stock pipeline.
    index = {key: value for key, value in index.items() if key in KEPT_PRIVATE or not key.startswith("_")}
    stock = stock_class(parts)
    # By a module path, a Hub id would not load: Diffusers looks for that file in the repository.
    if type(parts.scheduler) is DDPMExtScheduler:
        index["scheduler"] = ["diffusers", "DDPMScheduler" if stock else "DDPMExtScheduler"]
    if network_class(parts.unet) is UNet2DExtModel:
        index["unet"] = ["diffusers", "UNet2DExtModel"]
    if index["_class_name"] == "DDPMExtPipeline":
        # With the package in front, the error of a stock reader that did not import the package names it.
        index["_class_name"] = stock or "diffusers_ddpm_ext.DDPMExtPipeline"
    if stock in (STABLE_DIFFUSION, LDM_TEXT):
        index.pop("conditioning_key", None)  # crossattn, as the network's configuration says
    if stock == STABLE_DIFFUSION:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    return index

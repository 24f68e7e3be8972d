"""The network of a run, built from a JSON configuration or from the size options."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from diffusers_ddpm_ext.errors import ConfigError, as_config_error, printable
from diffusers_ddpm_ext.models.class_token_unet import ClassTokenUNet
from diffusers_ddpm_ext.models.unet_2d_ext import UNet2DExtModel
from diffusers_ddpm_ext.training.config.model_file import MODEL_OPTION, read_model_file
from diffusers_ddpm_ext.training.config.options import ModelOptions
from diffusers_ddpm_ext.training.factory.denoiser_shape import DenoiserShape
from diffusers_ddpm_ext.utils import random_keys as keys
from diffusers_ddpm_ext.utils.network_budget import check_network_config
from diffusers_ddpm_ext.utils.vocabulary import LATENTS_KEY

WEIGHTS_STREAM = "weights"
TOKEN_WIDTH = 512
"""Width of the tokens of classes where the network's configuration has none: that of CompVis' ``ClassEmbedder``."""
DENOISER_CLASSES: dict[str, type] = {cls.__name__: cls for cls in (UNet2DModel, UNet2DConditionModel, UNet2DExtModel)}


def build_denoiser(options: ModelOptions, shape: DenoiserShape, seed: int) -> UNet2DModel:
    """Build and initialize a network, on the CPU in float32, and try one forward pass.

    Args:
        options: section ``model``.
        shape: of its inputs and outputs.
        seed: of the run; the initial weights depend on it alone, so they are equal on every process.

    Raises:
        ConfigError: the network cannot be built, or does not accept such images; the message names the option.
    """
    if options.model_config_name_or_path is not None or options.model_config is not None:
        option = MODEL_OPTION if options.model_config is None else "--model_config"
        path = options.model_config_name_or_path
        config = dict(options.model_config) if path is None and options.model_config else _load_config(str(path))
        class_name = _check_config(config, shape, option)
    else:
        option, config = "--block_out_channels", _config_from_sizes(options, shape)
        class_name = _denoiser_class(shape)
    size = shape.size
    config = {key: value for key, value in config.items() if key != LATENTS_KEY}
    config = config | {"sample_size": size[0] if size[0] == size[1] else list(size)}
    config = {"in_channels": shape.in_channels, "out_channels": shape.out_channels} | config
    if shape.needs("encoder_hidden_states"):
        width = TOKEN_WIDTH if shape.context_shape is None else shape.context_shape[1]
        config = {"cross_attention_dim": width} | config
        _check_token_width(config, shape, option)
    if shape.needs("class_labels") and not config.get("class_embed_type"):
        config = {"num_class_embeds": shape.num_classes} | config
    check_network_config(config, option)
    _check_halvings(config, shape, option)
    with torch.random.fork_rng(devices=[]), as_config_error(option):
        torch.manual_seed(keys.key(WEIGHTS_STREAM, seed))
        cls = DENOISER_CLASSES[class_name] if shape.class_tokens is None else ClassTokenUNet
        denoiser: UNet2DModel = cls.from_config(config)  # type: ignore[attr-defined]
        if isinstance(denoiser, ClassTokenUNet) and shape.class_tokens is not None:
            denoiser.add_class_embedder(shape.class_tokens)
    _try_forward(denoiser, shape, option)
    return denoiser


def _denoiser_class(shape: DenoiserShape) -> str:
    """Name of the network class for such inputs."""
    if shape.needs("encoder_hidden_states"):
        return "UNet2DConditionModel"
    # Stock Diffusers would silently sample wrongly with a wider input, projected labels or learned log-variances.
    special = shape.conditioning.widens_input or shape.label_width is not None or shape.learned_variance == "learned"
    return "UNet2DExtModel" if special else "UNet2DModel"


def _config_from_sizes(options: ModelOptions, shape: DenoiserShape) -> dict[str, Any]:
    """The configuration from the size options, whose consistency was checked with the options."""
    widths = list(options.block_out_channels or ())
    attention = [level in (options.attention_levels or ()) for level in range(len(widths))]
    crosses = shape.needs("encoder_hidden_states")
    down, up = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D") if crosses else ("AttnDownBlock2D", "AttnUpBlock2D")
    config: dict[str, Any] = {
        "block_out_channels": widths,
        "layers_per_block": options.layers_per_block,
        "down_block_types": [down if attends else "DownBlock2D" for attends in attention],
        "up_block_types": [up if attends else "UpBlock2D" for attends in reversed(attention)],
        "attention_head_dim": options.attention_head_dim,
        "norm_num_groups": options.norm_num_groups,
        "dropout": options.dropout,
    }
    if shape.label_width is not None:
        width = shape.label_width
        config |= {"class_embed_type": "projection", "projection_class_embeddings_input_dim": width}
    if crosses:  # UNet2DConditionModel reads attention_head_dim as the number of heads
        config |= {"attention_head_dim": [max(1, width // (options.attention_head_dim or width)) for width in widths]}
    return config


def _load_config(name_or_path: str) -> dict[str, Any]:
    """A network's configuration from a JSON file, the folder of a model or pipeline, or the Hub."""
    local = read_model_file(name_or_path)
    if local is not None:
        return local
    try:
        config = UNet2DModel.load_config(name_or_path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{MODEL_OPTION} {name_or_path} cannot be read as a UNet2DModel's JSON: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(config, dict):
        raise ConfigError(f"{MODEL_OPTION} {name_or_path} is not a JSON object.")
    return config


def _check_config(config: dict[str, Any], shape: DenoiserShape, option: str) -> str:
    """Check class, keys, conditions and channels of a configuration; return the name of the class to build."""
    kind = str(config.get("_class_name", _denoiser_class(shape)))
    if kind not in DENOISER_CLASSES:
        raise ConfigError(f"{option} describes a {kind}; supported are {', '.join(DENOISER_CLASSES)}.")
    if kind == "UNet2DModel" and _denoiser_class(shape) == "UNet2DExtModel":
        kind = "UNet2DExtModel"  # the same network; stock Diffusers does not load it, since it would pass wrong inputs
    known = set(inspect.signature(DENOISER_CLASSES[kind].__init__).parameters) - {"self"}  # type: ignore[misc]
    unknown = sorted(key for key in config if key not in known and not key.startswith("_"))
    if unknown:
        raise ConfigError(f"{option}: {kind} has no {', '.join(unknown)}.")
    cross = shape.needs("encoder_hidden_states")
    if cross != (kind == "UNet2DConditionModel"):
        needed = "UNet2DConditionModel" if cross else "UNet2DModel"
        key = shape.conditioning.conditioning_key
        raise ConfigError(f"{option} describes a {kind}; --conditioning_key {key or 'none'} needs a {needed}.")
    _check_labels(config, shape, option)
    inputs, outputs = config.get("in_channels", shape.in_channels), config.get("out_channels", shape.out_channels)
    if inputs != shape.in_channels:
        extra = (
            ""
            if shape.in_channels == shape.channels
            else f" and {shape.in_channels - shape.channels} concatenated to them"
        )
        have = "the images have" if shape.factor is None else "the latents have"
        raise ConfigError(f"{option}: in_channels is {inputs}, {have} {shape.channels}{extra}; see {shape.option}.")
    if outputs == 2 * shape.channels and shape.learned_variance is None:
        raise ConfigError(
            f"{option}: out_channels {outputs} is a learned variance: use --variance_type learned_range and"
            f" --loss_type hybrid, or set it to {shape.channels}."
        )
    if outputs != shape.out_channels:
        whose = "those of the images" if shape.learned_variance is None else "prediction and variance of the images"
        raise ConfigError(f"{option}: out_channels is {outputs} and must be {shape.out_channels}, {whose}.")
    return kind


def _check_labels(config: Mapping[str, Any], shape: DenoiserShape, option: str) -> None:
    kind, classes = config.get("class_embed_type"), config.get("num_class_embeds")
    if (kind or classes) and not shape.needs("class_labels"):
        raise ConfigError(
            f"{option}: it is conditioned on classes; use --conditioning_key adm, or another key with labels."
        )
    if not shape.needs("class_labels"):
        return
    if shape.num_classes is not None and classes is not None and classes < shape.num_classes:
        raise ConfigError(
            f"{option}: num_class_embeds is {classes}, the data and the null class need {shape.num_classes}."
        )
    if shape.label_width is not None and kind is None:
        raise ConfigError(f"{option}: the labels are vectors, which need class_embed_type projection.")


def _check_token_width(config: Mapping[str, Any], shape: DenoiserShape, option: str) -> None:
    """Check that the cross attention takes tokens of the embeddings' width."""
    if shape.context_shape is None:
        return
    key = "encoder_hid_dim" if config.get("encoder_hid_dim") is not None else "cross_attention_dim"
    widths = config[key] if isinstance(config[key], list | tuple) else [config[key]]
    if any(width != shape.context_shape[1] for width in widths):
        raise ConfigError(
            f"{option}: {key} is {printable(str(config[key]), 60)}, and the tokens of {shape.token_source} have width"
            f" {shape.context_shape[1]}: use others, or correct it"
        )


def _check_halvings(config: dict[str, Any], shape: DenoiserShape, option: str) -> None:
    """Check that every level but the last can halve the images, or their latents."""
    default = inspect.signature(UNet2DModel.__init__).parameters["block_out_channels"].default
    widths = config.get("block_out_channels", default)
    halvings = len(widths) - 1
    pixels = shape.factor or 1
    factor = pixels * 2**halvings
    size = [pixels * side for side in shape.size]
    halved = "an image" if shape.factor is None else f"its latents, of {shape.size[0]}x{shape.size[1]},"
    if min(size) < factor:
        raise ConfigError(
            f"--resolution {size[0]} {size[1]} is too small: the {len(widths)} levels of {option} halve {halved} "
            f"{halvings} times, so each side needs at least {factor} pixels; or use fewer levels."
        )
    if any(side % factor for side in size):
        higher = [-(-side // factor) * factor for side in size]
        raise ConfigError(
            f"--resolution {size[0]} {size[1]} is not divisible by {factor}: the {len(widths)} levels of {option} "
            f"halve {halved} {halvings} times. Use --resolution {higher[0]} {higher[1]}, or fewer levels."
        )


@torch.no_grad()
def _try_forward(denoiser: UNet2DModel, shape: DenoiserShape, option: str) -> None:
    """Find now, not in the first step, whether the blocks fit together."""
    zeros, conditions = shape.zeros()
    inputs, named = shape.conditioning(zeros, conditions)
    with as_config_error(option):
        denoiser.eval()
        output_shape = denoiser(inputs, torch.zeros(1, dtype=torch.long), **named).sample.shape
        denoiser.train()
    if output_shape != (1, shape.out_channels, *shape.size):
        raise ConfigError(f"{option}: the network turns {tuple(zeros.shape)} into {tuple(output_shape)}.")

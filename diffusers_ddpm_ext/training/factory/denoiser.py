"""The network of a run: from its JSON configuration or its sizes, for its images and their conditions.

Whatever a library refuses here is an option that a person can put right, and says so as a ConfigError.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from diffusers_ddpm_ext.diffusion.reverse_step import LEARNED_VARIANCES
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.models.conditioning import COORDINATES, NEEDS, Conditions, Join
from diffusers_ddpm_ext.models.unet_2d_ext import UNet2DExtModel
from diffusers_ddpm_ext.training.config.options import ModelOptions
from diffusers_ddpm_ext.training.data.conditions import ConditionColumns
from diffusers_ddpm_ext.utils import random_keys as keys

INITIAL_WEIGHTS = "weights"
MODEL_OPTION = "--model_config_name_or_path"
CLASSES: dict[str, type] = {cls.__name__: cls for cls in (UNet2DModel, UNet2DConditionModel, UNet2DExtModel)}


@contextmanager
def as_config_error(option: str) -> Iterator[None]:
    """Turn a library's refusal into a sentence about an option.

    Args:
        option: the flag to name.

    Yields:
        Nothing.

    Raises:
        ConfigError: in place of a ValueError, TypeError, NotImplementedError or RuntimeError.
    """
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(text if option in text or not option else f"{option}: {text}") from error


@dataclass(frozen=True)
class DenoiserShape:
    """What goes into a network, and what comes out.

    Attributes:
        size: height and width of the images, pixels.
        channels: of the images.
        join: how conditions reach the network.
        concat_channels: of the images that are joined to the input.
        num_classes: of the labels, a null class included; None where they are no numbers.
        label_width: of labels that are no classes.
        context_shape: tokens and width of the embeddings.
        variance: ``learned`` or ``learned_range`` where the network says its variance too.
    """

    size: tuple[int, int]
    channels: int
    join: Join
    concat_channels: int = 0
    num_classes: int | None = None
    label_width: int | None = None
    context_shape: tuple[int, int] | None = None
    variance: str | None = None

    @property
    def out_channels(self) -> int:
        """Channels that the network returns: with a learned variance each image has a second one."""
        return self.channels * (1 if self.variance is None else 2)

    @property
    def in_channels(self) -> int:
        """Channels that the network is fed."""
        return self.channels + self.concat_channels + COORDINATES * self.join.use_positional_encodings

    def needs(self, condition: str) -> bool:
        """Whether the network is conditioned on this."""
        return condition in NEEDS[self.join.conditioning_key]

    def empty(self) -> tuple[torch.Tensor, Conditions]:
        """One empty image and its conditions, to try a network on."""
        labels = None
        if self.needs("class_labels"):
            width = self.label_width
            labels = torch.zeros(1, dtype=torch.long) if width is None else torch.zeros(1, width)
        concat = torch.zeros(1, self.concat_channels, *self.size) if self.concat_channels else None
        context = None if self.context_shape is None else torch.zeros(1, *self.context_shape)
        return torch.zeros(1, self.channels, *self.size), Conditions(labels, concat, context)


def denoiser_shape(
    options: ModelOptions,
    size: tuple[int, int],
    channels: int,
    columns: ConditionColumns | None,
    null_class: int | None,
    variance_type: str = "fixed_small",
) -> DenoiserShape:
    """Put together what a run's network is fed.

    Args:
        options: section ``model``.
        size: of the images.
        channels: of the images.
        columns: what they are conditioned on.
        null_class: that stands for no class; None where there is none.
        variance_type: of the scheduler.

    Returns:
        The shape.

    Raises:
        ConfigError: fewer classes were asked for than there are.
    """
    join = Join(options.conditioning_key, options.use_positional_encodings)
    variance = variance_type if variance_type in LEARNED_VARIANCES else None
    if columns is None:
        return DenoiserShape(size, channels, join, variance=variance)
    classes = len(columns.class_names) or None
    if classes is not None:
        least = max(classes, 0 if null_class is None else null_class + 1)
        classes = least if options.num_class_embeds is None else options.num_class_embeds
        if classes < least:
            raise ConfigError(f"--num_class_embeds {classes} is too few: the data and the null class need {least}")
    contexts = columns.contexts
    return DenoiserShape(
        size,
        channels,
        join,
        0 if columns.concat is None else columns.concat.channels,
        classes,
        columns.label_width,
        None if contexts is None else (contexts[0].shape[0], contexts[0].shape[1]),
        variance,
    )


def build_denoiser(options: ModelOptions, shape: DenoiserShape, seed: int) -> UNet2DModel:
    """A freshly initialised network for images of one size, and their conditions.

    Args:
        options: section ``model``.
        shape: of what it is fed.
        seed: of the run; the weights are a function of it, the same on every process.

    Returns:
        The network, on the CPU in float32, tried once on an empty image.

    Raises:
        ConfigError: a network that cannot be built, or that cannot take such images; the option is named.
    """
    if options.model_config_name_or_path is not None or options.model_config is not None:
        option = MODEL_OPTION if options.model_config is None else "--model_config"
        named = options.model_config_name_or_path
        config = dict(options.model_config) if named is None and options.model_config else _read_config(str(named))
        kind = _check_config(config, shape, option)
    else:
        option, config = "--block_out_channels", _config_of_sizes(options, shape)
        kind = _kind(shape)
    size = shape.size
    config = config | {"sample_size": size[0] if size[0] == size[1] else list(size)}
    config = {"in_channels": shape.in_channels, "out_channels": shape.out_channels} | config
    if shape.needs("class_labels") and not config.get("class_embed_type"):
        config = {"num_class_embeds": shape.num_classes} | config
    _check_halvings(config, size, option)
    with torch.random.fork_rng(devices=[]), as_config_error(option):
        torch.manual_seed(keys.key(INITIAL_WEIGHTS, seed))
        denoiser: UNet2DModel = CLASSES[kind].from_config(config)  # type: ignore[attr-defined]
    _try(denoiser, shape, option)
    return denoiser


def _kind(shape: DenoiserShape) -> str:
    """Name of the class of network that takes such inputs."""
    if shape.needs("encoder_hidden_states"):
        return "UNet2DConditionModel"
    # Stock Diffusers would sample a wide input, projected labels or learned log-variances wrongly without a word.
    special = shape.join.widens_input or shape.label_width is not None or shape.variance == "learned"
    return "UNet2DExtModel" if special else "UNet2DModel"


def _config_of_sizes(options: ModelOptions, shape: DenoiserShape) -> dict[str, Any]:
    """The configuration of the size flags; that they fit together was checked with the options."""
    widths = list(options.block_out_channels or ())
    attention = [level in (options.attention_levels or ()) for level in range(len(widths))]
    cross = shape.context_shape
    down, up = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D") if cross else ("AttnDownBlock2D", "AttnUpBlock2D")
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
    if cross:  # where Diffusers means the number of heads by attention_head_dim
        heads = [max(1, width // (options.attention_head_dim or width)) for width in widths]
        config |= {"cross_attention_dim": cross[1], "attention_head_dim": heads}
    return config


def _read_config(name_or_path: str) -> dict[str, Any]:
    """A UNet2DModel's configuration from a JSON file, a model's or a pipeline's folder, or the Hub."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        found = [place for place in (path / "config.json", path / "unet" / "config.json") if place.is_file()]
        if not found:
            raise ConfigError(f"{MODEL_OPTION} {path}: neither config.json nor unet/config.json is in that folder.")
        path = found[0]
    try:
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
        else:
            config = UNet2DModel.load_config(name_or_path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{MODEL_OPTION} {name_or_path} cannot be read as a UNet2DModel's JSON: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(config, dict):
        raise ConfigError(f"{MODEL_OPTION} {name_or_path} holds no JSON object.")
    return config


def _check_config(config: dict[str, Any], shape: DenoiserShape, option: str) -> str:
    """Refuse a configuration of another class, with unknown keys, or that this run cannot feed; return its class."""
    kind = str(config.get("_class_name", _kind(shape)))
    if kind not in CLASSES:
        raise ConfigError(f"{option} describes a {kind}; this trains a {', '.join(CLASSES)}.")
    if kind == "UNet2DModel" and _kind(shape) == "UNet2DExtModel":
        kind = "UNet2DExtModel"  # the same network, which stock Diffusers does not open: it would feed it wrongly
    known = set(inspect.signature(CLASSES[kind].__init__).parameters) - {"self"}  # type: ignore[misc]
    unknown = sorted(key for key in config if key not in known and not key.startswith("_"))
    if unknown:
        raise ConfigError(f"{option}: {kind} has no {', '.join(unknown)}.")
    cross = shape.needs("encoder_hidden_states")
    if cross != (kind == "UNet2DConditionModel"):
        needed = "UNet2DConditionModel" if cross else "UNet2DModel"
        key = shape.join.conditioning_key
        raise ConfigError(f"{option} describes a {kind}; --conditioning_key {key or 'none'} needs a {needed}.")
    _check_labels(config, shape, option)
    inputs, outputs = config.get("in_channels", shape.in_channels), config.get("out_channels", shape.out_channels)
    if inputs != shape.in_channels:
        extra = (
            "" if shape.in_channels == shape.channels else f" and {shape.in_channels - shape.channels} joined to them"
        )
        raise ConfigError(
            f"{option}: in_channels is {inputs}, the images have {shape.channels}{extra}; see --channels."
        )
    if outputs == 2 * shape.channels and shape.variance is None:
        raise ConfigError(
            f"{option}: out_channels {outputs} is a learned variance: say --variance_type learned_range and"
            f" --loss_type hybrid, or give it {shape.channels}."
        )
    if outputs != shape.out_channels:
        whose = "those of the images" if shape.variance is None else "prediction and variance of the images"
        raise ConfigError(f"{option}: out_channels is {outputs} and must be {shape.out_channels}, {whose}.")
    return kind


def _check_labels(config: Mapping[str, Any], shape: DenoiserShape, option: str) -> None:
    kind, classes = config.get("class_embed_type"), config.get("num_class_embeds")
    if (kind or classes) and not shape.needs("class_labels"):
        raise ConfigError(
            f"{option}: it is conditioned on classes; say --conditioning_key adm, or another with labels."
        )
    if not shape.needs("class_labels"):
        return
    if shape.num_classes is not None and classes is not None and classes < shape.num_classes:
        raise ConfigError(
            f"{option}: num_class_embeds is {classes}, the data and the null class need {shape.num_classes}."
        )
    if shape.label_width is not None and kind is None:
        raise ConfigError(f"{option}: the labels are vectors; it needs class_embed_type projection.")


def _check_halvings(config: dict[str, Any], size: tuple[int, int], option: str) -> None:
    """Refuse images that the network cannot halve and put together again."""
    default = inspect.signature(UNet2DModel.__init__).parameters["block_out_channels"].default
    widths = config.get("block_out_channels", default)
    halvings = len(widths) - 1
    factor = 2**halvings
    if min(size) < factor:
        raise ConfigError(
            f"--resolution {size[0]} {size[1]} is too small: the {len(widths)} levels of {option} halve an image "
            f"{halvings} times, so it needs at least {factor} pixels a side; or give fewer levels."
        )
    if any(side % factor for side in size):
        higher = [-(-side // factor) * factor for side in size]
        raise ConfigError(
            f"--resolution {size[0]} {size[1]} is not divisible by {factor}: the {len(widths)} levels of {option} "
            f"halve an image {halvings} times. Say --resolution {higher[0]} {higher[1]}, or give fewer levels."
        )


@torch.no_grad()
def _try(denoiser: UNet2DModel, shape: DenoiserShape, option: str) -> None:
    """Find out now, not in the first step, whether the blocks fit together."""
    empty, conditions = shape.empty()
    inputs, named = shape.join(empty, conditions)
    with as_config_error(option):
        denoiser.eval()
        made = denoiser(inputs, torch.zeros(1, dtype=torch.long), **named).sample.shape
        denoiser.train()
    if made != (1, shape.out_channels, *shape.size):
        raise ConfigError(f"{option}: the network turns {tuple(empty.shape)} into {tuple(made)}.")

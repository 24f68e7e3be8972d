"""From options and images to the parts of a run: network, scheduler, objective, moving average.

Whatever a library refuses here is an option that a person can put right, and says so as a ConfigError.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel

from diffusers_ddpm_ext.ema import LitEMA
from diffusers_ddpm_ext.objective import DDPMObjective
from diffusers_ddpm_ext.scheduler import DDPMExtScheduler
from diffusers_ddpm_ext.training import keys
from diffusers_ddpm_ext.training.errors import ConfigError
from diffusers_ddpm_ext.training.options import EmaOptions, ModelOptions, ObjectiveOptions, ScheduleOptions

INITIAL_WEIGHTS = "weights"
MODEL_OPTION = "--model_config_name_or_path"


@dataclass(frozen=True)
class Parts:
    """What is trained, on the CPU, in float32."""

    denoiser: UNet2DModel
    scheduler: DDPMExtScheduler
    objective: DDPMObjective


@contextmanager
def refusing(option: str) -> Iterator[None]:
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


def build_parts(
    model: ModelOptions,
    schedule: ScheduleOptions,
    objective: ObjectiveOptions,
    size: tuple[int, int],
    channels: int,
    seed: int,
) -> Parts:
    """Everything that is trained, and what it is trained on.

    Args:
        model: section ``model``.
        schedule: section ``schedule``.
        objective: section ``objective``.
        size: height and width of the images, pixels.
        channels: of the images.
        seed: of the run.

    Returns:
        The parts, the cheap ones checked before the network is made.

    Raises:
        ConfigError: an option that cannot be met, by name.
    """
    scheduler = build_scheduler(schedule)
    loss = build_objective(objective, scheduler)
    return Parts(build_denoiser(model, size, channels, seed), scheduler, loss)


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
    with refusing(""):
        return DDPMExtScheduler(**values)


def build_objective(options: ObjectiveOptions, scheduler: DDPMExtScheduler) -> DDPMObjective:
    """The loss of a run.

    Args:
        options: section ``objective``.
        scheduler: whose tables and prediction type the loss takes.

    Returns:
        The objective, with its log-variances.

    Raises:
        ConfigError: options that contradict each other or lie outside their range.
    """
    known = inspect.signature(DDPMObjective.__init__).parameters
    values = {name: value for name, value in vars(options).items() if name in known}
    with refusing(""):
        return DDPMObjective(scheduler, **values)


def build_denoiser(options: ModelOptions, size: tuple[int, int], channels: int, seed: int) -> UNet2DModel:
    """A freshly initialised network for images of one size.

    Args:
        options: section ``model``.
        size: height and width of the images, pixels.
        channels: of the images.
        seed: of the run; the weights are a function of it, the same on every process.

    Returns:
        The network, on the CPU in float32, tried once on an empty image.

    Raises:
        ConfigError: a network that cannot be built, or that cannot take such images; the option is named.
    """
    if options.model_config_name_or_path is not None:
        option, config = MODEL_OPTION, _read_config(options.model_config_name_or_path)
        _check_config(config, channels)
    else:
        option, config = "--block_out_channels", _config_of_sizes(options)
    config = config | {"sample_size": size[0] if size[0] == size[1] else list(size)}
    config = {"in_channels": channels, "out_channels": channels} | config
    _check_halvings(config, size, option)
    with torch.random.fork_rng(devices=[]), refusing(option):
        torch.manual_seed(keys.key(INITIAL_WEIGHTS, seed))
        denoiser = UNet2DModel.from_config(config)
    _try(denoiser, size, channels, option)
    return denoiser


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
    with refusing("--ema_decay"):
        return LitEMA(denoiser, options.ema_decay, options.ema_use_num_updates)


def _config_of_sizes(options: ModelOptions) -> dict[str, Any]:
    """The UNet2DModel of the size flags; that they fit together was checked with the options."""
    widths = list(options.block_out_channels or ())
    attention = [level in (options.attention_levels or ()) for level in range(len(widths))]
    return {
        "block_out_channels": widths,
        "layers_per_block": options.layers_per_block,
        "down_block_types": ["AttnDownBlock2D" if attends else "DownBlock2D" for attends in attention],
        "up_block_types": ["AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attention)],
        "attention_head_dim": options.attention_head_dim,
        "norm_num_groups": options.norm_num_groups,
        "dropout": options.dropout,
    }


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


def _check_config(config: dict[str, Any], channels: int) -> None:
    """Refuse a configuration that names another class, unknown keys, or what an unconditional run cannot feed."""
    kind = config.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise ConfigError(f"{MODEL_OPTION} describes a {kind}; this trains a UNet2DModel.")
    known = set(inspect.signature(UNet2DModel.__init__).parameters) - {"self"}
    unknown = sorted(key for key in config if key not in known and not key.startswith("_"))
    if unknown:
        raise ConfigError(f"{MODEL_OPTION}: UNet2DModel has no {', '.join(unknown)}.")
    if config.get("class_embed_type") or config.get("num_class_embeds"):
        raise ConfigError(f"{MODEL_OPTION}: class-conditional networks are not supported yet.")
    inputs, outputs = config.get("in_channels", channels), config.get("out_channels", channels)
    if inputs != channels:
        raise ConfigError(f"{MODEL_OPTION}: in_channels is {inputs}, the images have {channels}; see --channels.")
    if outputs == 2 * channels:
        raise ConfigError(
            f"{MODEL_OPTION}: out_channels {outputs} is a learned variance, not supported yet in training."
        )
    if outputs != channels:
        raise ConfigError(f"{MODEL_OPTION}: out_channels is {outputs} and must be {channels}, as many as go in.")


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
def _try(denoiser: UNet2DModel, size: tuple[int, int], channels: int, option: str) -> None:
    """Find out now, not in the first step, whether the blocks fit together."""
    empty = torch.zeros(1, channels, *size)
    with refusing(option):
        denoiser.eval()
        shape = denoiser(empty, torch.zeros(1, dtype=torch.long)).sample.shape
        denoiser.train()
    if shape != empty.shape:
        raise ConfigError(f"{option}: the network turns {tuple(empty.shape)} into {tuple(shape)}.")

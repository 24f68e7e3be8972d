"""The text encoder of a run: loaded or new, with its tokenizer, checked, and placed on the run's device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from diffusers_ddpm_ext.errors import ConfigError, as_config_error, printable
from diffusers_ddpm_ext.models.text_encoder import TextEncoder, load_text_encoder, load_tokenizer
from diffusers_ddpm_ext.models.text_encoder_loading import transformers_class
from diffusers_ddpm_ext.models.text_kinds import CLASS_NAMES, kind_named
from diffusers_ddpm_ext.training.config.train_config import TrainConfig
from diffusers_ddpm_ext.training.data.caption_encoder import CaptionEncoder
from diffusers_ddpm_ext.training.factory.denoiser import WEIGHTS_STREAM
from diffusers_ddpm_ext.utils import random_keys as keys
from diffusers_ddpm_ext.utils.text_encoder_folder import check_settings


def build_caption_encoder(config: TrainConfig, device: torch.device) -> CaptionEncoder | None:
    """The text encoder of a run, before its captions are read; None for a run without captions.

    Raises:
        ConfigError: encoder or tokenizer cannot be loaded, or do not fit each other.
    """
    options = config.text
    if config.data.caption_column is None:
        return None
    if options.text_encoder is None:
        encoder = new_text_encoder(options.text_encoder_config or {}, config.loop.seed)
    else:
        try:
            encoder = load_text_encoder(options.text_encoder, options.text_encoder_subfolder)
        except ConfigError as error:
            raise ConfigError(f"--text_encoder: {error}") from None
    tokenizer = _load_tokenizer(str(options.text_encoder), options.tokenizer)
    with as_config_error("--tokenizer"):
        stage = TextEncoder(encoder.to(device), tokenizer)
        stage.tokenize([""])
    if options.train_text_encoder:
        enable_training(stage)
    return CaptionEncoder(stage, stage.content_hash(), options.train_text_encoder)


def new_text_encoder(config: Mapping[str, Any], seed: int) -> Any:
    """A text encoder of random weights, which depend on the seed alone; on the CPU in float32.

    Args:
        config: its settings and ``_class_name``.
        seed: of the run.

    Raises:
        ConfigError: the class or a setting is unknown, or they contradict each other.
    """
    option, name = "--text_encoder_config", config.get("_class_name")
    kind = kind_named(name) if isinstance(name, str) else None
    if kind is None:
        raise ConfigError(f"{option}: _class_name is {printable(repr(name), 80)}; it must be one of {CLASS_NAMES}")
    model_class = transformers_class(kind.library, str(name))
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    unknown = sorted(settings.keys() - model_class.config_class().to_dict().keys())
    if unknown:
        raise ConfigError(f"{option}: {name} has no {printable(', '.join(unknown), 200)}")
    check_settings(option, settings)
    with torch.random.fork_rng(devices=[]), as_config_error(option):
        torch.manual_seed(keys.key(WEIGHTS_STREAM, seed, "text encoder"))
        try:
            return model_class(model_class.config_class(**settings)).float()
        except (KeyError, ZeroDivisionError, StrictDataclassError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None


def _load_tokenizer(encoder: str, tokenizer: str | None) -> Any:
    """The tokenizer that is named, or that of the encoder."""
    try:
        return load_tokenizer(encoder if tokenizer is None else tokenizer)
    except ConfigError as error:
        if tokenizer is not None:
            raise ConfigError(f"--tokenizer: {error}") from None
        raise ConfigError(
            f"--text_encoder {printable(encoder, 200)} comes without a tokenizer: name one with --tokenizer, a folder"
            f" or Hub id ({error})"
        ) from None


def enable_training(stage: TextEncoder) -> None:
    """Let gradients reach the weights that the tokens depend on.

    The others, such as the projection of a pooled output, stay frozen: weights without gradients would keep processes
    from averaging theirs.
    """
    module: nn.Module = stage.encoder
    weights: list[Tensor] = [weight.requires_grad_() for weight in module.parameters()]
    with torch.enable_grad():
        tokens = stage.encode(stage.tokenize([""]), requires_grad=True)
        gradients = torch.autograd.grad(tokens.sum(), weights, allow_unused=True)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.requires_grad_(gradient is not None)

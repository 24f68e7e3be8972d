"""The text encoder of a run: loaded with its tokenizer, checked, and placed on the run's device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.errors import ConfigError, as_config_error, printable
from diffusers_ddpm_ext.models.text_encoder import TextEncoder, load_text_encoder, load_tokenizer
from diffusers_ddpm_ext.training.config.text_options import TextOptions
from diffusers_ddpm_ext.training.data.caption_encoder import CaptionEncoder


def build_caption_encoder(options: TextOptions, device: torch.device) -> CaptionEncoder | None:
    """The text encoder of a run, before its captions are read; None for a run without captions.

    Raises:
        ConfigError: encoder or tokenizer cannot be loaded, or do not fit each other.
    """
    if options.text_encoder is None:
        return None
    try:
        encoder = load_text_encoder(options.text_encoder, options.text_encoder_subfolder)
    except ConfigError as error:
        raise ConfigError(f"--text_encoder: {error}") from None
    tokenizer = _load_tokenizer(options.text_encoder, options.tokenizer)
    with as_config_error("--tokenizer"):
        stage = TextEncoder(encoder.to(device), tokenizer)
        stage.tokenize([""])
    if options.train_text_encoder:
        enable_training(stage)
    return CaptionEncoder(stage, stage.content_hash(), options.train_text_encoder)


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

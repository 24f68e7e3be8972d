"""Tiny pipelines that draw what a prompt says, untrained: of pixels and of latents, with each kind of encoder."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from helpers.latent_cases import tiny_first_stage
from helpers.text_models import tiny_text_encoder, tiny_tokenizer

WIDTH = 16
"""Of the tokens of cross attention."""


def tiny_conditional_unet(channels: int = 3, out_channels: int | None = None, **changes: Any) -> UNet2DConditionModel:
    """A network of 8 x 8 samples with cross attention, random but the same in every test."""
    config = {
        "sample_size": 8, "in_channels": channels, "out_channels": out_channels or channels, "norm_num_groups": 4,
        "block_out_channels": (8, 8), "layers_per_block": 1, "cross_attention_dim": WIDTH, "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**config | changes)
        for weight in unet.parameters():  # so that prompts make a difference
            weight.data.mul_(2)
    return unet.eval()


def text_pipeline(kind: str = "clip", is_latent: bool = False, tokenizer: Any = "tiny", **arguments: Any) -> Any:
    """A pipeline of 8 x 8 pixels or latents.

    Args:
        kind: of the text encoder, as `tiny_text_encoder` names them; "" for none.
        is_latent: whether there is a first stage.
        tokenizer: of the pipeline; None for none.
        arguments: those of `DDPMExtPipeline`.
    """
    encoders = {} if not kind else {"text_encoder": tiny_text_encoder(kind, WIDTH)}
    if kind and tokenizer is not None:
        encoders["tokenizer"] = tiny_tokenizer() if tokenizer == "tiny" else tokenizer
    stage = {"vae": tiny_first_stage("kl")} if is_latent else {}
    unet = arguments.pop("unet", None) or tiny_conditional_unet(4 if is_latent else 3)
    scheduler = DDPMExtScheduler(20, clip_sample=not is_latent)
    return DDPMExtPipeline(unet, scheduler, **encoders | stage | arguments)

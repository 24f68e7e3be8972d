"""Tiny pipelines of latents with a text encoder."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from helpers.text_folder_cases import CASES
from helpers.text_models import LENGTH, tiny_text_encoder, tiny_tokenizer
from helpers.tiny import tiny_autoencoder

EIGHTH = {
    "block_out_channels": (4, 4, 4, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
"""Levels of a first stage of 8x8 pixels a latent."""


def tiny_text_unet(channels: int = 4, out_channels: int = 4, width: int = 16, **config: Any) -> UNet2DConditionModel:
    """A network with cross attention, random but the same in every test."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            in_channels=channels,
            out_channels=out_channels,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=width,
            attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            **config,
        ).eval()


def text_pipeline(
    kind: str = "clip", first_stage: str = "kl", length: int = LENGTH, tokenizer: Any = True, **arguments: Any
) -> DDPMExtPipeline:
    """A pipeline whose latents are 8 x 8 x 4; ``arguments`` are those of `DDPMExtPipeline`, and ``scheduler``'s."""
    scheduler = DDPMExtScheduler(50, clip_sample=False, **arguments.pop("schedule", {}))
    unet = arguments.pop("unet", None) or tiny_text_unet()
    vae = arguments.pop("vae", None) or tiny_autoencoder(first_stage, scaling_factor=0.3)
    pipeline = DDPMExtPipeline(
        unet,
        scheduler,
        vae=vae,
        text_encoder=tiny_text_encoder(kind, length=length),
        tokenizer=tiny_tokenizer(length) if tokenizer is True else tokenizer,
        **arguments,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build(case: str) -> DDPMExtPipeline:
    """The pipeline of one of `CASES`."""
    _, kind, first_stage = CASES[case]
    if kind == "bert":
        return text_pipeline(kind, length=77, vae=tiny_autoencoder(first_stage, **EIGHTH, scaling_factor=0.3))
    config = {"latents_mean": [0.5] * 4, "latents_std": [0.5, 1.0, 2.0, 3.0]} if case == "clip_stats" else {}
    schedule = {"timestep_spacing": "trailing"} if case == "clip_trailing" else {}
    return text_pipeline(kind, vae=tiny_autoencoder(first_stage, scaling_factor=0.3, **config), schedule=schedule)

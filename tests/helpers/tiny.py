"""Networks small enough for a test."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, ModelMixin, UNet2DModel, VQModel


def tiny_unet(
    channels: int = 3, out_channels: int | None = None, size: int | tuple[int, int] | None = 8
) -> UNet2DModel:
    """A UNet of some ten thousand weights, random but the same in every test."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels if out_channels is None else out_channels,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ).eval()


def tiny_autoencoder(kind: str = "kl", channels: int = 3, latent_channels: int = 4, **config: Any) -> ModelMixin:
    """An autoencoder that halves both sides: "kl", "vq", "tiny" or "dc"; random, but the same in every test."""
    blocks = {
        "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "out_channels": channels,
        "sample_size": 16,
    }
    arguments = {
        "kl": blocks,
        "vq": blocks | {"num_vq_embeddings": 32, "scaling_factor": 1.0},
        "tiny": {
            "out_channels": channels,
            "encoder_block_out_channels": (8, 8),
            "decoder_block_out_channels": (8, 8),
            "num_encoder_blocks": (1, 1),
            "num_decoder_blocks": (1, 1),
        },
        "dc": {
            "encoder_block_out_channels": (8, 8),
            "decoder_block_out_channels": (8, 8),
            "encoder_layers_per_block": (1, 1),
            "decoder_layers_per_block": (1, 1),
            "encoder_qkv_multiscales": ((), ()),
            "decoder_qkv_multiscales": ((), ()),
            "encoder_block_types": "ResBlock",
            "decoder_block_types": "ResBlock",
        },
    }
    classes = {"kl": AutoencoderKL, "vq": VQModel, "tiny": AutoencoderTiny, "dc": AutoencoderDC}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = classes[kind](
            **arguments[kind] | {"in_channels": channels, "latent_channels": latent_channels} | config
        )
        if kind == "vq":  # codes that random latents choose among, not all of them nearly zero
            torch.nn.init.normal_(model.quantize.embedding.weight)
    return model.eval().requires_grad_(False)


EXACT = ("--fast_attention", "never", "--memory_format", "contiguous")
"""Flags with which `ddpm-ext sample` rounds as a call of the pipeline does."""

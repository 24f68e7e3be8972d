"""Networks small enough for a test."""

from __future__ import annotations

import torch
from diffusers import UNet2DModel


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

"""Tiny pipelines of latents: a first stage of each class, and a network between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, VQModel
from PIL import Image
from torch import nn

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from helpers.tiny import tiny_unet

LEVELS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
SIZES = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}


def tiny_first_stage(kind: str = "kl", channels: int = 3, **changes: Any) -> nn.Module:
    """An autoencoder of two levels (DC: three), random but the same in every test; its scale is 0.7."""
    common = {"in_channels": channels, "out_channels": channels, "latent_channels": 4, "scaling_factor": 0.7}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if kind == "kl":
            return AutoencoderKL(**common | LEVELS | SIZES | changes).eval()
        if kind == "vq":
            return VQModel(**common | LEVELS | SIZES | {"num_vq_embeddings": 16} | changes).eval()
        if kind == "tiny":
            sides = {f"{side}_block_out_channels": (8, 8) for side in ("encoder", "decoder")}
            blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
            return AutoencoderTiny(**common | sides | blocks | changes).eval()
        widths = {f"{side}_block_out_channels": (8, 8, 8) for side in ("encoder", "decoder")}
        layers = {f"{side}_layers_per_block": (1, 1, 1) for side in ("encoder", "decoder")}
        blocks = {f"{side}_block_types": "ResBlock" for side in ("encoder", "decoder")}
        shapes = {f"{side}_qkv_multiscales": ((), (), ()) for side in ("encoder", "decoder")}
        sizes = {"in_channels": channels, "latent_channels": 4, "scaling_factor": 0.7}
        return AutoencoderDC(**sizes | widths | layers | blocks | shapes | changes).eval()


def latent_pipeline(kind: str = "kl", concat_channels: int = 0, **arguments: Any) -> DDPMExtPipeline:
    """A pipeline whose latents are 8 x 8 x 4, untrained; ``arguments`` are those of `DDPMExtPipeline`."""
    unet = tiny_unet(4 + concat_channels, 4)
    scheduler = DDPMExtScheduler(20, clip_sample=False)
    channels = arguments.pop("pixel_channels", 3)
    key = {"conditioning_key": "concat"} if concat_channels else {}
    return DDPMExtPipeline(unet, scheduler, vae=tiny_first_stage(kind, channels), **key | arguments)


def write_pictures(folder: Path, names: list[str], size: tuple[int, int] = (20, 16), mode: str = "RGB") -> None:
    """Random pictures; the fourth channel is transparent in the left half."""
    for index, name in enumerate(names):
        levels = np.random.default_rng(index).integers(0, 256, (*size, 4), dtype=np.uint8)
        levels[..., 3] = 255
        levels[:, : size[1] // 2, 3] = 0
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(levels if mode == "RGBA" else levels[..., :3])
        (image if mode in ("RGB", "RGBA") else image.convert(mode)).save(path)

"""Weights of CompVis' autoencoders, converted to Diffusers' and back, bit-exact.

{encoder,decoder}.conv_in, conv_out     the same
encoder.down.I.block.J, attn.J          encoder.down_blocks.I.resnets.J, attentions.J
encoder.down.I.downsample.conv          encoder.down_blocks.I.downsamplers.0.conv
{encoder,decoder}.mid.block_{1,2}       mid_block.resnets.{0,1}
{encoder,decoder}.mid.attn_1            mid_block.attentions.0
decoder.up.I                            decoder.up_blocks.(levels - 1 - I)
norm_out, nin_shortcut                  conv_norm_out, conv_shortcut
norm, q, k, v, proj_out of attention    group_norm, to_q, to_k, to_v, to_out.0: 1x1 convolutions become matrices
quant_conv, post_quant_conv, quantize   the same
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn

from diffusers_ddpm_ext.compvis.first_stage.architecture import FirstStageConfig
from diffusers_ddpm_ext.compvis.first_stage.arguments import original_config
from diffusers_ddpm_ext.compvis.key_map import TensorMapping, Transform
from diffusers_ddpm_ext.compvis.weights import (
    ConvertedTensor,
    check_weights,
    convert_mapped,
    resamples_without_weights,
)
from diffusers_ddpm_ext.utils.wrappers import plain_state_dict

# Part of a key here -> the original's, in this order.
RENAMED_PARTS = (
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.down_blocks\.(\d+)\.", r".down.\1."),
    (r"\.resnets\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.downsamplers\.0\.", ".downsample."),
    (r"\.upsamplers\.0\.", ".upsample."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
)
MATRIX = re.compile(r"\.to_(q|k|v|out\.0)\.weight$")
RESAMPLERS: dict[str, Transform] = {".downsamplers.0.conv.": "pool_unpadded", ".upsamplers.0.conv.": "nearest"}


def convert_first_stage(
    tensors: Mapping[str, Tensor], config: FirstStageConfig, scaling_factor: float = 1.0
) -> tuple[AutoencoderKL | VQModel, list[ConvertedTensor]]:
    """Build Diffusers' autoencoder from the original's weights.

    Args:
        tensors: floating, any dtype, by the original's keys.
        config: of the original.
        scaling_factor: of the latents.

    Returns:
        The autoencoder, float32, in eval mode, its weights not trained, and one row per tensor.

    Raises:
        ValueError: keys are missing or unexpected, shapes differ, or values are not finite.
    """
    check_weights(tensors)
    with torch.device("meta"):
        autoencoder = config.build(scaling_factor)
    shapes = {name: tuple(tensor.shape) for name, tensor in autoencoder.state_dict().items()}
    mappings = map_first_stage_keys(shapes, bool(config.ddconfig["resamp_with_conv"]))
    converted, rows = convert_mapped(tensors, mappings)
    autoencoder.load_state_dict(converted, strict=True, assign=True)
    return autoencoder.requires_grad_(False).eval(), rows


def map_first_stage_keys(shapes: Mapping[str, tuple[int, ...]], resamples: bool = True) -> list[TensorMapping]:
    """Map every tensor of Diffusers' autoencoder to its source in the original.

    Args:
        shapes: of the tensors here, by their keys.
        resamples: whether the original resamples with convolutions.
    """
    levels = 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("decoder.up_blocks."))
    mappings = []
    for target, shape in shapes.items():
        resampler = next((transform for part, transform in RESAMPLERS.items() if part in target), None)
        if resampler is not None and not resamples:
            mappings.append(TensorMapping(target, "", resampler, 1, shape))
            continue
        source = re.sub(r"\.up_blocks\.(\d+)\.", lambda match: f".up.{levels - 1 - int(match[1])}.", target)
        for part, theirs in RENAMED_PARTS:
            source = re.sub(part, theirs, source)
        transform: Transform = "squeeze" if MATRIX.search(target) else "same"
        mappings.append(TensorMapping(target, source, transform, 1, shape))
    return mappings


def first_stage_keys(config: FirstStageConfig) -> set[str]:
    """Keys of all tensors of an original autoencoder."""
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in config.build().state_dict().items()}
    mappings = map_first_stage_keys(shapes, bool(config.ddconfig["resamp_with_conv"]))
    return {mapping.source for mapping in mappings if mapping.source}


def export_first_stage(autoencoder: nn.Module, recorded: Any = None) -> dict[str, Tensor]:
    """Convert an autoencoder's weights to the original's keys and shapes; the inverse of `convert_first_stage`.

    Args:
        autoencoder: of Diffusers.
        recorded: as in `original_config`.

    Returns:
        The original's keys to tensors, in the autoencoder's dtype, on its device.

    Raises:
        ValueError: the original's classes cannot express the autoencoder; the message names the setting.
    """
    original_config(autoencoder, recorded)  # refuses what cannot be expressed
    if resamples_without_weights(autoencoder, pool="pool_unpadded"):
        raise ValueError(
            "resamp_with_conv false cannot be exported: this autoencoder was converted from one that resamples "
            "without weights, and has convolutions in their place."
        )
    weights = {name: tensor.detach() for name, tensor in plain_state_dict(autoencoder).items()}
    mappings = map_first_stage_keys({name: tuple(tensor.shape) for name, tensor in weights.items()})
    return {
        m.source: weights[m.target][..., None, None] if m.transform == "squeeze" else weights[m.target]
        for m in mappings
    }

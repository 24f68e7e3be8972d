"""Pictures as conditions: the embeddings of an image encoder, and where they enter the network.

Tensors are prepared as CompVis' ``FrozenCLIPImageEmbedder`` does: bicubic interpolation with aligned corners, then
CLIP's mean and standard deviation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from diffusers_ddpm_ext.models.evaluation_mode import evaluation_mode
from diffusers_ddpm_ext.utils.checks import describe
from diffusers_ddpm_ext.utils.wrappers import unwrap

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@torch.no_grad()
def encode_image(encoder: nn.Module, extractor: Any, image: Any, device: torch.device) -> Tensor:
    """Embeddings of pictures.

    Args:
        encoder: a CLIP vision network of Transformers; in float32 afterwards.
        extractor: its image processor, for PIL images; None: they are prepared like tensors.
        image: a PIL image, a list of them, or a tensor (B, 3, H, W) in [-1, 1].
        device: to compute on.

    Returns:
        (B, width), float32: ``image_embeds``, or ``pooler_output`` of a network without projection.

    Raises:
        ValueError: the pictures are of another kind, or not finite.
    """
    network: Any = unwrap(encoder)
    if network.dtype != torch.float32:
        network.float()
    pixels = _pixels(image, extractor, int(network.config.image_size)).to(device)
    with torch.autocast(device.type, enabled=False), evaluation_mode(network):
        output = network(pixel_values=pixels, return_dict=True)
    embeds = output.get("image_embeds")
    tensor: Tensor = output.pooler_output if embeds is None else embeds
    return tensor


def _pixels(image: Any, extractor: Any, size: int) -> Tensor:
    images = [image] if isinstance(image, Image.Image) else image
    if isinstance(images, list | tuple) and images and all(isinstance(each, Image.Image) for each in images):
        pictures = [each.convert("RGB") for each in images]
        if extractor is not None:
            pixels: Tensor = extractor(images=pictures, return_tensors="pt").pixel_values
            return pixels.float()
        rows = [torch.from_numpy(np.asarray(each, dtype=np.float32)).permute(2, 0, 1)[None] for each in pictures]
        return torch.cat([_prepared(row / 127.5 - 1, size) for row in rows])
    if isinstance(images, list | tuple) and images and all(isinstance(each, Tensor) for each in images):
        images = torch.stack(list(images)) if images[0].ndim == 3 else torch.cat(list(images))
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"image is {describe(image)}; it must be a PIL image, a list of them, or a floating tensor (B, 3, height, "
            "width) in [-1, 1]."
        )
    if not bool(torch.isfinite(images).all()):
        raise ValueError("image has values that are not finite (NaN or infinity).")
    return _prepared(images.float(), size)


def _prepared(pixels: Tensor, size: int) -> Tensor:
    """Pictures in [-1, 1] as CLIP takes them."""
    if pixels.shape[2:] != (size, size):
        pixels = functional.interpolate(pixels, size=(size, size), mode="bicubic", align_corners=True)
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return ((pixels + 1) / 2 - mean) / std

"""Pictures that are concatenated to the network's input, where the samples are latents of a first stage.

A picture is a low-resolution image, or for inpainting the image with a hole, whose transparency is the mask.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from diffusers_ddpm_ext.models.first_stage import FirstStage
from diffusers_ddpm_ext.utils.vocabulary import ConcatThroughVae


def concat_channels(stage: FirstStage, channels: int, through: ConcatThroughVae | None) -> int:
    """Channels that the network gets for pictures of ``channels`` channels.

    Raises:
        ValueError: the first stage cannot encode such pictures.
    """
    if through is None:
        return channels
    own = stage.pixel_channels
    if channels not in (1, own, own + 1):
        raise ValueError(
            f"concatenated pictures have {channels} channels, and the first stage encodes {own}: use pictures of {own}"
            f" channels, or of {own + 1}, the last of which is the mask."
        )
    return stage.latent_channels + (1 if channels == own + 1 else 0)


def concat_condition(
    stage: FirstStage,
    pictures: Tensor,
    through: ConcatThroughVae | None,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """The network's concatenated input for pictures of the size of the images.

    Args:
        stage: the first stage.
        pictures: (B, c, H, W), in [-1, 1]. Gray ones stand for pictures of any number of channels.
        through: None: pictures are averaged to the size of the latents. "mode":
            encoded, unscaled, as CompVis' ``LatentDiffusion`` does; "sample": a scaled sample, as its
            ``LatentInpaintDiffusion`` does. A channel more than the first stage takes is an opacity, 1 opaque: what is
            below 0 is to be painted. With "mode" it is black, and the mask, -1 or 1, follows the encoded channels
            (latent-diffusion's ``scripts/inpaint.py``); with "sample" it is gray, and the mask, 0 or 1, precedes them.
        generator: of "sample".
        noise: of "sample", (B, C, h, w), in place of the generator.

    Returns:
        (B, c', h, w), float32, c' from `concat_channels`.

    Raises:
        ValueError: pictures have channels or a size that the first stage does not take.
    """
    pictures = pictures.float()
    if through is None:
        size = stage.latent_size(pictures.shape[2], pictures.shape[3])
        return functional.interpolate(pictures, size=size, mode="area")
    concat_channels(stage, pictures.shape[1], through)
    own = stage.pixel_channels
    image = pictures[:, :own] if pictures.shape[1] >= own else pictures.expand(-1, own, -1, -1)
    painted = pictures[:, own:] < 0  # (B, 1, H, W) with a mask, else (B, 0, H, W)
    if painted.shape[1]:  # files keep the colors under their transparent part
        image = torch.where(painted, -1.0 if through == "mode" else 0.0, image)
    encoded = stage.encode_condition(image) if through == "mode" else stage.encode(image, generator, noise=noise)
    if not painted.shape[1]:
        return encoded
    mask = functional.interpolate(painted.float(), size=encoded.shape[-2:], mode="nearest")
    return torch.cat([encoded, 2 * mask - 1] if through == "mode" else [mask, encoded], dim=1)

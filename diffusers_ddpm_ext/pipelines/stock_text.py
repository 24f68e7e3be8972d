"""Which models of latents with a text encoder stock Diffusers samples as we do.

``StableDiffusionPipeline`` takes a ``CLIPTextModel`` and an ``AutoencoderKL``; ``LDMTextToImagePipeline`` a
``LDMBertModel``, prompts of 77 tokens, and a first stage of 8x8 pixels per latent, which it has as constants.
"""

from __future__ import annotations

from typing import Any

from diffusers import UNet2DConditionModel

from diffusers_ddpm_ext.models.first_stage import FirstStage
from diffusers_ddpm_ext.models.fold_scale import reason_not_to_fold
from diffusers_ddpm_ext.models.text_encoder import TextEncoder
from diffusers_ddpm_ext.models.text_kinds import encoder_config
from diffusers_ddpm_ext.pipelines.pipeline_parts import PipelineParts
from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler
from diffusers_ddpm_ext.utils.wrappers import network_class, unwrap

STABLE_DIFFUSION, LDM_TEXT = "StableDiffusionPipeline", "LDMTextToImagePipeline"
LDM_TEXT_LENGTH, LDM_TEXT_FACTOR = 77, 8


def text_class(parts: PipelineParts) -> tuple[str, str]:
    """The stock class for a model with a text encoder, and why not, as one phrase; one of them is empty.

    Args:
        parts: with a text encoder.
    """
    network: Any = unwrap(parts.unet).config
    for is_wrong, reason in (
        (
            parts.config.get("conditioning_key") != "crossattn",
            f"conditioning_key {parts.config.get('conditioning_key')}",
        ),
        (bool(parts.config.get("id2label")), "names of classes"),
        (parts.has_other_encoders, "encoders of pictures"),
        (parts.tokenizer is None, "no tokenizer"),
        (parts.vae is None, "no first stage"),
        (network_class(parts.unet) is not UNet2DConditionModel, f"a {network_class(parts.unet).__name__}"),
        (not isinstance(network.sample_size, int), "its latents are not square"),
        (network.out_channels != network.in_channels, "a learned variance"),  # stock guides it, too
    ):
        if is_wrong:
            return "", reason
    if reason_not_to_fold(parts.vae):
        return "", reason_not_to_fold(parts.vae)
    stage, text = FirstStage(parts.vae), TextEncoder(parts.text_encoder, parts.tokenizer)
    name = network_class(parts.text_encoder).__name__
    if name == "CLIPTextModel" and stage.kind == "kl":
        return _stable_diffusion(parts, text)
    if name == "LDMBertModel" and stage.kind in ("kl", "vq"):
        if stage.factor != LDM_TEXT_FACTOR:
            return "", f"a first stage of factor {stage.factor} with LDMBertModel"
        if text.max_length != LDM_TEXT_LENGTH:
            return "", f"prompts of {text.max_length} tokens with LDMBertModel"
        return LDM_TEXT, ""
    return "", f"{name} with {network_class(parts.vae).__name__}"


def _stable_diffusion(parts: PipelineParts, text: TextEncoder) -> tuple[str, str]:
    config = parts.scheduler.config
    if getattr(encoder_config(text.encoder), "use_attention_mask", False):
        return "", "use_attention_mask in the text encoder's configuration"
    if config.get("clip_sample", False):  # the stock class switches it off
        return "", "clip_sample"
    if config.get("timestep_spacing", "leading") == "leading" and config.get("steps_offset", 1) != 1:
        return "", f"steps_offset {config['steps_offset']}"
    return STABLE_DIFFUSION, ""


def with_stock_offset(parts: PipelineParts) -> Any:
    """The scheduler, with ``steps_offset`` 1 where that makes the model one for ``StableDiffusionPipeline``.

    The stock class sets it for every scheduler, and so does CompVis' DDIM: the last of fewer steps than T is 1, not 0.

    Args:
        parts: with a text encoder.
    """
    scheduler = parts.scheduler
    if type(scheduler) is not DDPMExtScheduler or scheduler.config.steps_offset != 0:
        return scheduler
    moved = DDPMExtScheduler.from_config(scheduler.config, steps_offset=1)
    changed = PipelineParts(**vars(parts) | {"scheduler": moved})
    return moved if text_class(changed)[0] == STABLE_DIFFUSION and not text_class(parts)[0] else scheduler

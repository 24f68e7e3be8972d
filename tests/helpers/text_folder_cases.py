"""Pipelines with a text encoder whose folders stock Diffusers must open, and what is drawn from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

CASES = {
    "clip": ("StableDiffusionPipeline", "clip", "kl"),
    "clip_stats": ("StableDiffusionPipeline", "clip", "kl"),
    "clip_trailing": ("StableDiffusionPipeline", "clip", "kl"),
    "bert_kl": ("LDMTextToImagePipeline", "bert", "kl"),
    "bert_vq": ("LDMTextToImagePipeline", "bert", "vq"),
}
"""Stock class, and the kinds of text encoder and first stage."""
PROMPTS = ["a red cat", "blue dog!"]
STEPS = 3


def pictures_of(pipeline: Any) -> np.ndarray:
    """A picture of each prompt without guidance and with it, from the same noise of the global generator."""
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for scale in (1.0, 3.0):
        torch.manual_seed(11)
        images = pipeline(PROMPTS, num_inference_steps=STEPS, guidance_scale=scale, output_type="np").images
        pictures.append(images)
    return np.concatenate(pictures)

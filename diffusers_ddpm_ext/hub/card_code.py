"""The section of a model card with the code that loads the model, here and in stock Diffusers."""

from __future__ import annotations

import json
from collections.abc import Sequence

from diffusers_ddpm_ext.errors import printable

OURS = """## Load it

```python
import torch
from diffusers_ddpm_ext import DDPMExtPipeline

pipe = DDPMExtPipeline.from_pretrained("{repo_id}")
{call}
```"""
FOUR = "batch_size=4"
IMAGES = f"images = pipe({FOUR}, num_inference_steps=50, generator=torch.Generator().manual_seed(0)).images"
CONDITIONS = IMAGES.replace(FOUR, f"{FOUR}, ...")
LATENTS = """noise = torch.Generator().manual_seed(0)
latents = pipe(batch_size=4, num_inference_steps=50, generator=noise, output_type="latent").images"""
PROMPTS = """generator = torch.Generator().manual_seed(0)
images = pipe([{prompts}], num_inference_steps=50, guidance_scale=3, generator=generator).images"""
OTHER_SCHEDULER = """Any other sampler of Diffusers:

```python
import diffusers
from diffusers_ddpm_ext import DDPMExtPipeline

pipe = DDPMExtPipeline.from_pretrained("{repo_id}")
pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
images = pipe(batch_size=4, num_inference_steps=20).images
```"""
STOCK = """Without diffusers-ddpm-ext, in stock Diffusers:

```python
from diffusers import {stock}

pipe = {stock}.from_pretrained("{repo_id}")
images = pipe(batch_size=4, num_inference_steps=50).images
```"""


def images_code(repo_id: str, stock: str | None, num_classes: int = 0, arrays: str = "") -> str:
    """Of a model that draws images, unconditionally or by class.

    Args:
        repo_id: of the repository.
        stock: the class of stock Diffusers that samples it; None where none does.
        num_classes: number of its classes; 0 without them.
        arrays: shape and range of the arrays, where images are no pictures of 8 bits.
    """
    last = "Stock Diffusers cannot sample this model, and refuses it."
    if stock is not None:
        last = STOCK.format(repo_id=repo_id, stock=stock)
    ours = f"{OURS.format(repo_id=repo_id, call=IMAGES)}\n\n{OTHER_SCHEDULER.format(repo_id=repo_id)}"
    if num_classes:
        ours = ours.replace(FOUR, f"class_labels={[index % num_classes for index in range(4)]}")
    if arrays:
        ours = ours.replace(").images", f', output_type="array").images  # {arrays}')
        last = last.replace(").images", ', output_type="np").images  # all channels, in [0, 1]')
    return f"{ours}\n\n{last}"


def prompts_code(repo_id: str, stock: str | None, prompts: Sequence[str]) -> str:
    """Of a model that draws what a prompt says.

    Args:
        repo_id: of the repository.
        stock: the class of stock Diffusers that samples it; None where none does.
        prompts: examples.
    """
    texts = [json.dumps(printable(text, 100), ensure_ascii=False) for text in prompts]
    call = PROMPTS.format(prompts=", ".join(texts[:2]))
    last = "Stock Diffusers cannot sample this model, and refuses it."
    if stock is not None:
        last = STOCK.format(repo_id=repo_id, stock=stock).replace(FOUR, texts[0])
    return f"{OURS.format(repo_id=repo_id, call=call)}\n\n{last}"


def conditions_code(repo_id: str) -> str:
    """Of a model with other conditions than classes."""
    note = "This model needs conditions; see the arguments of the call."
    return f"{OURS.format(repo_id=repo_id, call=CONDITIONS)}\n\n{note}"


def latents_code(repo_id: str) -> str:
    """Of a model of latents without its first stage."""
    note = "Its samples are latents of an autoencoder that is not part of this repository."
    return f"{OURS.format(repo_id=repo_id, call=LATENTS)}\n\n{note}"

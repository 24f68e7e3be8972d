"""Images as the samples of a pipeline that is measured: themselves, or their latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.hub.card_facts import BITS_PER_LATENT
from diffusers_ddpm_ext.training.config.layers import read_config
from diffusers_ddpm_ext.training.data.image_set import ImageSet
from diffusers_ddpm_ext.training.data.latents import LatentEncoder, LatentSet, SampleSet
from diffusers_ddpm_ext.utils.files import CONFIG

MAX_HELD_BYTES = 2**30


@dataclass(frozen=True)
class EncodedOnce(LatentSet):
    """A `LatentSet` whose latents are encoded at their first use and then held in memory, up to 1 GiB."""

    held: dict[int, Tensor] = field(default_factory=dict)

    def samples(self, indices: Sequence[int] | Tensor) -> Tensor:
        """As `LatentSet.samples`, on the CPU."""
        numbers = torch.as_tensor(indices).tolist()
        found = {number: self.held[number] for number in numbers if number in self.held}
        missing = sorted({number for number in numbers if number not in found})
        if missing:
            made = super().samples(missing).cpu()
            found |= dict(zip(missing, made, strict=True))
            if len(self.held) * made[0].nbytes <= MAX_HELD_BYTES:
                self.held.update({number: found[number] for number in missing})
        return torch.stack([found[number] for number in numbers])


def as_samples(pipeline: Any, images: ImageSet, seed: int, folder: str) -> SampleSet:
    """Images as the samples of a pipeline.

    Args:
        pipeline: the loaded pipeline.
        images: of the size that it draws.
        seed: of the posterior's noise, where the run did not take its mode.
        folder: of the pipeline.

    Raises:
        ConfigError: the latents have another size than the pipeline's.
    """
    stage, through = pipeline.first_stage, pipeline.config.get("concat_through_vae")
    if stage is None:
        return images
    latents = EncodedOnce(images, LatentEncoder(stage, seed, _takes_mode(folder), through))
    size, expected = latents.shape[1:], pipeline.unet.config.sample_size
    if expected is not None and size != ((expected, expected) if isinstance(expected, int) else tuple(expected)):
        pixels, made = ("x".join(map(str, sides)) for sides in (images.size, size))
        raise ConfigError(
            f"{folder}: images of {pixels} pixels become latents of {made}, and its network draws {expected}: is the "
            "first stage that of the run? See --resolution"
        )
    return latents


def _takes_mode(folder: str) -> bool:
    """Whether the run of a folder trained on the posterior's mode (``--latent_mode``)."""
    file = Path(folder) / CONFIG
    return bool(read_config(str(file)).options.get("latent_mode")) if file.is_file() else False


def describe_first_stage(pipeline: Any) -> dict[str, Any]:
    """What a bound on latents depends on beside the network, for its JSON; empty for a model of pixels."""
    stage = pipeline.first_stage
    if stage is None:
        return {}
    return {
        "unit": BITS_PER_LATENT,
        "first_stage": {
            "class": type(stage.autoencoder).__name__,
            "sha256": stage.content_hash(),
            "scale": stage.scale.flatten().tolist(),
            "shift": stage.shift.flatten().tolist(),
        },
    }

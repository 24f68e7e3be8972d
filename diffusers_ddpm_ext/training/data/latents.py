"""Latents of a run's images: pixels, or stored posteriors, to what the network denoises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from diffusers_ddpm_ext.models.concat_condition import concat_channels, concat_condition
from diffusers_ddpm_ext.models.conditioning import Conditions
from diffusers_ddpm_ext.models.first_stage import FirstStage
from diffusers_ddpm_ext.training.data.batches import Batch
from diffusers_ddpm_ext.training.data.condition_dropout import ConditionDropout
from diffusers_ddpm_ext.training.data.image_set import ImageSet
from diffusers_ddpm_ext.training.data.posterior import Posterior, encode_posterior, one_by_one
from diffusers_ddpm_ext.utils import device_random
from diffusers_ddpm_ext.utils import random_keys as keys
from diffusers_ddpm_ext.utils.host_reads import reads_are_free
from diffusers_ddpm_ext.utils.vocabulary import ConcatThroughVae

KEPT_BYTES = 2**28
"""Latents of a validation set that are kept in memory."""


@dataclass
class LatentEncoder:
    """Turns images and concatenated pictures into what the network of a latent diffusion model gets.

    Attributes:
        stage: the first stage, on the run's device, with the scale of the run; replaced when that is measured.
        seed: of the run.
        mode: take the posterior's mode instead of a sample.
        concat_through_vae: how concatenated pictures are encoded; None: they are averaged to the latents' size.
        concat_dropout: dropout of concatenated pictures, which fills what the network gets, not the picture.
        measured_std: standard deviation of the scaled latents; None where it was not measured.
    """

    stage: FirstStage
    seed: int
    mode: bool = False
    concat_through_vae: ConcatThroughVae | None = None
    concat_dropout: ConditionDropout | None = None
    measured_std: float | None = None

    @cached_property
    def content_hash(self) -> str:
        """sha256 of what the first stage computes, without its scale."""
        return self.stage.content_hash()

    @property
    def device(self) -> torch.device:
        """Device of the first stage."""
        return next(self.stage.autoencoder.parameters()).device

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Channels, height and width of the latents of images of a size in pixels; ValueError if it does not fit."""
        return (self.stage.latent_channels, *self.stage.latent_size(height, width))

    def concat_channels(self, channels: int) -> int:
        """Channels that the network gets for concatenated pictures; ValueError if they cannot be encoded."""
        return concat_channels(self.stage, channels, self.concat_through_vae)

    def encode_batch(self, batch: Batch) -> Batch:
        """A training batch with scaled latents, (b, C, h, w), float32, instead of pixels, and encoded conditions.

        The noise of posteriors depends on seed, step and position in the effective batch alone.
        """
        posterior = batch.posterior
        if posterior is None:
            posterior = encode_posterior(self.stage, batch.pixels)
        shape = posterior.mean.shape[1:]
        noise = self._noise(batch, shape, keys.LATENT) if posterior.std is not None and not self.mode else None
        concat_noise: Sequence[Tensor | tuple[str | int, ...]]
        concat_noise = [(keys.LATENT_CONCAT, self.seed, batch.step, place) for place in batch.positions.tolist()]
        if self.concat_through_vae == "sample" and not reads_are_free(self.device):
            concat_noise = self._noise(batch, shape, keys.LATENT_CONCAT).split(1)
        conditions = self.encode_conditions(batch.conditions, concat_noise, batch.concat_is_encoded)
        if self.concat_dropout is not None:
            conditions = self.concat_dropout.apply(conditions, self.seed, batch.step, batch.positions)
        return replace(batch, pixels=self.scaled(posterior, noise), conditions=conditions)

    def _noise(self, batch: Batch, shape: Sequence[int], stream: str) -> Tensor:
        """Noise of a batch's posteriors, (b, *shape): drawn on the host where reading is free, else on the device."""
        if reads_are_free(self.device):
            return keys.sample_draws(self.seed, batch.step, batch.positions, shape, 1, stream)[1]
        positions = batch.positions.to(self.device, non_blocking=True)
        return device_random.normal_draws(self.seed, batch.step, positions, shape, stream)

    def scaled(self, posterior: Posterior, noise: Tensor | None) -> Tensor:
        """Scaled latents of posteriors with this noise, or their mode without it: (b, C, h, w), float32."""
        z = posterior.mean.to(self.device, non_blocking=True)
        if noise is not None and posterior.std is not None:
            z = z + posterior.std.to(self.device, non_blocking=True) * noise.to(self.device, non_blocking=True)
        return self.stage.normalize(z)

    def encode_conditions(
        self, conditions: Conditions, noise: Sequence[Tensor | tuple[str | int, ...]], is_encoded: bool = False
    ) -> Conditions:
        """Conditions on the run's device, with concatenated pictures as the network takes them.

        Args:
            conditions: of b samples.
            noise: of each picture, where pictures are sampled: its key, or the noise itself, (1, C, h, w).
            is_encoded: whether the pictures are stored ones, as the network takes them.
        """
        conditions = conditions.to(self.device)
        pictures = conditions.concat_inputs
        if pictures is None or is_encoded:
            return conditions
        way = self.concat_through_vae
        if way is None:
            return replace(conditions, concat_inputs=concat_condition(self.stage, pictures, None))

        def encode(picture: Tensor, own: Tensor | tuple[str | int, ...]) -> Tensor:
            if isinstance(own, Tensor):
                return concat_condition(self.stage, picture, way, noise=own)
            return concat_condition(self.stage, picture, way, keys.generator(*own))

        return replace(conditions, concat_inputs=torch.cat(one_by_one(encode, pictures, noise)))

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int = 16) -> Tensor:
        """Images of scaled latents, (N, C, H, W), float32, about [-1, 1], on the CPU; ``batch_size`` at a time."""
        parts = latents.split(batch_size)
        return torch.cat([self.stage.decode(part.to(self.device, torch.float32)).cpu() for part in parts])


@dataclass(frozen=True)
class LatentSet:
    """The latents of a set of images for validation, previews and measurements, in the order of the set.

    The noise of an image's posterior depends on the encoder's seed and the image alone: the same at every call, so
    that latents are kept once they are encoded, up to a limit.

    Attributes:
        images: the set.
        encoder: whose scale no longer changes.
        keeps_latents: whether latents are kept in memory.
    """

    images: ImageSet
    encoder: LatentEncoder
    keeps_latents: bool = False
    _kept: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        return self.encoder.shape(*self.images.size)

    def samples(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Scaled latents of center-cropped images without flips: (b, C, h, w), float32, on the encoder's device.

        Args:
            indices: which images of the set, (b,).
        """
        numbers = torch.as_tensor(indices).tolist()
        new = [number for number in dict.fromkeys(numbers) if number not in self._kept]
        latents = dict(zip(new, self._encoded(new).unbind() if new else (), strict=True))
        if self.keeps_latents and 4 * math.prod(self.shape) * (len(self._kept) + len(new)) <= KEPT_BYTES:
            self._kept.update(latents)
        return torch.stack([latents[number] if number in latents else self._kept[number] for number in numbers])

    def _encoded(self, indices: Sequence[int]) -> Tensor:
        encoder = self.encoder
        posterior = image_posterior(self.images, indices, encoder.stage, encoder.device)
        noise = None
        if posterior.std is not None and not encoder.mode:
            _, noise = keys.sample_draws(encoder.seed, 0, indices, posterior.mean.shape[1:], 1, keys.LATENT_SET)
        return encoder.scaled(posterior, noise)

    def conditions(self, indices: Sequence[int] | Tensor) -> Conditions:
        """What images are conditioned on, on the encoder's device.

        Args:
            indices: which images of the set, (b,).
        """
        is_encoded = self.images.concat_latents is not None
        noise_keys = [(keys.LATENT_CONCAT_SET, self.encoder.seed, n) for n in torch.as_tensor(indices).tolist()]
        return self.encoder.encode_conditions(self.images.conditions(indices), noise_keys, is_encoded)


def image_posterior(
    images: ImageSet, indices: Sequence[int] | Tensor, stage: FirstStage, device: torch.device
) -> Posterior:
    """Posteriors of center-cropped images without flips: stored ones, or encoded on a device, one by one."""
    if images.posteriors is not None:
        return images.load_posteriors(indices)
    return encode_posterior(stage, images.pixels(indices).to(device))


SampleSet = ImageSet | LatentSet
"""What a network is evaluated on: images, or their latents."""


def sample_set(images: ImageSet, encoder: LatentEncoder | None, keeps_latents: bool = False) -> SampleSet:
    """The samples that a network denoises for a set of images."""
    return images if encoder is None else LatentSet(images, encoder, keeps_latents)

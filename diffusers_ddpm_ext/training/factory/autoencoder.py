"""The first stage that a run trains: network and loss, built from the options of section ``autoencoder``.

Symbols, for one image x of N values, its reconstruction y and its latents z:

    d     |x - y| or (x - y)^2, the mean over the image
    p     perceptual distance of x and y
    kl    KL divergence of the posterior N(mean, std^2) of z from N(0, 1), in nats per image
    e     nearest codes of z

    kl:  loss = d + perceptual_weight p + kl_weight kl / N
    vq:  loss = d + perceptual_weight p + mean((e - z.detach())^2) + commitment_weight mean((z - e.detach())^2)

These are [LDM]'s losses without the discriminator, per value of the image: there the distances are sums over an image,
which changes no minimum. The commitment weight is on the term that [VQ] puts it on; the published code has it on the
other one.

Sources: [LDM] Rombach et al. 2022, appendix G and code; [VQ] van den Oord et al. 2017, eq. 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL, VQModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from diffusers_ddpm_ext.errors import ConfigError, as_config_error
from diffusers_ddpm_ext.losses.distances import Distance, PerceptualDistance, check_perceptual_channels, get_distance
from diffusers_ddpm_ext.models.conditioning import Conditioning
from diffusers_ddpm_ext.models.first_stage import FirstStage
from diffusers_ddpm_ext.models.first_stage_loading import load_first_stage
from diffusers_ddpm_ext.training.config.autoencoder_config import AutoencoderConfig
from diffusers_ddpm_ext.training.config.autoencoder_options import AutoencoderOptions
from diffusers_ddpm_ext.training.data.image_set import ImageSet
from diffusers_ddpm_ext.training.factory.denoiser import WEIGHTS_STREAM
from diffusers_ddpm_ext.utils import random_keys as keys

LEAST_SQUARED_ERROR = 1e-10
"""A reconstruction without an error has a PSNR of 106 dB, not infinity."""


@dataclass(frozen=True)
class ReconstructionOutput:
    """Losses of a batch.

    Attributes:
        loss: scalar to minimize.
        loss_simple: mean distance of images and reconstructions; detached, for logs.
        per_sample_loss: (B,), whose mean is ``loss``; part of the graph.
        terms: further scalars by name; detached, for logs.
    """

    loss: Tensor
    loss_simple: Tensor
    per_sample_loss: Tensor
    terms: dict[str, Tensor]

    def scalars(self) -> dict[str, Tensor]:
        """The scalars under their names in a run's metrics."""
        return {"loss": self.loss, "loss_simple": self.loss_simple} | self.terms


class AutoencoderTask(nn.Module):
    """Encodes images, decodes them and computes the loss, in float32 outside the network.

    Args:
        autoencoder: an AutoencoderKL or VQModel.
        options: weights of the loss.
        features: perceptual distance; None without one.
    """

    def __init__(
        self, autoencoder: AutoencoderKL | VQModel, options: AutoencoderOptions, features: Distance | None = None
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.options = options
        self.distance = get_distance(options.reconstruction_loss)
        self.features = features

    def forward(self, images: Tensor, noise: Tensor | None = None, t: Tensor | None = None) -> ReconstructionOutput:
        """The terms of the loss of a micro-batch.

        Args:
            images: (B, C, H, W), float32 in [-1, 1].
            noise: of the posterior, (B, c, h, w); None decodes the posterior's mean. Without effect on codes.
            t: ignored; the training loop passes a timestep to every task.
        """
        latents, penalty, terms = (self._codes if isinstance(self.autoencoder, VQModel) else self._posterior)(
            images, noise
        )
        decode: dict[str, Any] = {"force_not_quantize": True} if isinstance(self.autoencoder, VQModel) else {}
        reconstruction = self.autoencoder.decode(latents, **decode).sample
        with torch.autocast(images.device.type, enabled=False):
            reconstruction = reconstruction.float()
            distance = self.distance(reconstruction, images)
            loss = distance + penalty
            if self.features is not None:
                perceptual = self.features(reconstruction, images)
                loss = loss + self.options.perceptual_weight * perceptual
                terms["loss_perceptual"] = perceptual.detach().mean()
            terms["psnr"] = psnr(reconstruction.detach(), images).mean()
        return ReconstructionOutput(loss.mean(), distance.detach().mean(), loss, terms)

    def _posterior(self, images: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Latents of a KL autoencoder, the penalty of each image, (B,), and the terms."""
        parameters = self.autoencoder.encode(images).latent_dist.parameters
        with torch.autocast(images.device.type, enabled=False):
            posterior = DiagonalGaussianDistribution(parameters.float())
            kl = posterior.kl()
            latents = posterior.mean if noise is None else posterior.mean + posterior.std * noise
        return latents, self.options.kl_weight * kl / images[0].numel(), {"kl": kl.detach().mean()}

    def _codes(self, images: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The same of a VQ autoencoder: the latents are codes, and gradients pass them straight through."""
        latents = self.autoencoder.encode(images).latents
        with torch.autocast(images.device.type, enabled=False):
            latents, quantizer = latents.float(), self.autoencoder.quantize
            indices = quantizer(latents.detach())[2][2]
            b, _, h, w = latents.shape
            codes = quantizer.embedding(indices).reshape(b, h, w, -1).permute(0, 3, 1, 2)
            codebook = (codes - latents.detach()).square().mean((1, 2, 3))
            commitment = (latents - codes.detach()).square().mean((1, 2, 3))
            # Not `unique`, whose size the host would have to read.
            used = latents.new_zeros(len(quantizer.embedding.weight)).index_fill_(0, indices.flatten(), 1).sum()
        straight = latents + (codes - latents).detach()
        terms = {"loss_codebook": codebook.detach().mean(), "codes_per_batch": used}
        return straight, codebook + self.options.commitment_weight * commitment, terms


def psnr(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], after clipping: two (B, C, H, W) to (B,)."""
    error = (reconstruction.clamp(-1, 1) - images).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / error.clamp(min=LEAST_SQUARED_ERROR))


@dataclass(frozen=True)
class AutoencoderParts:
    """The first stage of a run, on the CPU in float32; see `Trainable`.

    Attributes:
        autoencoder: the network.
        options: section ``autoencoder``.
        features: perceptual distance; None without one.
    """

    autoencoder: AutoencoderKL | VQModel
    options: AutoencoderOptions
    features: Distance | None = None
    conditioning: Conditioning = field(default_factory=Conditioning)
    dropout: None = None
    sampler: None = None

    @property
    def network(self) -> AutoencoderKL | VQModel:
        """The network."""
        return self.autoencoder

    @property
    def weights(self) -> list[nn.Parameter]:
        """Those of the network."""
        return list(self.autoencoder.parameters())

    @property
    def logvar_parameters(self) -> list[nn.Parameter]:
        """None."""
        return []

    @property
    def num_train_timesteps(self) -> int:
        """1: there is no chain."""
        return 1

    def noise_shape(self, image_shape: Sequence[int]) -> Sequence[int]:
        """The shape of the latents; without channels for codes, which have no noise."""
        factor = self.options.compression
        channels = self.options.latent_channels if self.options.first_stage_type == "kl" else 0
        return channels, image_shape[1] // factor, image_shape[2] // factor

    @property
    def compiled_modules(self) -> list[nn.Module]:
        """Encoder and decoder, which are called on their own."""
        return [self.autoencoder.encoder, self.autoencoder.decoder]

    def enable_gradient_checkpointing(self) -> None:
        """Of the network."""
        self.autoencoder.enable_gradient_checkpointing()

    @property
    def train_metrics(self) -> list[str]:
        """Names of the metrics of each step."""
        return [f"train/{kind}" for kind in self.validation_kinds(with_bound=False)]

    def validation_kinds(self, with_bound: bool) -> list[str]:
        """PSNR, distance and the terms of the loss."""
        own = ["kl"] if self.options.first_stage_type == "kl" else ["loss_codebook", "codes_per_batch"]
        return ["psnr", "loss_simple", "loss", *own, *([] if self.features is None else ["loss_perceptual"])]

    def make_task(self) -> AutoencoderTask:
        """Network and loss in one module."""
        return AutoencoderTask(self.autoencoder, self.options, self.features)


def build_autoencoder_parts(config: AutoencoderConfig, images: ImageSet) -> AutoencoderParts:
    """Build and initialize the first stage of a run on these images.

    Without ``ckpt_path`` the initial weights depend on the seed alone, so they are equal on every process.

    Raises:
        ConfigError: an option cannot be satisfied; the message names it.
    """
    options = config.autoencoder
    with as_config_error():
        features = None
        if options.perceptual_model is not None:
            features = PerceptualDistance.from_pretrained(options.perceptual_model)
            check_perceptual_channels(images.shape[0])
    if options.ckpt_path is not None:
        return AutoencoderParts(_load_initial(options.ckpt_path), options, features)
    channels, height, width = images.shape
    widths = options.block_out_channels or ()
    arguments: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "block_out_channels": widths,
        "layers_per_block": options.layers_per_block,
        "latent_channels": options.latent_channels,
        "norm_num_groups": options.norm_num_groups,
        "sample_size": max(height, width),
        "scaling_factor": 1.0,
        "mid_block_add_attention": options.mid_block_attention,
    }
    with torch.random.fork_rng(devices=[]), as_config_error("--block_out_channels"):
        torch.manual_seed(keys.key(WEIGHTS_STREAM, config.loop.seed))
        if options.first_stage_type == "kl":
            return AutoencoderParts(AutoencoderKL(**arguments), options, features)
        return AutoencoderParts(VQModel(**arguments, num_vq_embeddings=options.num_vq_embeddings), options, features)


def _load_initial(path: str) -> AutoencoderKL | VQModel:
    """The autoencoder of ``ckpt_path``, to be trained: its scale is left out, since its latents will change."""
    try:
        stage = FirstStage(load_first_stage(path)).with_scale(1.0)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--ckpt_path: {' '.join(str(error).split())}") from None
    autoencoder: AutoencoderKL | VQModel = stage.autoencoder.requires_grad_(True)
    return autoencoder

"""First stages of latent diffusion: Diffusers' autoencoders with the scale of latents in their configuration.

Symbols of `latent_scale`: z are the autoencoder's latents, x those of the diffusion model, ``x = (z - m) / s``.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from diffusers_ddpm_ext.models.evaluation_mode import evaluation_mode
from diffusers_ddpm_ext.models.first_stage_loading import load_first_stage
from diffusers_ddpm_ext.models.latent_scale import (
    SCALE_KEYS,
    compression_factor,
    kind_of,
    latent_channels,
    latent_rule,
    per_channel_tensor,
)
from diffusers_ddpm_ext.models.plain_operations import PlainOperations
from diffusers_ddpm_ext.utils.checks import describe
from diffusers_ddpm_ext.utils.dtensor import full_tensor
from diffusers_ddpm_ext.utils.wrappers import network_class, plain_state_dict, unwrap

__all__ = ["FirstStage", "load_first_stage"]


class FirstStage:
    """An autoencoder between pixels and the latents of a diffusion model.

    It computes in float32 or more, outside autocast: an autoencoder in half precision is cast to float32, which is
    exact, and stays so. On a CPU it rounds as CompVis' autoencoders do (`PlainOperations`). Slicing and tiling are
    those of the autoencoder (``enable_tiling()``); that of an ``AutoencoderTiny`` only works with 3 channels, 4 latent
    channels and 8x8 pixels per latent, and is refused for others.

    Args:
        autoencoder: an ``AutoencoderKL``, ``VQModel``, ``AutoencoderTiny`` or ``AutoencoderDC``; wrappers such as
            ``torch.compile`` are taken off.

    Raises:
        ValueError: it is of another class, or its configuration has no valid scale: a ``scaling_factor`` that is not
            a positive number, a mean without a standard deviation, a shift beside a mean, or a wrong number of them.
    """

    def __init__(self, autoencoder: nn.Module) -> None:
        self.kind = kind_of(autoencoder)
        self.autoencoder: Any = unwrap(autoencoder)
        config: Any = self.autoencoder.config
        outputs = config.get("out_channels", config.in_channels)
        if outputs != config.in_channels:
            raise ValueError(
                f"The autoencoder has in_channels {config.in_channels} and out_channels {outputs}; a first stage must "
                "return as many channels as it takes."
            )
        latent_rule(self.autoencoder)

    # ------------------------------------------------------------------ what it is

    @property
    def is_stochastic(self) -> bool:
        """Whether encoding draws from a posterior: `AutoencoderKL`."""
        return self.kind == "kl"

    @property
    def pixel_channels(self) -> int:
        """Channels of the pictures."""
        return int(self.autoencoder.config.in_channels)

    @property
    def latent_channels(self) -> int:
        """Channels C of the latents."""
        return latent_channels(self.autoencoder)

    @cached_property
    def factor(self) -> int:
        """Pixels per latent, along the height as along the width; see `compression_factor`."""
        return compression_factor(self.autoencoder)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the latents of an image.

        Args:
            height: in pixels.
            width: in pixels.

        Raises:
            ValueError: the compression factor does not divide them.
        """
        f = self.factor
        if min(height, width) < 1 or height % f or width % f:
            near = sorted({max(f, side // f * f + step) for side in (height, width) for step in (0, f)})
            raise ValueError(
                f"The size is {height}x{width} pixels; this first stage makes one latent of {f}x{f} pixels, so both "
                f"sides must be multiples of {f}, e.g. {', '.join(map(str, near))}."
            )
        return height // f, width // f

    # ------------------------------------------------------------------ the scale

    @property
    def shift(self) -> Tensor:
        """m of the rule: (1, C, 1, 1) or (1, 1, 1, 1), float32, on the CPU."""
        return per_channel_tensor(latent_rule(self.autoencoder)[0])

    @property
    def scale(self) -> Tensor:
        """s of the rule: (1, C, 1, 1) or (1, 1, 1, 1), float32, on the CPU."""
        return per_channel_tensor([1 / factor for factor in latent_rule(self.autoencoder)[1]])

    def normalize(self, z: Tensor) -> Tensor:
        """Latents of the autoencoder as those of the diffusion model, ``(z - m) / s``: same shape."""
        mean, factors = latent_rule(self.autoencoder)
        factor = per_channel_tensor(factors).to(z.device, non_blocking=True)
        return (z - per_channel_tensor(mean).to(z.device, non_blocking=True)) * factor if any(mean) else z * factor

    def denormalize(self, x: Tensor) -> Tensor:
        """Latents of the diffusion model as those of the autoencoder, ``s x + m``: same shape."""
        return x * self.scale.to(x.device) + self.shift.to(x.device)

    def with_scale(
        self,
        scale_factor: float | None,
        mean: Sequence[float] | Tensor | None = None,
        std: Sequence[float] | Tensor | None = None,
    ) -> FirstStage:
        """The same autoencoder with another scale in its configuration: ``x = (z - mean) * scale_factor / std``.

        The shift, mean and standard deviation of the old configuration do not remain. The weights are shared, the
        configuration of this one's autoencoder is not changed.

        Args:
            scale_factor: positive. None: 1 with ``mean`` and ``std``; without them the old scale, explicitly written.
            mean: (C,), or None for 0.
            std: (C,), positive, or None for 1.

        Returns:
            The new first stage.

        Raises:
            ValueError: see the class.
        """
        autoencoder = copy.copy(self.autoencoder)
        config = autoencoder.config
        if scale_factor is None and mean is None and std is None:
            new = {"scaling_factor": config.get("scaling_factor", 1.0)}
        else:
            new = {"scaling_factor": 1.0 if scale_factor is None else scale_factor}
            for name, values in (("latents_mean", mean), ("latents_std", std)):
                if values is not None or name in config:
                    new[name] = None if values is None else torch.as_tensor(values, dtype=torch.float64).tolist()
            if "shift_factor" in config:
                new["shift_factor"] = 0.0 if self.kind == "tiny" else None  # the class' own default
        autoencoder.register_to_config(**new)
        return FirstStage(autoencoder)

    # ------------------------------------------------------------------ encoding and decoding

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the encoder says about images, in the autoencoder's own scale.

        Args:
            pixels: (B, C, H, W), floating, in [-1, 1].

        Returns:
            Mean and standard deviation of the posterior (KL); otherwise the latents and None. Each (B, C, h, w),
            float32. Latents of a VQ model are those before quantization.

        Raises:
            ValueError: the pixels have another shape or type, or a size that the factor does not divide.
        """
        self._check_images("pixels", pixels, self.pixel_channels)
        self.latent_size(pixels.shape[2], pixels.shape[3])
        self._check_tiling()
        self.to_float32()
        pixels = pixels.to(self._dtype)
        with self._exact(pixels):
            output = self.autoencoder.encode(pixels)
        if self.is_stochastic:
            return output.latent_dist.mean, output.latent_dist.std
        return (output.latent if self.kind == "dc" else output.latents), None

    @torch.no_grad()
    def encode(
        self,
        pixels: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        mode: bool = False,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Images as latents of the diffusion model.

        Args:
            pixels: (B, C, H, W), floating, in [-1, 1].
            generator: of the posterior's noise, of which an image takes as many numbers as it has latents; the global
                one without it. Only a KL autoencoder draws.
            mode: take the posterior's mean instead of a draw.
            noise: the posterior's noise itself, standard normal, (B, C, h, w), in place of a generator.

        Returns:
            (B, C, h, w), float32.

        Raises:
            ValueError: as `posterior`.
        """
        mean, std = self.posterior(pixels)
        if std is not None and not mode:
            if noise is None:
                noise = randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
            mean = mean + std * noise
        return self.normalize(mean)

    def encode_condition(self, pixels: Tensor) -> Tensor:
        """A picture as CompVis' models take it as a condition: not scaled, and the posterior's mean.

        Args:
            pixels: (B, C, H, W), floating, in [-1, 1].

        Returns:
            (B, C, h, w), float32; of a VQ model before quantization.
        """
        return self.posterior(pixels)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents of the diffusion model as images; gradients flow to the latents where these are enabled.

        Args:
            latents: (B, C, h, w), floating. A VQ model quantizes them, after the scale is undone.

        Returns:
            (B, C, H, W), float32, in about [-1, 1], not clipped.

        Raises:
            ValueError: the latents have another shape or type.
        """
        self._check_images("latents", latents, self.latent_channels)
        self._check_tiling()
        self.to_float32()
        with self._exact(latents):
            pixels: Tensor = self.autoencoder.decode(self.denormalize(latents.to(self._dtype))).sample
        return pixels

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(torch.float32, self.autoencoder.dtype)

    def to_float32(self) -> None:
        """Cast an autoencoder in half precision to float32, in place."""
        if self.autoencoder.dtype != self._dtype:
            self.autoencoder.to(self._dtype)

    @contextmanager
    def _exact(self, tensor: Tensor) -> Iterator[None]:
        """Evaluation mode, without autocast, and on a CPU with CompVis' operations."""
        autocast = torch.autocast(tensor.device.type, enabled=False)
        with autocast, evaluation_mode(self.autoencoder), PlainOperations():
            yield

    def _check_tiling(self) -> None:
        is_tiled = self.kind == "tiny" and self.autoencoder.use_tiling
        if is_tiled and (self.pixel_channels, self.latent_channels, self.factor) != (3, 4, 8):
            raise ValueError(
                "Tiling of an AutoencoderTiny is for 3 channels, 4 latent channels and 8x8 pixels per latent;"
                f" this one has {self.pixel_channels}, {self.latent_channels} and {self.factor}x{self.factor}: call "
                "disable_tiling(), and enable_slicing() to save memory."
            )

    def _check_images(self, name: str, images: Any, channels: int) -> None:
        shape = tuple(getattr(images, "shape", ()))
        if not isinstance(images, Tensor) or len(shape) != 4 or shape[1] != channels:
            what = f"shape {shape}" if isinstance(images, Tensor) else describe(images)
            raise ValueError(f"{name}: {what}; this first stage takes a tensor (B, {channels}, height, width).")
        if not images.is_floating_point():
            raise ValueError(f"{name} has type {images.dtype}; it must be floating, with pixels in [-1, 1].")

    # ------------------------------------------------------------------ identity

    def content_hash(self) -> str:
        """sha256 (hex) of what the autoencoder computes: class, configuration without the scale, and weights.

        Weights in half precision count as their float32 values.
        """
        config = {
            key: value
            for key, value in self.autoencoder.config.items()
            if not key.startswith("_") and key not in SCALE_KEYS
        }
        content = hashlib.sha256(f"{network_class(self.autoencoder).__name__}\n".encode())
        content.update(json.dumps(config, sort_keys=True, default=str).encode())
        for name, tensor in sorted(plain_state_dict(self.autoencoder).items()):
            tensor = full_tensor(tensor.detach()).cpu()
            tensor = tensor.float() if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
            content.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            content.update(tensor.contiguous().numpy().tobytes())
        return content.hexdigest()

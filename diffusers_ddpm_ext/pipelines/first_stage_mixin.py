"""The first stage of a `DDPMExtPipeline`: its slot, encoding and decoding, and the pictures of a call."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffusers_ddpm_ext.diffusion.arguments import check_generators
from diffusers_ddpm_ext.models.conditioning import Conditioning
from diffusers_ddpm_ext.models.first_stage import FirstStage
from diffusers_ddpm_ext.models.latent_scale import latent_rule
from diffusers_ddpm_ext.pipelines.call_arguments import check_finite_samples
from diffusers_ddpm_ext.pipelines.condition_encoders import FLOAT32_COMPONENTS
from diffusers_ddpm_ext.pipelines.pipeline_attributes import PipelineAttributes
from diffusers_ddpm_ext.utils.checks import check_one_of
from diffusers_ddpm_ext.utils.pixel_format import PixelFormat
from diffusers_ddpm_ext.utils.vocabulary import CONCAT_THROUGH_VAE
from diffusers_ddpm_ext.utils.wrappers import unwrap

PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class FirstStageMixin(PipelineAttributes, DiffusionPipeline):
    """What a pipeline does with its first stage, the component ``vae``."""

    @property
    def first_stage(self) -> FirstStage | None:
        """The first stage around ``vae``; None for a pipeline without one.

        Raises:
            ValueError: the configuration of ``vae`` was changed to one that has no valid scale.
        """
        vae = self.__dict__.get("vae")
        if vae is None:
            return None
        stage: FirstStage | None = self.__dict__.get("_first_stage")
        if stage is None or stage.autoencoder is not unwrap(vae):
            stage = FirstStage(vae)
            self.__dict__["_first_stage"] = stage
        return stage

    @property
    def picture_channels(self) -> int:
        """Channels of an image, decoded if there is a first stage."""
        stage = self.first_stage
        return self.channels if stage is None else stage.pixel_channels

    @property
    def pixel_format(self) -> PixelFormat:
        """Dtype and range of the training data; that of 8-bit images where nothing else was recorded.

        Assigned, it is saved with the pipeline. ``pipeline.pixel_format.from_model(x)`` maps [-1, 1] to the data.
        """
        content = self.config.get("pixel_format")
        return PixelFormat() if content is None else PixelFormat.from_dict(content)

    @pixel_format.setter
    def pixel_format(self, pixels: PixelFormat | Mapping[str, Any] | None) -> None:
        pixels = PixelFormat() if pixels is None else pixels
        pixels = pixels if isinstance(pixels, PixelFormat) else PixelFormat.from_dict(pixels)
        if not self.is_latent:  # whose images nobody knows
            pixels.check_channels(self.picture_channels)
        content = None if pixels == PixelFormat() else pixels.to_dict()
        if content is not None or self.config.get("pixel_format") is not None:
            self.register_to_config(pixel_format=content)

    def encode_images(
        self, pixels: Tensor, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> Tensor:
        """Images as latents of the diffusion model.

        Args:
            pixels: (B, C, H, W), floating, in [-1, 1].
            generator: of the posterior's noise (`AutoencoderKL` only), one or one per image; the global one without.

        Returns:
            (B, c, h, w), float32, on the pipeline's device: what ``output_type="latent"`` returns.

        Raises:
            ValueError: the pipeline has no first stage, or the images do not fit it.
        """
        stage = self._required_first_stage("encode_images")
        if isinstance(pixels, Tensor) and pixels.ndim == 4:
            check_generators(generator, len(pixels))
            pixels = pixels.to(self._execution_device)
        return stage.encode(pixels, generator)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents of the diffusion model as images.

        Args:
            latents: (B, c, h, w), floating, as ``output_type="latent"``, ``intermediates`` and ``pred_x0`` hold them.

        Returns:
            (B, C, H, W), float32, in about [-1, 1], not clipped.

        Raises:
            ValueError: the pipeline has no first stage, or the latents do not fit it.
        """
        stage = self._required_first_stage("decode_latents")
        return stage.decode(latents.to(self._execution_device) if isinstance(latents, Tensor) else latents)

    def enable_vae_slicing(self) -> None:
        """Decode and encode one image at a time, which takes less memory; see the autoencoder's ``enable_slicing``."""
        self._required_first_stage("enable_vae_slicing").autoencoder.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Undo `enable_vae_slicing`."""
        self._required_first_stage("disable_vae_slicing").autoencoder.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decode and encode large images in overlapping tiles; see the autoencoder's ``enable_tiling``."""
        self._required_first_stage("enable_vae_tiling").autoencoder.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Undo `enable_vae_tiling`."""
        self._required_first_stage("disable_vae_tiling").autoencoder.disable_tiling()

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Diffusers' method; what computes in float32 is cast to it first, since it cannot be later."""
        for stage in (self.first_stage, self.text_encoder_stage):
            if stage is not None:
                stage.to_float32()
        for name in ("image_encoder", "concat_encoder"):
            if self.__dict__.get(name) is not None:
                self.__dict__[name].float()
        super().enable_sequential_cpu_offload(*args, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Diffusers' method; a dtype is that of the network: first stage and encoders keep theirs, in float32."""
        dtype = kwargs.get("dtype") or next((value for value in args if isinstance(value, torch.dtype)), None)
        kept = [name for name in FLOAT32_COMPONENTS if self.__dict__.get(name) is not None]
        if dtype is None or not kept:
            return super().to(*args, **kwargs)
        without = copy.copy(self)
        without.__dict__.update(dict.fromkeys(kept))
        DiffusionPipeline.to(without, *args, **kwargs)
        device = kwargs.get("device") or next((value for value in args if not isinstance(value, torch.dtype)), None)
        return self if device is None else super().to(device)

    def _required_first_stage(self, method: str) -> FirstStage:
        stage = self.first_stage
        if stage is None:
            way = "; pass vae= to the pipeline" if self.is_latent else ": its samples are images"
            raise ValueError(f"{method} needs a first stage, and this pipeline has none{way}.")
        return stage

    def _assign_first_stage(self, vae: Any) -> None:
        """Check and record what ``vae`` becomes; the attribute itself is set afterwards.

        Raises:
            ValueError: it is no first stage, makes latents that the network does not take or of another scale than
                the model was trained with, or the model's scale cannot be recorded without it.
        """
        if "vae" not in self.__dict__:  # in the constructor, which assigns it again
            return
        factor = self.config.get("latent_scaling_factor")
        if vae is None:
            old = self.first_stage
            self.register_to_config(vae=(None, None))
            if old is not None:
                self.register_to_config(latent_scaling_factor=single_factor(old))
            return
        stage = FirstStage(vae)
        if stage.latent_channels != self.channels:
            raise ValueError(
                f"vae has latents of {stage.latent_channels} channels, but the network denoises {self.channels}; they "
                "are of different models."
            )
        check_same_scale(factor, vae)
        # Diffusers would keep the entry of a component that was None.
        self.register_to_config(vae=("diffusers", type(stage.autoencoder).__name__))
        if factor is not None:
            self.register_to_config(latent_scaling_factor=None)

    def _check_pictures(self, output_type: str | None) -> None:
        """Raise ValueError for PIL images or values of the data that the samples cannot be."""
        if output_type not in ("pil", "array"):
            return
        if self.is_latent:
            raise ValueError(
                f'output_type is "{output_type}", but the samples of this model are latents of an autoencoder, not '
                "images, and the pipeline has no first stage to decode them. Pass it as vae=, or use "
                'output_type="latent" and decode them yourself.'
            )
        channels = self.picture_channels
        if output_type == "pil" and channels not in PIL_MODES:
            known = ", ".join(f"{count} ({mode})" for count, mode in PIL_MODES.items())
            raise ValueError(
                f'output_type is "pil", but the images have {channels} channels; PIL images have {known}. '
                'Use output_type="np" or "pt" for [0, 1], "array" for the values of the data.'
            )

    def _as_images(self, sample: Tensor, output_type: str | None) -> Any:
        """Samples as a call returns them."""
        if output_type == "latent":
            return sample
        if self.first_stage is not None:
            sample = self.decode_latents(sample)
            check_finite_samples(sample, "the decoded images")
        if output_type == "array":
            return self.pixel_format.from_model(sample.permute(0, 2, 3, 1).cpu().float().numpy())
        images = sample if self.is_latent else (sample / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array: np.ndarray = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array


def single_factor(stage: FirstStage) -> float:
    """The scale of a first stage as one ``latent_scaling_factor``.

    Raises:
        ValueError: it has a shift, or another scale for each channel.
    """
    shift, factors = latent_rule(stage.autoencoder)
    if any(shift) or len(set(factors)) > 1:
        raise ValueError(
            "vae is None, but the latents of this model have a shift or a scale per channel, which only their first "
            'stage holds. Keep it: output_type="latent" does not decode.'
        )
    return factors[0]


def check_same_scale(latent_scaling_factor: Any, vae: Any) -> None:
    """Raise ValueError if a model was trained with latents of another scale than a first stage makes."""
    if latent_scaling_factor is None or vae is None:
        return
    shift, factors = latent_rule(FirstStage(vae).autoencoder)
    if any(shift) or not all(math.isclose(factor, latent_scaling_factor, rel_tol=1e-6) for factor in factors):
        raise ValueError(
            f"latent_scaling_factor is {latent_scaling_factor}, but the configuration of vae has another scale: pass "
            f"FirstStage(vae).with_scale({latent_scaling_factor}).autoencoder as vae, or leave "
            "latent_scaling_factor out."
        )


def check_concat_through_vae(value: Any, conditioning: Conditioning, latent_scaling_factor: Any, vae: Any) -> None:
    """Raise ValueError unless it is None, or a known word for a model of latents with concatenated inputs."""
    if value is None:
        return
    check_one_of("concat_through_vae", value, CONCAT_THROUGH_VAE)
    if "concat_inputs" not in conditioning.required:
        raise ValueError(
            f"concat_through_vae is {value!r}, but conditioning_key {conditioning.conditioning_key} has no "
            "concatenated inputs; leave it out."
        )
    if vae is None and latent_scaling_factor is None:
        raise ValueError(
            f"concat_through_vae is {value!r}, but the samples of this model are images; pass vae=, or leave it out."
        )

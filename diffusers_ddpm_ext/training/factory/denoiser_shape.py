"""Inputs and outputs of a run's network: sizes, channels and conditions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffusers_ddpm_ext.diffusion.reverse_step import LEARNED_VARIANCES
from diffusers_ddpm_ext.errors import ConfigError, as_config_error
from diffusers_ddpm_ext.models.conditioning import COORDINATE_CHANNELS, Conditioning, Conditions
from diffusers_ddpm_ext.training.config.options import ModelOptions
from diffusers_ddpm_ext.training.data.image_set import ImageSet
from diffusers_ddpm_ext.training.data.latents import LatentEncoder, sample_set
from diffusers_ddpm_ext.utils.vocabulary import REQUIRED_CONDITIONS


@dataclass(frozen=True)
class DenoiserShape:
    """Shapes of a network's inputs and outputs.

    Attributes:
        size: height and width of the samples: images, or latents.
        channels: channels of the samples.
        conditioning: how conditions reach the network.
        concat_channels: channels of the images that are concatenated to the input.
        num_classes: number of classes, a null class included; None where labels are not integers.
        label_width: width of labels that are vectors.
        context_shape: tokens and width of the embeddings.
        learned_variance: ``learned`` or ``learned_range`` where the network also predicts its variance.
        factor: pixels per latent, along each side; None for images.
        token_source: the option that the embeddings are from.
    """

    size: tuple[int, int]
    channels: int
    conditioning: Conditioning
    concat_channels: int = 0
    num_classes: int | None = None
    label_width: int | None = None
    context_shape: tuple[int, int] | None = None
    learned_variance: str | None = None
    factor: int | None = None
    token_source: str = "--context_column"

    @property
    def out_channels(self) -> int:
        """Output channels: twice those of the images with a learned variance."""
        return self.channels * (1 if self.learned_variance is None else 2)

    @property
    def option(self) -> str:
        """The option that sets the samples' channels."""
        return "--channels" if self.factor is None else "--vae"

    @property
    def in_channels(self) -> int:
        """Input channels."""
        return self.channels + self.concat_channels + COORDINATE_CHANNELS * self.conditioning.use_positional_encodings

    def needs(self, condition: str) -> bool:
        """Whether the network is conditioned on this, however the condition is made."""
        return condition in REQUIRED_CONDITIONS[self.conditioning.conditioning_key]

    @property
    def class_tokens(self) -> int | None:
        """Number of classes that become tokens of cross attention; None where none do."""
        return self.num_classes if self.conditioning.embeds_classes else None

    def zeros(self) -> tuple[torch.Tensor, Conditions]:
        """A batch of one image of zeros and its conditions, for a trial forward pass."""
        labels = None
        if "class_labels" in self.conditioning.required:
            width = self.label_width
            labels = torch.zeros(1, dtype=torch.long) if width is None else torch.zeros(1, width)
        concat = torch.zeros(1, self.concat_channels, *self.size) if self.concat_channels else None
        context = None if self.context_shape is None else torch.zeros(1, *self.context_shape)
        return torch.zeros(1, self.channels, *self.size), Conditions(labels, concat, context)


def denoiser_shape(
    options: ModelOptions,
    conditioning: Conditioning,
    images: ImageSet,
    null_class: int | None,
    variance_type: str,
    latents: LatentEncoder | None = None,
) -> DenoiserShape:
    """The shape of a run's network for its conditions, training images, null class (if any) and variance type.

    Raises:
        ConfigError: ``num_class_embeds`` is smaller than the number of classes; labels that are vectors where classes
            become tokens; concatenated pictures that the first stage does not take.
    """
    (channels, *size), columns = sample_set(images, latents).shape, images.columns
    factor = None if latents is None else latents.stage.factor
    variance = variance_type if variance_type in LEARNED_VARIANCES else None
    if columns is None:
        return DenoiserShape((size[0], size[1]), channels, conditioning, learned_variance=variance, factor=factor)
    classes = len(columns.class_names) or None
    if classes is not None:
        least = max(classes, 0 if null_class is None else null_class + 1)
        classes = least if options.num_class_embeds is None else options.num_class_embeds
        if classes < least:
            raise ConfigError(f"--num_class_embeds {classes} is too few: the data and the null class need {least}")
    if conditioning.embeds_classes and classes is None:
        raise ConfigError(
            f"--conditioning_key {options.conditioning_key}: only classes become tokens, the labels are vectors; use"
            " --context_column for embeddings, or --conditioning_key adm"
        )
    contexts = columns.contexts
    concat = 0 if columns.concat is None else columns.concat.channels
    if latents is not None and concat:
        with as_config_error("--concat_column"):
            concat = latents.concat_channels(concat)
    return DenoiserShape(
        size=(size[0], size[1]),
        channels=channels,
        conditioning=conditioning,
        concat_channels=concat,
        num_classes=classes,
        label_width=columns.label_width,
        context_shape=None if contexts is None else (contexts[0].shape[0], contexts[0].shape[1]),
        learned_variance=variance,
        factor=factor,
    )

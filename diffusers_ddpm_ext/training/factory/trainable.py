"""What the training loop needs of the model that a run trains, whether it denoises or encodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

from diffusers_ddpm_ext.diffusion.timesteps import TimestepSampler
from diffusers_ddpm_ext.models.conditioning import Conditioning
from diffusers_ddpm_ext.training.data.condition_dropout import ConditionDropout


class Trainable(Protocol):
    """A network and its loss, on the CPU in float32 and without wrappers, as built from the options."""

    @property
    def network(self) -> Any:
        """The Diffusers model that is averaged, clipped and saved."""

    @property
    def weights(self) -> list[nn.Parameter]:
        """Parameters that share a learning rate and are clipped together: the network's, and those trained with it."""

    @property
    def logvar_parameters(self) -> list[nn.Parameter]:
        """Parameters of learned log-variances, with a learning rate of their own; empty without."""

    @property
    def num_train_timesteps(self) -> int:
        """Length T of the chain; 1 where nothing is noised step by step."""

    def noise_shape(self, image_shape: Sequence[int]) -> Sequence[int]:
        """Channels, height and width of the noise of an image of that shape."""

    @property
    def conditioning(self) -> Conditioning:
        """How conditions reach the network."""

    @property
    def sampler(self) -> TimestepSampler | None:
        """Of the timesteps of a batch; None samples uniformly."""

    @property
    def dropout(self) -> ConditionDropout | None:
        """Random dropout of conditions during training."""

    @property
    def compiled_modules(self) -> list[nn.Module]:
        """The modules that ``torch_compile`` compiles, in place."""

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass, of everything that is trained.

        Raises:
            ValueError: a network cannot do that.
        """

    @property
    def train_metrics(self) -> list[str]:
        """Names of the metrics of each step."""

    def validation_kinds(self, with_bound: bool) -> list[str]:
        """Metrics of a validation without ``val/`` and ``_ema``; the first is monitored by default."""

    def make_task(self) -> nn.Module:
        """The module that Accelerate prepares, called with images, noise and timesteps."""

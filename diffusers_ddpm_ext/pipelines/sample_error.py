"""How far the samples of a few steps are from those of many steps, from the same noise: what `fit_steps` minimizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusers_ddpm_ext.diffusion.respacing import spaced_timesteps
from diffusers_ddpm_ext.utils.random_keys import FIT_STEPS, generator


class SampleError:
    """Root mean square distance of a pipeline's samples to those of many steps, in the units of its samples.

    Its scheduler must draw no noise on the way, so that a sample follows from its starting noise.

    Args:
        pipeline: with the scheduler to sample with.
        count: number N of trajectories; i starts from the noise of a random key of ``seed`` and i.
        seed: of the starting noise.
        reference_steps: of the many steps, evenly spaced from the last step of training on.
        batch_size: trajectories at a time.
        arguments: of the pipeline's call for some of the trajectories by number: conditions, guidance.
        on_step: called after each step of each batch.

    Raises:
        ValueError: the pipeline refuses the arguments, or its scheduler draws noise.
    """

    def __init__(
        self,
        pipeline: Any,
        count: int,
        seed: int = 0,
        reference_steps: int = 200,
        batch_size: int = 64,
        arguments: Callable[[Sequence[int]], Mapping[str, Any]] = lambda indices: {},
        on_step: Callable[[], Any] = lambda: None,
    ) -> None:
        self._pipeline, self._arguments, self._on_step = pipeline, arguments, on_step
        self._batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
        size = pipeline.unet.config.sample_size
        shape = (pipeline.channels, *(size if isinstance(size, (list, tuple)) else (size, size)))
        self._noise = [
            torch.stack([torch.randn(shape, generator=generator(FIT_STEPS, seed, i)) for i in batch])
            for batch in self._batches
        ]
        total = len(pipeline.trained_scheduler)
        self._check_deterministic([total - 1, total // 2] if total > 1 else [0])
        self._reference = self._samples(spaced_timesteps(reference_steps, total, "trailing").tolist())

    def __call__(self, timesteps: Sequence[int]) -> float:
        """The error of descending timesteps."""
        pairs = zip(self._samples(timesteps), self._reference, strict=True)
        squares = torch.stack([(few - many).double().square().sum() for few, many in pairs])
        return float((squares.sum() / sum(noise.numel() for noise in self._noise)).sqrt())

    def _samples(self, timesteps: Sequence[int]) -> list[Tensor]:
        return [self._draw(batch, noise, timesteps) for batch, noise in zip(self._batches, self._noise, strict=True)]

    def _draw(self, batch: Sequence[int], noise: Tensor, timesteps: Sequence[int], seed: int = 0) -> Tensor:
        def on_step_end(*_: Any) -> dict[str, Any]:
            self._on_step()
            return {}

        samples: Tensor = self._pipeline(
            batch_size=len(batch),
            generator=torch.Generator().manual_seed(seed),
            latents=noise,
            timesteps=list(timesteps),
            output_type="latent",
            callback_on_step_end=on_step_end,
            **self._arguments(batch),
        ).images
        return samples.float()

    def _check_deterministic(self, timesteps: Sequence[int]) -> None:
        batch, noise = self._batches[0][:1], self._noise[0][:1]
        first, second = (self._draw(batch, noise, timesteps, seed) for seed in (0, 1))
        if not torch.equal(first, second):
            raise ValueError(
                f"{type(self._pipeline.scheduler).__name__} draws noise at its steps, so that its samples do not "
                "follow from their starting noise alone: use a deterministic one, such as DDIMScheduler or "
                "DPMSolverMultistepScheduler."
            )

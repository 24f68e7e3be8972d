"""The pictures that a run makes of itself: samples, and CompVis' ``log_images`` rows.

All randomness comes from the stream ``preview`` with keys of its own, so that asking for more pictures changes no
weight. Image i starts from the same noise at every step of training: one can watch it become an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from diffusers_ddpm_ext.errors import Interrupted
from diffusers_ddpm_ext.pipelines.pipeline_ddpm_ext import DDPMExtPipeline, DDPMExtPipelineOutput
from diffusers_ddpm_ext.plotting.sheets import save_grid
from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler
from diffusers_ddpm_ext.training.data.image_set import ImageSet
from diffusers_ddpm_ext.utils import random_keys as keys

COLUMNS = 10  # about so many pictures a row, whatever the number of steps
NUM_INPUTS = 8
NUM_ROWS = 4


@dataclass(frozen=True)
class Preview:
    """Draws the pictures of one run.

    Attributes:
        folder: where they go.
        seed: the run's seed.
        num_images: images of a grid of samples.
        num_inference_steps: sampling steps; None, or more than there are, takes all.
        batch_size: images drawn at a time.
        log_every_t: rows show every so many steps; None gives them about ten columns.
        stopped: whether to break off; then nothing is drawn, and Interrupted raised.
        joined: how conditions reach the network: arguments of the pipeline.
        conditions: arguments of the pipeline's call for some of the images; none by default.
        guidance_scale: of the samples.
    """

    folder: Path
    seed: int
    num_images: int = 16
    num_inference_steps: int | None = None
    batch_size: int = 16
    log_every_t: int | None = None
    stopped: Callable[[], bool] = lambda: False
    joined: Mapping[str, Any] = field(default_factory=dict)
    conditions: Callable[[range], dict[str, Any]] = lambda images: {}
    guidance_scale: float = 1.0

    def draw_data(self, images: ImageSet, scheduler: DDPMExtScheduler) -> tuple[Path, Path]:
        """Draw ``inputs.png``, some images, and ``diffusion_row.png``, a few of them as noise covers them.

        Args:
            images: the images that the run trains on.
            scheduler: the chain.

        Returns:
            The two files.
        """
        # Evenly from the whole set: in a folder of folders, the first ones would all be of one kind.
        chosen = images.pixels(torch.linspace(0, len(images) - 1, min(NUM_INPUTS, len(images))).long())
        rows = diffusion_rows(chosen[:NUM_ROWS], scheduler, self.seed, self.log_every_t)
        return (
            save_grid(chosen, self.folder / "inputs.png", columns=NUM_INPUTS),
            save_grid(rows.flatten(0, 1), self.folder / "diffusion_row.png", columns=rows.shape[1]),
        )

    def draw_samples(self, denoiser: UNet2DModel, scheduler: DDPMExtScheduler, step: int) -> tuple[Path, Path]:
        """Draw ``samples-<step>.png`` and ``denoise_row-<step>.png``: how the first samples came out of the noise.

        Args:
            denoiser: the network, with the weights to sample from. It comes back in the mode it had.
            scheduler: the chain. Its own timesteps stay what they were.
            step: optimizer steps done.

        Returns:
            The two files.
        """
        samples, rows = self.sample(denoiser, scheduler)
        return (
            save_grid(samples, self.folder / f"samples-{step}.png"),
            save_grid(rows.flatten(0, 1), self.folder / f"denoise_row-{step}.png", columns=rows.shape[1]),
        )

    def _look_up(self, *_: Any) -> dict[str, Any]:
        if self.stopped():
            raise Interrupted
        return {}

    def sample(self, denoiser: UNet2DModel, scheduler: DDPMExtScheduler) -> tuple[Tensor, Tensor]:
        """Draw the images of a grid.

        Args:
            denoiser: the network.
            scheduler: the chain.

        Returns:
            Samples (N, C, H, W), and the way of the first ones (rows, columns, C, H, W), x_T first; data units, on the
            CPU.
        """
        pipeline = DDPMExtPipeline(denoiser, DDPMExtScheduler.from_config(scheduler.config), **self.joined)
        pipeline.set_progress_bar_config(disable=True)
        chain = int(scheduler.config.num_train_timesteps)
        steps = min(self.num_inference_steps or chain, chain)
        training = denoiser.training
        denoiser.eval()
        samples: list[Tensor] = []
        rows = torch.empty(0)
        try:
            for start in range(0, self.num_images, self.batch_size):
                some = range(start, min(start + self.batch_size, self.num_images))
                output = pipeline(
                    len(some),
                    generator=[keys.generator(keys.PREVIEW, self.seed, "samples", image) for image in some],
                    num_inference_steps=steps,
                    output_type="latent",
                    log_every_t=(self.log_every_t or every(steps)) if start == 0 else None,
                    callback_on_step_end=self._look_up,
                    guidance_scale=self.guidance_scale,
                    **self.conditions(some),
                )
                assert isinstance(output, DDPMExtPipelineOutput)
                samples.append(output.images.float().cpu())
                if output.intermediates is not None:
                    rows = torch.stack([state[:NUM_ROWS].float().cpu() for state in output.intermediates], dim=1)
        finally:
            denoiser.train(training)
        return torch.cat(samples), rows


def every(steps: int) -> int:
    """Return how many steps lie between two pictures of a row, so that it has about ten."""
    return max(1, math.ceil(steps / COLUMNS))


def diffusion_rows(x0: Tensor, scheduler: DDPMExtScheduler, seed: int, log_every_t: int | None = None) -> Tensor:
    """Noise images to the steps 0, n, 2 n, ... and T - 1, with fresh noise each time (CompVis' ``diffusion_row``).

    Args:
        x0: images (N, C, H, W), data units.
        scheduler: the chain of T steps.
        seed: the run's seed.
        log_every_t: n; None gives about ten columns.

    Returns:
        (N, columns, C, H, W), data units.
    """
    chain = int(scheduler.config.num_train_timesteps)
    between = log_every_t or every(chain)
    steps = [t for t in range(chain) if t % between == 0 or t == chain - 1]
    columns = []
    for t in steps:
        draw = keys.generator(keys.PREVIEW, seed, "diffusion_row", t)
        noise = torch.empty(x0.shape).normal_(generator=draw)
        columns.append(scheduler.q_sample(x0, torch.full((len(x0),), t), noise))
    return torch.stack(columns, dim=1)

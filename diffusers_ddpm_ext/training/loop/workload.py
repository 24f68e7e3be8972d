"""What differs between a run that trains a diffusion model and one that trains a first stage; the loop is the same."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Protocol

from diffusers_ddpm_ext.training.evaluation.processes import Processes
from diffusers_ddpm_ext.training.factory.parts import Parts
from diffusers_ddpm_ext.training.loop.captions import describe_text_encoder
from diffusers_ddpm_ext.training.loop.export import ExportedNetworks, export_parts, save_pipeline
from diffusers_ddpm_ext.training.loop.latents import describe_first_stage
from diffusers_ddpm_ext.training.loop.previews import FINAL_SAMPLES, draw_data, draw_final, draw_samples
from diffusers_ddpm_ext.training.loop.reconstruction import (
    FINAL_RECONSTRUCTIONS,
    describe_autoencoder,
    draw_inputs,
    draw_last,
    draw_reconstructions,
    export_autoencoder,
    reconstruction_metrics,
    save_autoencoder,
)
from diffusers_ddpm_ext.training.loop.run import Run
from diffusers_ddpm_ext.training.loop.sample_metrics import draw_scores
from diffusers_ddpm_ext.training.loop.setup import Setup
from diffusers_ddpm_ext.training.loop.validation import validation_metrics
from diffusers_ddpm_ext.training.tracking.plan import describe_loss, describe_schedule
from diffusers_ddpm_ext.utils.files import METRICS

SAMPLE_FLAGS = {"concat_inputs": "--concat DIR", "encoder_hidden_states": "--encoder_hidden_states FILE.npy"}
"""What `ddpm-ext sample` needs for a condition of the network."""


class Workload(Protocol):
    """Validation, images and files of one kind of model.

    Attributes:
        data_images: images that `draw_data` draws, by name.
        final_images: those that `draw_final` draws besides the samples.
    """

    data_images: tuple[str, ...]
    final_images: tuple[str, ...]

    def validation_metrics(self, setup: Setup, processes: Processes) -> dict[str, float]:
        """The validation metrics by name, empty without validation images. Collective call."""

    def draw_data(self, run: Run) -> None:
        """Draw images of the data, before the first step."""

    def draw_samples(self, run: Run) -> None:
        """Draw the images of a step. Collective call; it changes no weight."""

    def draw_final(self, run: Run) -> None:
        """Draw the images of the last step, and the curves. Collective call."""

    def sample_images(self, step: int) -> tuple[str, ...]:
        """Names of the images of a step."""

    def export(self, setup: Setup) -> ExportedNetworks | None:
        """The networks to save, in the main process. Collective call."""

    def save(self, setup: Setup, folder: Path, networks: ExportedNetworks, warn: bool) -> None:
        """Save the model into a folder; an OSError where it cannot be written. ``warn``: of what cannot load it."""

    def describe(self, setup: Setup) -> list[tuple[str, str]]:
        """Rows of the printed plan."""

    def describe_end(self, setup: Setup, folder: Path) -> str:
        """The last line of a run: where its results are, and what to do with them."""


class Diffusion:
    """The workload of a run that trains a diffusion model; see `Workload`."""

    data_images: tuple[str, ...] = ("inputs", "diffusion_row")
    final_images: tuple[str, ...] = ("loss", "logvar")

    def validation_metrics(self, setup: Setup, processes: Processes) -> dict[str, float]:
        """Losses, and optionally the bound."""
        return validation_metrics(setup, processes)

    def draw_data(self, run: Run) -> None:
        """Draw images, and the diffusion of some of them."""
        draw_data(run)

    def draw_samples(self, run: Run) -> None:
        """Sample images."""
        draw_samples(run)

    def draw_final(self, run: Run) -> None:
        """Sample images, and draw the curves of loss, log-variances and metrics of samples."""
        draw_final(run)
        if run.setup.accelerator.is_main_process:
            draw_scores(run)

    def sample_images(self, step: int) -> tuple[str, ...]:
        """The samples, and the denoising of some of them."""
        return f"samples-{step}", f"denoise_row-{step}"

    def export(self, setup: Setup) -> ExportedNetworks | None:
        """The network with raw and averaged weights, and the log-variances."""
        return export_parts(setup.parts, setup.ema)

    def save(self, setup: Setup, folder: Path, networks: ExportedNetworks, warn: bool) -> None:
        """Save a pipeline."""
        pipeline = save_pipeline(folder, networks, setup.parts.scheduler, setup.pipeline_kwargs)
        if warn:
            pipeline.warn_if_stock_fails()

    def describe(self, setup: Setup) -> list[tuple[str, str]]:
        """First stage, text encoder, noise schedule and loss."""
        config = setup.config
        loss = describe_loss(config.objective, setup.parts.objective.loss_weighting)
        return [
            *describe_first_stage(setup),
            *describe_text_encoder(setup),
            ("schedule", describe_schedule(config.schedule)),
            ("loss", loss),
        ]

    def describe_end(self, setup: Setup, folder: Path) -> str:
        """The command that samples, with the conditions that it requires."""
        prompt = {} if setup.captions is None else {"encoder_hidden_states": "--prompt TEXT"}
        flags = [flag for name, flag in (SAMPLE_FLAGS | prompt).items() if name in setup.parts.conditioning.required]
        return (
            f"The pipeline, its samples ({FINAL_SAMPLES}) and its metrics ({METRICS}) are in {folder}; "
            f"draw from it: {' '.join(['ddpm-ext sample', shlex.quote(str(folder)), *flags])}"
        )


class Reconstruction:
    """The workload of a run that trains a first stage; see `Workload`."""

    data_images: tuple[str, ...] = ("inputs",)
    final_images: tuple[str, ...] = ("loss",)

    def validation_metrics(self, setup: Setup, processes: Processes) -> dict[str, float]:
        """PSNR and losses."""
        return reconstruction_metrics(setup, processes)

    def draw_data(self, run: Run) -> None:
        """Draw some images."""
        draw_inputs(run)

    def draw_samples(self, run: Run) -> None:
        """Draw images above their reconstructions."""
        draw_reconstructions(run)

    def draw_final(self, run: Run) -> None:
        """Draw images above their reconstructions, and the curve of the loss."""
        draw_last(run)

    def sample_images(self, step: int) -> tuple[str, ...]:
        """The reconstructions."""
        return (f"reconstructions-{step}",)

    def export(self, setup: Setup) -> ExportedNetworks | None:
        """The first stage with raw and averaged weights."""
        return export_autoencoder(setup)

    def save(self, setup: Setup, folder: Path, networks: ExportedNetworks, warn: bool) -> None:
        """Save the first stage, which stock Diffusers loads."""
        save_autoencoder(setup, folder, networks)

    def describe(self, setup: Setup) -> list[tuple[str, str]]:
        """Latents and loss."""
        return describe_autoencoder(setup)

    def describe_end(self, setup: Setup, folder: Path) -> str:
        """The command that trains in its latents."""
        return (
            f"The first stage, its reconstructions ({FINAL_RECONSTRUCTIONS}) and its metrics ({METRICS}) are in"
            f" {folder}; "
            f"train in its latents: ddpm-ext train --vae {shlex.quote(str(folder))}"
        )


def workload_of(setup: Setup) -> Workload:
    """The workload of a run."""
    return Diffusion() if isinstance(setup.trained, Parts) else Reconstruction()

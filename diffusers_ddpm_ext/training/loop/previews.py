"""Preview images of a run: training images, their diffusion, samples during training, and the final plots.

All randomness comes from separate keys of the stream ``preview``, so that drawing more images changes no weight. Image
i starts from the same noise at every training step, so that one can follow how it changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from diffusers_ddpm_ext.errors import Interrupted, warn
from diffusers_ddpm_ext.pipelines.pipeline_ddpm_ext import DDPMExtPipeline, DDPMExtPipelineOutput
from diffusers_ddpm_ext.plotting.curves import RUN_LOSSES, plot_logvar, plot_run_losses
from diffusers_ddpm_ext.plotting.row_timesteps import column_interval, diffusion_timesteps
from diffusers_ddpm_ext.plotting.sheets import save_grid
from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler
from diffusers_ddpm_ext.training.data.image_set import ImageSet
from diffusers_ddpm_ext.training.data.latents import LatentEncoder, sample_set
from diffusers_ddpm_ext.training.evaluation.logvar_distance import logvar_warning
from diffusers_ddpm_ext.training.evaluation.validation_loss import log_loss_per_step
from diffusers_ddpm_ext.training.loop.export import ExportedNetworks, export_parts, gather_logvar
from diffusers_ddpm_ext.training.loop.run import Run
from diffusers_ddpm_ext.training.loop.setup import Setup
from diffusers_ddpm_ext.utils import random_keys as keys
from diffusers_ddpm_ext.utils.files import METRICS, write_atomically
from diffusers_ddpm_ext.utils.pixel_format import PixelFormat
from diffusers_ddpm_ext.utils.run_metrics import read_metrics

IMAGE_FOLDER = "samples"
FINAL_SAMPLES = "samples.png"
NUM_INPUTS = 8
NUM_ROWS = 4
DRAWS_PER_STEP = 32
"""Draws for the log loss of each timestep, if the run was long enough."""
TRAINING_IMAGES_PER_DRAW = 6
"""The log loss uses at most one draw per so many training images (which had a backward pass, too)."""
MIN_DRAWS = 100


@dataclass(frozen=True)
class Preview:
    """Draws images of a run.

    Attributes:
        folder: of the images.
        seed: of the run.
        num_images: images of a grid of samples.
        num_inference_steps: sampling steps; None, or more than the chain has, uses all.
        batch_size: images per forward pass.
        stop_requested: whether to stop sampling and raise Interrupted.
        pipeline_kwargs: how conditions reach the network: arguments of the pipeline.
        conditions: arguments of the pipeline's call for some of the images; none by default.
        guidance_scale: of the samples.
        class_names: drawn under the samples, as prompts are; by number, empty where classes have none.
        latents: decodes samples that are latents; None for those of a pixel model.
        pixels: of the images; says which channels are shown.
    """

    folder: Path
    seed: int
    num_images: int = 16
    num_inference_steps: int | None = None
    batch_size: int = 16
    stop_requested: Callable[[], bool] = lambda: False
    pipeline_kwargs: Mapping[str, Any] = field(default_factory=dict)
    conditions: Callable[[range], dict[str, Any]] = lambda images: {}
    guidance_scale: float = 1.0
    class_names: Mapping[int, str] = field(default_factory=dict)
    latents: LatentEncoder | None = None
    pixels: PixelFormat | None = None

    def draw_data(self, images: ImageSet, scheduler: DDPMExtScheduler) -> tuple[Path, Path]:
        """Draw ``inputs.png``, some images, and ``diffusion_row.png``, the diffusion of a few of them."""
        # Evenly spaced: the first images of a folder of folders would all be of one class.
        chosen = torch.linspace(0, len(images) - 1, min(NUM_INPUTS, len(images))).long()
        x0 = sample_set(images, self.latents).samples(chosen[:NUM_ROWS]).cpu()
        rows = self._decoded(diffusion_rows(x0, scheduler, self.seed))
        return (
            self._save(images.pixels(chosen), "inputs.png", columns=NUM_INPUTS),
            self._save(rows.flatten(0, 1), "diffusion_row.png", columns=rows.shape[1]),
        )

    def draw_samples(
        self, denoiser: UNet2DModel, scheduler: DDPMExtScheduler, step: int, class_embedder: Tensor | None = None
    ) -> tuple[Path, Path]:
        """Draw ``samples-<step>.png`` and ``denoise_row-<step>.png``, the denoising of the first samples.

        The mode of the network and the timesteps of the scheduler stay as they are.
        """
        samples, rows = self.sample(denoiser, scheduler, class_embedder)
        return (
            self._save(samples, f"samples-{step}.png", captions=self._captions()),
            self._save(rows.flatten(0, 1), f"denoise_row-{step}.png", columns=rows.shape[1]),
        )

    def _save(self, images: Tensor, name: str, **options: Any) -> Path:
        return save_grid(images, self.folder / name, pixels=self.pixels, **options)

    def _decoded(self, samples: Tensor) -> Tensor:
        """Images of samples, (..., C, H, W) on the CPU: of a pixel model they are the samples."""
        if self.latents is None or not samples.numel():
            return samples
        images = self.latents.decode(samples.flatten(0, -4), self.batch_size)
        return images.unflatten(0, samples.shape[:-3])

    def _captions(self) -> list[str] | None:
        """Prompts of the samples, or names of their classes; None where there are none."""
        conditions = self.conditions(range(self.num_images))
        labels = conditions.get("class_labels") if self.class_names else None
        prompts: list[str] | None = conditions.get("prompt")
        return prompts if labels is None else [self.class_names[int(label)] for label in labels]

    def _check_stop(self, *_: Any) -> dict[str, Any]:
        if self.stop_requested():
            raise Interrupted
        return {}

    def sample(
        self, denoiser: UNet2DModel, scheduler: DDPMExtScheduler, class_embedder: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sample the images of a grid; ``class_embedder`` has the tokens of classes where the network takes tokens.

        Returns samples (N, C, H, W), and the denoising of the first ones (rows, columns, C, H, W), x_T first; pixels
        in [-1, 1], on the CPU.
        """
        pipeline = DDPMExtPipeline(denoiser, DDPMExtScheduler.from_config(scheduler.config), **self.pipeline_kwargs)
        pipeline.class_embedder = class_embedder
        pipeline.set_progress_bar_config(disable=True)
        chain = int(scheduler.config.num_train_timesteps)
        steps = min(self.num_inference_steps or chain, chain)
        training = denoiser.training
        denoiser.eval()
        samples: list[Tensor] = []
        rows = torch.empty(0)
        try:
            for start in range(0, self.num_images, self.batch_size):
                images = range(start, min(start + self.batch_size, self.num_images))
                output = pipeline(
                    len(images),
                    generator=[keys.generator(keys.PREVIEW, self.seed, "samples", image) for image in images],
                    num_inference_steps=steps,
                    output_type="latent",
                    log_every_t=column_interval(steps) if start == 0 else None,
                    callback_on_step_end=self._check_stop,
                    guidance_scale=self.guidance_scale,
                    **self.conditions(images),
                )
                assert isinstance(output, DDPMExtPipelineOutput)
                samples.append(output.images.float().cpu())
                if output.intermediates is not None:
                    rows = torch.stack([state[:NUM_ROWS].float().cpu() for state in output.intermediates], dim=1)
        finally:
            denoiser.train(training)
        return self._decoded(torch.cat(samples)), self._decoded(rows)


def diffusion_rows(x0: Tensor, scheduler: DDPMExtScheduler, seed: int, log_every_t: int | None = None) -> Tensor:
    """Noise images to the steps 0, n, 2 n, ... and T - 1, with new noise each time (CompVis' ``diffusion_row``).

    ``x0`` is (N, C, H, W), the result (N, columns, C, H, W), both in data units. ``log_every_t`` is n; None gives
    about ten columns.
    """
    chain = int(scheduler.config.num_train_timesteps)
    columns = []
    for t in diffusion_timesteps(chain, log_every_t):
        draw = keys.generator(keys.PREVIEW, seed, "diffusion_row", t)
        noise = torch.empty(x0.shape).normal_(generator=draw)
        columns.append(scheduler.q_sample(x0, torch.full((len(x0),), t), noise))
    return torch.stack(columns, dim=1)


def make_preview(run: Run) -> Preview:
    """The preview with the options of a run."""
    setup, output = run.setup, run.setup.config.output
    return Preview(
        run.folder / IMAGE_FOLDER,
        setup.seed,
        output.num_preview_images,
        output.ddpm_num_inference_steps,
        setup.config.validation.eval_batch_size,
        stop_requested=lambda: bool(run.signals.stopped_by),
        pipeline_kwargs=setup.pipeline_kwargs,
        conditions=lambda images: preview_conditions(setup, images),
        guidance_scale=output.preview_guidance_scale,
        class_names=setup.parts.class_names,
        latents=setup.latents,
        pixels=setup.pixel_format,
    )


def preview_conditions(setup: Setup, images: range) -> dict[str, Any]:
    """Arguments of the pipeline's call for preview images: classes, or prompts, in turn; what held-out images have."""
    data = setup.data.validation if setup.data.validation is not None else setup.data.train
    samples = setup.samples(data)
    chosen = samples.conditions([image % len(data) for image in images]).to(setup.accelerator.device)
    conditions: dict[str, Any] = chosen.as_dict()
    if conditions.pop("captions", None) is not None:
        conditions["prompt"] = preview_prompts(setup, images)
    if setup.parts.num_classes is not None and "class_labels" in conditions:
        conditions["class_labels"] = torch.tensor([image % setup.parts.num_classes for image in images])
    return conditions


def preview_prompts(setup: Setup, images: range) -> list[str]:
    """Prompts of preview images, in turn: those of the options, or captions of the images that conditions are of."""
    prompts = setup.config.text.preview_prompts
    if prompts is not None:
        return [prompts[image % len(prompts)] for image in images]
    assert setup.captions is not None
    assert setup.captions.table is not None
    data = setup.data.validation if setup.data.validation is not None else setup.data.train
    numbers = data.conditions([image % len(data) for image in images]).captions
    return setup.captions.table.texts([] if numbers is None else numbers.tolist())


def draw_data(run: Run) -> None:
    """Draw ``inputs.png`` and ``diffusion_row.png``, before the first step."""
    if run.setup.accelerator.is_main_process:
        make_preview(run).draw_data(run.setup.data.train, run.setup.parts.scheduler)


def draw_samples(run: Run) -> None:
    """Draw ``samples-<step>.png`` and ``denoise_row-<step>.png``. Collective call; it changes no weight."""
    networks = sampling_networks(run.setup)
    try:
        if networks is not None:
            draw_grid(run, networks)
    finally:
        run.setup.accelerator.wait_for_everyone()


def draw_final(run: Run) -> None:
    """Draw the last grid of samples, also as ``samples.png``, and the curves. Collective call."""
    draw_logvar(run)  # first, since it is evaluated in all processes
    networks = sampling_networks(run.setup)
    try:
        if networks is not None:
            metrics = read_metrics(run.folder / METRICS, [name for name, _, _ in RUN_LOSSES])
            plot_run_losses(
                metrics.curves, run.folder / IMAGE_FOLDER / "loss.png", run.setup.config.objective.loss_type
            )
            draw_final_samples(run, networks)
    finally:
        run.setup.accelerator.wait_for_everyone()


def sampling_networks(setup: Setup) -> ExportedNetworks | None:
    """What the saved pipeline samples with, its network on the run's device; None outside the main process."""
    networks = export_parts(setup.parts, setup.ema)
    if networks is not None:
        networks.default.to(setup.accelerator.device)
    return networks


def draw_grid(run: Run, networks: ExportedNetworks) -> Path:
    """Draw the samples of the present step; return the file."""
    scheduler, step = run.setup.parts.scheduler, run.progress.step
    preview = make_preview(run)
    preview = replace(preview, pipeline_kwargs=networks.pipeline_kwargs(preview.pipeline_kwargs))
    samples, _ = preview.draw_samples(networks.default, scheduler, step, networks.class_embedder)
    return samples


def draw_final_samples(run: Run, networks: ExportedNetworks) -> None:
    """Draw the last grid of samples, and copy it to the top of the run's folder."""
    samples = draw_grid(run, networks)
    write_atomically(run.folder / FINAL_SAMPLES, lambda file: file.write(samples.read_bytes()))


def draw_logvar(run: Run) -> None:
    """Draw ``logvar.png``: the learned log-variances, and the log loss of the raw weights that they estimate.

    A large distance of the two is a warning.
    """
    setup = run.setup
    if not setup.learns_logvar:
        return
    chain = setup.num_train_timesteps
    budget = max(MIN_DRAWS, setup.plan.steps * setup.plan.effective_batch // TRAINING_IMAGES_PER_DRAW)
    stride = -(-chain // budget)
    log_loss = log_loss_per_step(
        setup.accelerator.unwrap_model(setup.task),
        setup.samples(setup.data.train),
        setup.seed,
        torch.arange(0, chain, stride).repeat(max(1, min(DRAWS_PER_STEP, budget // chain))),
        setup.config.validation.eval_batch_size,
        run.processes,
    )
    logvar = gather_logvar(setup.parts.objective)
    if logvar is not None and setup.accelerator.is_main_process:
        table = logvar.double().cpu().numpy()
        warning = logvar_warning(table, log_loss, setup.config.objective.logvar_learning_rate)
        if warning is not None:
            warn(warning)
        plot_logvar(run.folder / IMAGE_FOLDER / "logvar.png", table, log_loss)

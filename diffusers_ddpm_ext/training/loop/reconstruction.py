"""Validation, images and files of a run that trains a first stage."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor

from diffusers_ddpm_ext.errors import Interrupted, RunError, printable
from diffusers_ddpm_ext.models.ema_metadata import save_ema_metadata
from diffusers_ddpm_ext.models.first_stage import FirstStage
from diffusers_ddpm_ext.plotting.curves import RUN_LOSSES, plot_run_losses
from diffusers_ddpm_ext.plotting.sheets import save_grid
from diffusers_ddpm_ext.training.data.image_set import ImageSet
from diffusers_ddpm_ext.training.data.latent_scale import IMAGES_FOR_SCALE, measure_latents
from diffusers_ddpm_ext.training.data.latents import LatentEncoder
from diffusers_ddpm_ext.training.evaluation.processes import Processes
from diffusers_ddpm_ext.training.evaluation.validation_loss import evenly_spaced
from diffusers_ddpm_ext.training.loop.export import ExportedNetworks, export_networks
from diffusers_ddpm_ext.training.loop.previews import IMAGE_FOLDER, NUM_INPUTS
from diffusers_ddpm_ext.training.loop.run import Run
from diffusers_ddpm_ext.training.loop.setup import Setup
from diffusers_ddpm_ext.utils.dtensor import reshard
from diffusers_ddpm_ext.utils.files import METRICS, os_errors, write_atomically
from diffusers_ddpm_ext.utils.generations import replace_pipeline
from diffusers_ddpm_ext.utils.run_metrics import read_metrics

FINAL_RECONSTRUCTIONS = "reconstructions.png"


def reconstruction_metrics(setup: Setup, processes: Processes) -> dict[str, float]:
    """The validation metrics by name: means over images that are encoded as the mean of their posterior.

    Empty without validation images. Collective call: every process must make it.
    """
    if setup.data.validation is None:
        return {}
    metrics = {f"val/{name}": value for name, value in _means(setup, setup.data.validation, processes).items()}
    if setup.ema is not None:
        with setup.ema.scope(setup.trained.network):
            means = _means(setup, setup.data.validation, processes)
        metrics |= {f"val/{name}_ema": value for name, value in means.items()}
    return metrics


@torch.no_grad()
def _means(setup: Setup, images: ImageSet, processes: Processes) -> dict[str, float]:
    """Means of the task's scalars over images, whose batches are the same for any number of processes."""
    options, names = setup.config.validation, setup.trained.validation_kinds(with_bound=False)
    batches = evenly_spaced(len(images), options.validation_max_images).split(options.eval_batch_size)
    task = setup.accelerator.unwrap_model(setup.task)
    training = task.training
    task.eval()
    table = torch.zeros(len(batches), len(names), dtype=torch.float64)
    for index, is_own in processes.batches(len(batches)):
        scalars = task(images.pixels(batches[index]).to(processes.device)).scalars()
        if is_own:
            means = torch.stack([scalars[name] for name in names]).double().cpu()
            table[index] = means * len(batches[index])
    task.train(training)
    reshard(task)  # FSDP reshards in the backward pass, which does not follow here
    total = processes.sum_over_ranks(table.to(processes.device)).cpu().sum(0) / sum(map(len, batches))
    return dict(zip(names, total.tolist(), strict=True))


def draw_inputs(run: Run) -> None:
    """Draw ``inputs.png``, some images, before the first step."""
    images = run.setup.data.train
    if run.setup.accelerator.is_main_process:
        path, chosen = run.folder / IMAGE_FOLDER / "inputs.png", images.pixels(_spread(images, NUM_INPUTS))
        save_grid(chosen, path, columns=NUM_INPUTS, pixels=run.setup.pixel_format)


def draw_reconstructions(run: Run) -> None:
    """Draw ``reconstructions-<step>.png``: held-out images above their reconstructions. Collective call."""
    try:
        network = export_autoencoder(run.setup)
        if network is not None:
            _draw(run, network.default.to(run.setup.accelerator.device))
    finally:
        run.setup.accelerator.wait_for_everyone()


def draw_last(run: Run) -> None:
    """Draw the last reconstructions, also as ``reconstructions.png``, and the losses. Collective call."""
    draw_reconstructions(run)
    if run.setup.accelerator.is_main_process:
        metrics = read_metrics(run.folder / METRICS, [name for name, _, _ in RUN_LOSSES])
        loss = run.setup.autoencoder.options.reconstruction_loss
        plot_run_losses(metrics.curves, run.folder / IMAGE_FOLDER / "loss.png", loss)
        last = (run.folder / IMAGE_FOLDER / f"reconstructions-{run.progress.step}.png").read_bytes()
        write_atomically(run.folder / FINAL_RECONSTRUCTIONS, lambda file: file.write(last))


def _spread(images: ImageSet, count: int) -> Tensor:
    """Indices of at most ``count`` images, evenly spaced: the first ones of a folder would all be of one class."""
    return torch.linspace(0, len(images) - 1, min(count, len(images))).long()


@torch.no_grad()
def _draw(run: Run, network: AutoencoderKL | VQModel) -> None:
    setup = run.setup
    images = setup.data.validation if setup.data.validation is not None else setup.data.train
    stage, rows = FirstStage(network), []
    for indices in _spread(images, setup.config.output.num_preview_images).split(NUM_INPUTS):
        if run.signals.stopped_by:
            raise Interrupted
        pixels = images.pixels(indices)
        decoded = stage.decode(stage.encode(pixels.to(setup.accelerator.device), mode=True)).cpu()
        blank = pixels.new_ones(NUM_INPUTS - len(indices), *images.shape)
        rows += [torch.cat([pixels, blank]), torch.cat([decoded, blank])]
    path = run.folder / IMAGE_FOLDER / f"reconstructions-{run.progress.step}.png"
    save_grid(torch.cat(rows), path, columns=NUM_INPUTS, pixels=setup.pixel_format)


def describe_autoencoder(setup: Setup) -> list[tuple[str, str]]:
    """Rows of the printed plan: the latents, and the loss."""
    options = setup.autoencoder.options
    size = "x".join(map(str, setup.trained.noise_shape(setup.data.train.shape)[1:]))
    kind = "AutoencoderKL" if options.first_stage_type == "kl" else f"VQModel of {options.num_vq_embeddings:,} codes"
    loss: str = options.reconstruction_loss
    if options.first_stage_type == "kl":
        loss += f", {options.kl_weight:g} x KL"
    if options.perceptual_model is not None:
        loss += f", {options.perceptual_weight:g} x perceptual distance ({options.perceptual_model})"
    rows = [("latents", f"{size}, {options.latent_channels} channels, {kind}"), ("loss", loss)]
    return rows if options.ckpt_path is None else [("starts from", printable(options.ckpt_path, 200)), *rows]


def export_autoencoder(setup: Setup) -> ExportedNetworks | None:
    """The first stage with raw and averaged weights, in the main process. Collective call."""
    return export_networks(setup.trained.network, setup.ema, None)


@torch.no_grad()
def save_autoencoder(setup: Setup, folder: Path, networks: ExportedNetworks) -> None:
    """Save a first stage that ``--vae`` takes: all files replace the old ones at once.

    The EMA weights are the default file and the raw ones ``variant="raw"``; without EMA the raw ones are the default.
    Its ``scaling_factor`` is the one that ``--scale_factor data`` would measure on the same images.

    Raises:
        OSError: a file cannot be written; the existing files stay.
        RunError: the latents are all alike, or not finite.
    """
    network = networks.default.to(setup.accelerator.device)
    encoder = LatentEncoder(FirstStage(network), setup.seed)
    try:
        std = measure_latents(setup.data.train, encoder, None, IMAGES_FOR_SCALE).std
        network.register_to_config(scaling_factor=1 / std)
    except (ValueError, ZeroDivisionError) as error:
        raise RunError(f"the first stage has no scale of its latents: {error}") from None
    if networks.raw is not None:
        networks.raw.register_to_config(scaling_factor=1 / std)
    with replace_pipeline(folder) as draft, os_errors():
        network.save_pretrained(draft)
        if networks.raw is not None:
            networks.raw.save_pretrained(draft, variant="raw")
        if networks.ema_metadata is not None:
            save_ema_metadata(draft, networks.ema_metadata)

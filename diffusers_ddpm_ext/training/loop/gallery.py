"""The pictures of a run: what it trains on, what it samples on the way and at the end, and its curves.

Networks are measured by all processes together; the first one alone draws.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DModel

from diffusers_ddpm_ext.plotting.curves import plot_logvar, plot_run_losses
from diffusers_ddpm_ext.training.evaluation.validation_loss import log_loss_per_step
from diffusers_ddpm_ext.training.loop.export import take_networks
from diffusers_ddpm_ext.training.loop.previews import Preview
from diffusers_ddpm_ext.training.loop.run import Run, take_logvar
from diffusers_ddpm_ext.utils.files import METRICS, read_rows, write_atomically

FOLDER = "samples"
SAMPLES = "samples.png"
DRAWS_PER_STEP = 32
"""Draws that the log loss of a step is measured with, where the run was long enough for that."""
COST_OF_LOGVAR = 6
"""The measurement takes at most one image where training took so many (and went back through them, too)."""
MIN_DRAWS = 100


def sampler(run: Run) -> UNet2DModel | None:
    """The network that the saved pipeline samples with; all processes enter.

    Args:
        run: after a step.

    Returns:
        The network on the run's device; None but in the first process.
    """
    networks = take_networks(run.denoiser, run.ema)
    return None if networks is None else networks.default.to(run.accelerator.device)


def preview(run: Run) -> Preview:
    """The run's draughtsman."""
    output = run.config.output
    return Preview(
        run.taken_folder / FOLDER,
        run.seed,
        output.num_preview_images,
        output.ddpm_num_inference_steps,
        run.config.validation.eval_batch_size,
        stopped=lambda: bool(run.requests.stopped_by),
        joined=run.parts.pipeline_kwargs,
        conditions=lambda images: conditions_of(run, images),
        guidance_scale=output.preview_guidance_scale,
    )


def conditions_of(run: Run, images: range) -> dict[str, Any]:
    """What the images of a grid are conditioned on: the classes in turn, and what held-out images have beside them.

    Args:
        run: of the grid.
        images: numbers of some of its images.

    Returns:
        Arguments of the pipeline's call, on the run's device.
    """
    data = run.data.validation if run.data.validation is not None else run.data.train
    named = data.conditions([image % len(data) for image in images]).to(run.accelerator.device).as_dict()
    if run.parts.num_classes is not None and "class_labels" in named:
        named["class_labels"] = torch.tensor([image % run.parts.num_classes for image in images])
    return named


def draw_data(run: Run) -> None:
    """Draw ``inputs.png`` and ``diffusion_row.png``.

    Args:
        run: before its first step, so that a person sees early what it trains on.
    """
    if run.accelerator.is_main_process:
        preview(run).draw_data(run.data.train, run.parts.scheduler)


def draw_samples(run: Run) -> None:
    """Draw ``samples-<step>.png`` and ``denoise_row-<step>.png``.

    Args:
        run: after a step; no weight and no random number of it is changed.
    """
    network = sampler(run)
    try:
        if network is not None:
            preview(run).draw_samples(network, run.parts.scheduler, run.step)
    finally:
        run.accelerator.wait_for_everyone()


def draw_end(run: Run) -> None:
    """Draw ``samples.png``, the last grid of samples, and the curves.

    Args:
        run: after its last step.
    """
    draw_logvar(run)  # first, since all processes measure for it
    network = sampler(run)
    try:
        if network is not None:
            draw_losses(run)
            draw_last_samples(run, network)
    finally:
        run.accelerator.wait_for_everyone()


def draw_last_samples(run: Run, network: UNet2DModel) -> None:
    """Draw the last samples once, and put their sheet where a person looks first, too."""
    drawn, _ = preview(run).draw_samples(network, run.parts.scheduler, run.step)
    write_atomically(run.taken_folder / SAMPLES, lambda file: file.write(drawn.read_bytes()))


def draw_losses(run: Run) -> None:
    """Draw ``loss.png`` from the run's rows."""
    rows = read_rows(run.taken_folder / METRICS)
    plot_run_losses(rows, run.taken_folder / FOLDER / "loss.png", run.config.objective.loss_type)


def draw_logvar(run: Run) -> None:
    """Draw ``logvar.png``: what was learned, and the log loss of the raw weights that it estimates."""
    if not run.learns_logvar:
        return
    chain = run.num_train_timesteps
    budget = max(MIN_DRAWS, run.plan.steps * run.plan.effective_batch // COST_OF_LOGVAR)
    stride = -(-chain // budget)
    log_loss = log_loss_per_step(
        run.accelerator.unwrap_model(run.task),
        run.data.train,
        run.seed,
        torch.arange(0, chain, stride).repeat(max(1, min(DRAWS_PER_STEP, budget // chain))),
        run.config.validation.eval_batch_size,
        run.processes,
    )
    logvar = take_logvar(run)
    if logvar is not None and run.accelerator.is_main_process:
        plot_logvar(run.taken_folder / FOLDER / "logvar.png", logvar.float().cpu(), log_loss)

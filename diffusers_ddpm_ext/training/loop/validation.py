"""Validation metrics: losses, and optionally the bound, of raw and EMA weights; metrics of samples."""

from __future__ import annotations

from diffusers_ddpm_ext.diffusion.likelihood_estimate import Strata, estimate
from diffusers_ddpm_ext.training.data.latents import SampleSet
from diffusers_ddpm_ext.training.evaluation.bound import BoundEvaluation, evaluate_bound
from diffusers_ddpm_ext.training.evaluation.processes import Processes
from diffusers_ddpm_ext.training.evaluation.validation_loss import compute_validation_losses, validation_draws
from diffusers_ddpm_ext.training.loop.sample_metrics import sample_metrics
from diffusers_ddpm_ext.training.loop.setup import Setup
from diffusers_ddpm_ext.utils.dtensor import reshard


def validation_metrics(setup: Setup, processes: Processes) -> dict[str, float]:
    """The validation metrics by name, empty without validation images. Collective call: every process must make it."""
    options = setup.config.validation
    images, bound = setup.validation_samples, setup.parts.bound_metric
    if images is None:
        return {}
    draws = validation_draws(setup.seed, len(images), setup.num_train_timesteps, options.validation_max_images)
    task = setup.accelerator.unwrap_model(setup.task)

    def metrics(suffix: str = "") -> dict[str, float]:
        losses = compute_validation_losses(task, images, draws, options.eval_batch_size, processes)
        values = losses.metrics(suffix)
        if options.validation_bpd:
            values[f"val/{bound}{suffix}"] = validation_bpd(setup, images, processes)
        return values

    values = metrics()
    if setup.ema is not None:
        with setup.ema.scope(setup.denoiser):
            values |= metrics("_ema")
    return values | sample_metrics(setup, processes)


def validation_bpd(setup: Setup, images: SampleSet, processes: Processes) -> float:
    """The bound of the validation images under the network's present weights, in bits per dimension.

    It is the mean over the images that validation uses, with the same timesteps and noise every time.
    """
    options, parts = setup.config.validation, setup.parts
    kept = parts.scheduler.kept
    strata = Strata.from_schedule(kept, min(len(kept), options.validation_bpd_steps))
    evaluation = BoundEvaluation(
        parts.scheduler,
        images,
        strata,
        options.validation_max_images,
        setup.seed,
        batch_size=options.eval_batch_size,
        decoder=parts.objective.decoder,
        bin_width=parts.objective.bin_width,
    )

    task = setup.accelerator.unwrap_model(setup.task)
    training = task.training
    task.eval()
    rows = evaluate_bound(task.predict, evaluation, processes)
    task.train(training)
    reshard(task)
    return estimate(rows.bits, rows.prior, strata).bits_per_dim

"""What a validation measures: losses, and the bound where it is asked for, of raw and EMA weights on equal draws."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusers_ddpm_ext.diffusion.likelihood_estimate import Strata, estimate
from diffusers_ddpm_ext.models.conditioning import Conditions
from diffusers_ddpm_ext.training.data.image_set import ImageSet
from diffusers_ddpm_ext.training.evaluation.bound import BoundEvaluation, evaluate_bound
from diffusers_ddpm_ext.training.evaluation.validation_loss import compute_validation_losses, validation_draws
from diffusers_ddpm_ext.training.loop.run import Run
from diffusers_ddpm_ext.utils.dtensor import reshard


def measure(run: Run) -> dict[str, float]:
    """The validation losses by name; none without validation images."""
    images, options = run.data.validation, run.config.validation
    if images is None:
        return {}
    draws = validation_draws(run.seed, len(images), run.num_train_timesteps, options.validation_max_images)
    task = run.accelerator.unwrap_model(run.task)

    def measured(suffix: str = "") -> dict[str, float]:
        values = compute_validation_losses(task, images, draws, options.eval_batch_size, run.processes).metrics(suffix)
        if options.validation_bpd:
            values[f"val/bpd{suffix}"] = validation_bpd(run, images)
        return values

    values = measured()
    if run.ema is not None:
        with run.ema.scope(run.denoiser):
            values |= measured("_ema")
    return values


def validation_bpd(run: Run, images: ImageSet) -> float:
    """The bound of the validation images with the weights that are in the network now, bits per dimension.

    Args:
        run: after a step.
        images: held out.

    Returns:
        The mean over the images that validation looks at, on the same steps and noise every time.
    """
    options, objective, task = run.config.validation, run.config.objective, run.parts
    chain = len(task.scheduler.kept)
    strata = Strata.from_schedule(task.scheduler.kept, min(chain, options.validation_bpd_steps))
    used = min(len(images), options.validation_max_images or len(images))
    what = BoundEvaluation(
        task.scheduler,
        images,
        torch.arange(used) * len(images) // used,
        strata,
        run.seed,
        batch_size=options.eval_batch_size,
        decoder=objective.decoder,
        bin_width=task.objective.bin_width,
    )

    def network(xt: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        inputs, named = task.conditioning(xt, conditions)
        output: Tensor = run.denoiser(inputs, t, **named).sample
        return output

    training = run.denoiser.training
    run.denoiser.eval()
    rows = evaluate_bound(network, what, run.processes)
    run.denoiser.train(training)
    reshard(run.denoiser)
    return estimate(rows.bits, rows.prior, strata).bits_per_dim

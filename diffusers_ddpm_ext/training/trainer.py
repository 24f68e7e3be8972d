"""The training loop.

Every process goes through the same lines; the first one alone draws pictures and writes files. All steps are optimizer
steps, and everything random follows from the seed and their number.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from diffusers_ddpm_ext.training import keys
from diffusers_ddpm_ext.training.config import TrainConfig
from diffusers_ddpm_ext.training.data import Batch, stream
from diffusers_ddpm_ext.training.errors import RunError
from diffusers_ddpm_ext.training.evaluate import score, validation_draws
from diffusers_ddpm_ext.training.export import save_pipeline
from diffusers_ddpm_ext.training.gallery import SAMPLES, draw_data, draw_end, draw_samples
from diffusers_ddpm_ext.training.optim import clip_gradients
from diffusers_ddpm_ext.training.processes import leave_silently, mean_over_ranks
from diffusers_ddpm_ext.training.records import METRICS, Records, StepRecord, first_nonfinite
from diffusers_ddpm_ext.training.run import Run, describe, start, take_folder

PROJECT = "diffusers-ddpm-ext"


def train(config: TrainConfig) -> Path | None:
    """Train a model and leave its pipeline in the run's folder.

    Args:
        config: as parsed.

    Returns:
        The folder; None for a dry run, which writes nothing.

    Raises:
        ConfigError: an option that cannot be met, found before anything is written.
        RunError: the run had started and could not go on.
    """
    run = start(config)
    if config.loop.dry_run:
        run.accelerator.print(describe(run))
    else:
        take_folder(run)
        run.accelerator.print(describe(run))
        records = open_records(run)
        draw_data(run)
        fit(run, records)
        finish(run, records)
    run.accelerator.end_training()
    return run.folder


def fit(run: Run, records: Records) -> None:
    """Go from the run's step to its last one.

    Args:
        run: before a step.
        records: where its numbers go.
    """
    batches = open_batches(run)
    run.task.train()
    while run.step < run.plan.steps:
        train_step(run, batches)
        records.bar.update()
        now = due(run)
        if now.logging:
            read_losses(run, records)
        with records.watch.stopped():
            if now.validation:
                validate(run, records)
            if now.images:
                draw_samples(run)
            if now.model:
                save(run)


def train_step(run: Run, batches: Iterator[Batch]) -> None:
    """One optimizer step over all micro-batches.

    Args:
        run: its step is one higher afterwards.
        batches: this process's micro-batches.
    """
    accelerator, device = run.accelerator, run.accelerator.device
    outputs, timesteps, grad_norm = [], [], None
    for micro in range(run.plan.accumulation):
        batch = next(batches)
        t, noise = keys.sample_draws(
            run.seed, run.step, batch.positions, batch.pixels.shape[1:], run.num_train_timesteps
        )
        seed_dropout(run, micro)
        with accelerator.accumulate(run.task):
            output = run.task(batch.pixels, noise.to(device, non_blocking=True), t.to(device, non_blocking=True))
            accelerator.backward(output.loss)
            if accelerator.sync_gradients:
                grad_norm = clip(run)
            run.optimizer.step()
            run.optimizer.zero_grad()
        outputs.append(output)
        timesteps.append(t)
    learning_rate = float(run.lr_scheduler.get_last_lr()[0])
    run.lr_scheduler.step()
    if run.ema is not None:
        run.ema.step(run.denoiser)
    run.step += 1
    run.meter.add(run.step, learning_rate, outputs, timesteps, grad_norm)


def seed_dropout(run: Run, micro: int) -> None:
    """Make dropout a function of the seed, the step, the micro-batch and the process.

    Args:
        run: before a forward pass.
        micro: number of the micro-batch in its step.
    """
    number = keys.key(keys.DROPOUT, run.seed, run.step, micro, run.accelerator.process_index)
    if run.accelerator.device.type == "cpu":
        torch.default_generator.manual_seed(number)  # torch.manual_seed looks for every kind of device each time
    else:
        torch.manual_seed(number)


def clip(run: Run) -> Tensor:
    """Limit the gradients, the network's and the log-variances' apart: one must not shrink the other's steps.

    Args:
        run: after the last backward pass of a step.

    Returns:
        The norm of the network's gradient before, on its device.
    """
    run.accelerator.unscale_gradients()
    max_norm = run.config.optim.max_grad_norm
    if run.logvar is not None:
        clip_gradients([run.logvar], max_norm)
    return clip_gradients(run.network, max_norm)


@dataclass(frozen=True)
class Due:
    """What is to be done after a step that is not the last; the end has its own order.

    Attributes:
        logging: read the losses back from the device and write them down.
        validation: measure the validation loss.
        images: draw a grid of samples.
        model: save the pipeline.
    """

    logging: bool
    validation: bool
    images: bool
    model: bool


def due(run: Run) -> Due:
    """What the present step calls for.

    Args:
        run: after a step.

    Returns:
        Decisions that are the same in every process.
    """
    step, plan, output = run.step, run.plan, run.config.output
    if step == plan.steps:
        return Due(logging=True, validation=False, images=False, model=False)

    def every(steps: int | None) -> bool:
        return steps is not None and steps > 0 and step % steps == 0

    def every_epochs(epochs: int | None) -> bool:
        return epochs is not None and plan.epoch(step) // epochs > plan.epoch(step - 1) // epochs

    validation = every(run.config.validation.validation_steps)
    images = every(output.save_images_steps) or every_epochs(output.save_images_epochs)
    model = every_epochs(output.save_model_epochs)
    return Due(every(output.logging_steps) or validation or images or model, validation, images, model)


def open_batches(run: Run) -> Iterator[Batch]:
    """This process's share of the images, from the run's step on."""
    loop, accelerator = run.config.loop, run.accelerator
    return stream(
        run.data.train,
        run.seed,
        loop.train_batch_size,
        loop.gradient_accumulation_steps,
        accelerator.process_index,
        accelerator.num_processes,
        run.step,
        run.config.data.dataloader_num_workers,
        accelerator.device,
    )


def open_records(run: Run) -> Records:
    """Files, tracker and progress bar.

    Args:
        run: it has its folder.

    Returns:
        The records of this process; only the first one's write anything.
    """
    accelerator, config = run.accelerator, run.config
    if accelerator.log_with:
        accelerator.project_configuration.logging_dir = str(run.taken_folder / config.output.logging_dir)
        flat = config.to_flat_dict().items()
        plain = {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in flat}
        accelerator.init_trackers(PROJECT, config=plain)
    bar = tqdm(total=run.plan.steps, initial=run.step, unit="step", disable=not accelerator.is_main_process)
    records = Records(run.taken_folder, accelerator.log, run.logvar is not None, run.plan.effective_batch, bar)
    if accelerator.is_main_process:
        records.start()
    return records


def read_losses(run: Run, records: Records) -> None:
    """Write down the losses that wait on the device, and stop a run whose losses are no numbers.

    Args:
        run: after a step at which every process calls this.
        records: where the losses go.

    Raises:
        RunError: in the first process.
    """
    accelerator = run.accelerator
    rows = run.meter.read(lambda tensor: mean_over_ranks(accelerator, tensor))
    broken = first_nonfinite(rows, look_at_gradients=accelerator.scaler is None)
    if accelerator.is_main_process:
        records.training(rows if broken is None else rows[: rows.index(broken)])
    if broken is not None:
        suspects = sorted(set(gather_object(run.meter.suspects(broken.step))))
        if not accelerator.is_main_process:
            leave_silently(1)
        records.bar.close()
        raise RunError(explain(run, broken, suspects))


def explain(run: Run, broken: StepRecord, suspects: list[int]) -> str:
    """One line on a loss that is not finite.

    Args:
        run: that broke.
        broken: the first such step.
        suspects: timesteps of the samples whose loss was not finite.

    Returns:
        Step, timesteps, and the options to change.
    """
    where = f"timesteps {', '.join(map(str, suspects[:8]))}{', ...' if len(suspects) > 8 else ''}"
    what = f"the loss was {broken.loss}" if suspects else "the gradient was not finite"
    optim, precision = run.config.optim, run.accelerator.mixed_precision
    advice = f"a lower --learning_rate than {optim.learning_rate:g} or --max_grad_norm than {optim.max_grad_norm:g}"
    if precision != "no":
        advice += f", or --mixed_precision {'bf16' if precision == 'fp16' else 'no'}"
    return f"step {broken.step}: {what} ({where if suspects else 'at all timesteps'}); try {advice}"


def validate(run: Run, records: Records) -> None:
    """Measure raw and EMA weights on the same images, timesteps and noise.

    Args:
        run: after a step; nothing of it is changed.
        records: where the result goes.
    """
    images, options = run.data.validation, run.config.validation
    if images is None:
        return
    draws = validation_draws(run.seed, len(images), run.num_train_timesteps, options.validation_max_images)
    task = run.accelerator.unwrap_model(run.task)
    values = score(task, images, draws, options.eval_batch_size, run.workers).named()
    if run.ema is not None:
        with run.ema.scope(run.denoiser):
            values |= score(task, images, draws, options.eval_batch_size, run.workers).named("_ema")
    if run.accelerator.is_main_process:
        records.validation(run.step, values)


def save(run: Run) -> None:
    """Put the pipeline, as it is now, into the run's folder.

    Args:
        run: after a step.

    Raises:
        RunError: the disk does not take it; an earlier pipeline is still there.
    """
    if run.accelerator.is_main_process:
        try:
            save_pipeline(run.taken_folder, run.denoiser, run.parts.scheduler, run.ema, run.logvar)
        except OSError as error:
            raise RunError(f"step {run.step}: the pipeline could not be saved in {run.folder}: {error}") from error
    run.accelerator.wait_for_everyone()


def finish(run: Run, records: Records) -> None:
    """Leave the pipeline, the last numbers and the pictures, in this order: what cannot be made again goes first.

    Args:
        run: after its last step.
        records: where the numbers go.
    """
    records.bar.close()
    save(run)
    validate(run, records)
    draw_end(run)
    run.accelerator.print(
        f"The pipeline, its samples ({SAMPLES}) and its numbers ({METRICS}) are in {run.folder}; "
        f"draw from it: ddpm-ext sample {shlex.quote(str(run.folder))}"
    )

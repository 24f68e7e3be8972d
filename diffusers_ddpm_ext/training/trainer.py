"""The training loop.

Every process goes through the same lines; the first one alone draws pictures and writes files. All steps are optimizer
steps, and everything random follows from the seed and their number.
"""

from __future__ import annotations

import json
import math
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from diffusers_ddpm_ext.errors import Interrupted, RunError, warn
from diffusers_ddpm_ext.hub.card import environment_versions
from diffusers_ddpm_ext.training.checkpoints.output_dir import run_name
from diffusers_ddpm_ext.training.config.train_config import TrainConfig
from diffusers_ddpm_ext.training.data.batches import Batch, batch_stream
from diffusers_ddpm_ext.training.distributed import any_rank, mean_over_ranks
from diffusers_ddpm_ext.training.loop.export import save_pipeline
from diffusers_ddpm_ext.training.loop.gallery import FOLDER, SAMPLES, draw_data, draw_end, draw_samples
from diffusers_ddpm_ext.training.loop.hub_publisher import Publisher, take_token
from diffusers_ddpm_ext.training.loop.nonfinite import give_up, recover
from diffusers_ddpm_ext.training.loop.resume import BEST, resume
from diffusers_ddpm_ext.training.loop.run import Run, describe, start, take_folder
from diffusers_ddpm_ext.training.loop.saving import (
    keep,
    keep_best,
    keep_best_pipeline,
    logvar_network,
    mark_finished,
    take_pipeline,
)
from diffusers_ddpm_ext.training.loop.step import train_step
from diffusers_ddpm_ext.training.loop.stop_requests import RequestPoller, StopRequest
from diffusers_ddpm_ext.training.loop.validation import measure
from diffusers_ddpm_ext.training.signals import handle_signals
from diffusers_ddpm_ext.training.tracking.metrics import MetricsLogger
from diffusers_ddpm_ext.training.tracking.step_losses import first_nonfinite
from diffusers_ddpm_ext.utils.files import CONFIG, ENVIRONMENT, METRICS, write_text_atomically

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
        SystemExit: a signal asked to stop, with its status; a checkpoint has been written.
    """
    began = time.monotonic()
    config = take_token(config)
    run = start(config)
    if config.loop.dry_run:
        run.accelerator.print(describe(run))
        end(run)
        return None
    take_folder(run)
    publisher = open_publisher(run)
    try:
        if resume(run):
            with handle_signals() as run.requests:
                carry_out(run, began)
        if publisher is not None:
            run.accelerator.print(publisher.at_the_end())
    finally:
        if publisher is not None:
            publisher.stop()
        if run.lock is not None:
            run.lock.release()
    end(run)
    return run.folder


def open_publisher(run: Run) -> Publisher | None:
    """What pushes the run's folder; None in other processes than the first, and where nobody asked for it."""
    if not run.accelerator.is_main_process or not run.config.hub.push_to_hub:
        return None
    run.publisher = Publisher(run.taken_folder, run.config.hub)
    return run.publisher


def carry_out(run: Run, began: float) -> None:
    """Do all that is left of a run.

    Args:
        run: with its folder, before its first step or where a checkpoint has put it.
        began: when the process was started, in seconds of the monotonic clock.

    Raises:
        RunError: it could not go on.
        SystemExit: a signal asked to stop.
    """
    if run.accelerator.is_main_process:
        run.config.write_resolved(run.taken_folder / CONFIG)
        write_environment(run)
    run.accelerator.print(describe(run))
    logger = open_metrics_logger(run)
    if run.step == 0:
        spared(run, draw_data)
        place = run.taken_folder / FOLDER
        if run.accelerator.is_main_process:
            pictures = {name: place / f"{name}.png" for name in ("inputs", "diffusion_row")}
            logger.log_images(run.accelerator.trackers, pictures, 0)
        if run.config.loop.on_nonfinite == "rollback":
            keep(run, logger)  # or there would be nothing to go back to before the first checkpoint
    try:
        fit(run, logger, RequestPoller(run.accelerator, run.config.checkpoint, run.requests, began))
    except Halt as halt:
        logger.progress_bar.close()
        say_how_to_go_on(run, halt)
        if halt.signal:
            end(run)
            raise SystemExit(128 + halt.signal) from None
        return
    logger.progress_bar.close()
    if run.accelerator.is_main_process:
        mark_finished(run)
    run.accelerator.print(
        f"The pipeline, its samples ({SAMPLES}) and its numbers ({METRICS}) are in {run.folder}; "
        f"draw from it: ddpm-ext sample {shlex.quote(str(run.folder))}"
    )


def end(run: Run) -> None:
    """Leave the tracker and the other processes."""
    try:
        run.accelerator.end_training()
    except Exception as error:  # a tracker that was down, say; the run itself is complete
        warn(f"--report_to {run.config.output.report_to}: {' '.join(f'{type(error).__name__} {error}'.split())}")


def write_environment(run: Run) -> None:
    """Leave versions, device and images in the folder, for the model card."""
    device, data = run.accelerator.device, run.data
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    facts = environment_versions() | {
        "device": f"{run.plan.processes} x {name}",
        "data": {
            "name": run_name(run.config.data),
            "train": len(data.train),
            "validation": 0 if data.validation is None else len(data.validation),
            "fingerprint": data.fingerprint,
        },
    }
    text = json.dumps(facts, indent=2) + "\n"
    write_text_atomically(run.taken_folder / ENVIRONMENT, text)


class Halt(Exception):
    """The run ends here, to go on another time.

    Args:
        signal: number of the signal that asked for it; 0 where its time is up.
        kept: whether the checkpoint stands.
    """

    def __init__(self, signal: int, kept: bool) -> None:
        super().__init__(signal, kept)
        self.signal = signal
        self.kept = kept


def say_how_to_go_on(run: Run, halt: Halt) -> None:
    """One line on why the run ends, and how it goes on."""
    why = signal.Signals(halt.signal).name if halt.signal else "--max_train_minutes"
    kept = f"checkpoint-{run.step} is written" if halt.kept else "no checkpoint could be written, older ones stand"
    run.accelerator.print(
        f"{why}: stopped after step {run.step:,} of {run.plan.steps:,}; {kept}. "
        "To go on: the same line with --resume_from_checkpoint latest"
    )


def fit(run: Run, logger: MetricsLogger, poller: RequestPoller) -> None:
    """Go from the run's step to its end.

    Args:
        run: before a step, or in the middle of what its step calls for.
        logger: where its numbers go.
        poller: what time and signals ask for.

    Raises:
        RunError: the run cannot go on.
        Halt: it is asked to stop; a checkpoint has been written.
    """
    batches = open_batches(run)
    rolling = run.config.loop.on_nonfinite == "rollback"
    run.task.train()
    with logger.stopwatch.stopped():
        catch_up(run, logger, poller)
    while run.step < run.plan.steps and not run.stopped_early:
        applied = train_step(run, batches)
        if not applied:
            recover(run)
        elif not rolling:
            run.recoveries = 0
        logger.progress_bar.update()
        asked = poller.poll()
        now = due(run, asked)
        run.todo = list(now.tasks)
        if now.logging:
            read_losses(run, logger)
        with logger.stopwatch.stopped():
            if now.checkpoint:
                kept = keep(run, logger)
                if kept and applied:
                    run.recoveries = 0
                if run.publisher is not None and run.publisher.with_checkpoint and run.step < run.plan.steps:
                    run.publisher.on_the_way(run.step)
                if asked.stop:
                    raise Halt(asked.signal, kept)
            catch_up(run, logger, poller)


def catch_up(run: Run, logger: MetricsLogger, poller: RequestPoller) -> None:
    """Do what the present step still calls for, each task whole or not at all.

    Args:
        run: its ``todo`` is empty afterwards.
        logger: of the run.
        poller: what signals ask for meanwhile.

    Raises:
        Halt: as `fit`.
    """
    while run.todo:
        task = run.todo[0]
        if TASKS[task](run, logger) and run.todo[:1] == [task]:
            run.todo = run.todo[1:]
        asked = poller.poll()
        if asked.stop:
            raise Halt(asked.signal, keep(run, logger))


END = ("model", "validation", "end")
"""What the last step calls for, in this order: what cannot be made again goes first."""


@dataclass(frozen=True)
class Due:
    """What is to be done after a step.

    Attributes:
        logging: read the losses back from the device and write them down.
        checkpoint: write a checkpoint, before the tasks: a run that dies in one of them does it anew.
        tasks: names of `TASKS`, in order.
    """

    logging: bool
    checkpoint: bool
    tasks: tuple[str, ...]


def due(run: Run, asked: StopRequest) -> Due:
    """What the present step calls for.

    Args:
        run: after a step.
        asked: by time and signals.

    Returns:
        Decisions that are the same in every process.
    """
    step, plan, output, options = run.step, run.plan, run.config.output, run.config.checkpoint

    def every(steps: int | None) -> bool:
        return steps is not None and steps > 0 and step % steps == 0

    def every_epochs(epochs: int | None) -> bool:
        return epochs is not None and plan.epoch(step) // epochs > plan.epoch(step - 1) // epochs

    last = step == plan.steps
    wanted = {
        "validation": every(run.config.validation.validation_steps),
        "images": every(output.save_images_steps) or every_epochs(output.save_images_epochs),
        "model": every_epochs(output.save_model_epochs),
    }
    tasks = END if last else tuple(task for task, wants in wanted.items() if wants)
    checkpoint = asked.checkpoint or every(options.checkpointing_steps) or last
    return Due(every(output.logging_steps) or bool(tasks) or checkpoint, checkpoint, tasks)


def open_batches(run: Run) -> Iterator[Batch]:
    """This process's share of the images, from the run's step on."""
    loop, accelerator = run.config.loop, run.accelerator
    return batch_stream(
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


def open_metrics_logger(run: Run) -> MetricsLogger:
    """Files, tracker and progress bar.

    Args:
        run: it has its folder.

    Returns:
        The logger of this process; only the first one's write anything.
    """
    accelerator, config, down = run.accelerator, run.config, False
    if accelerator.log_with:
        accelerator.project_configuration.logging_dir = str(run.taken_folder / config.output.logging_dir)
        flat = config.to_flat_dict().items()
        plain = {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in flat}
        down = start_tracker(run, plain)
    bar = tqdm(total=run.plan.steps, initial=run.step, unit="step", disable=not accelerator.is_main_process)
    logger = MetricsLogger(run.taken_folder, accelerator.log, run.learns_logvar, run.plan.effective_batch, bar)
    logger.tracker_failed = down
    if accelerator.is_main_process:
        logger.truncate_files(run.metrics_size)
    return logger


def start_tracker(run: Run, options: dict[str, bool | int | float | str]) -> bool:
    """Connect the tracker. One that cannot be reached is named, and the run goes on without it.

    Args:
        run: it has its folder.
        options: of the run, as trackers take them.

    Returns:
        Whether it is down.
    """
    try:
        run.accelerator.init_trackers(PROJECT, config=options)
    except Exception as error:  # a library's own; metrics.jsonl has the numbers in any case
        what = " ".join(f"{type(error).__name__} {error}".split())
        warn(
            f"--report_to {run.config.output.report_to}: {what}; the run goes on without it, {METRICS} has the numbers"
        )
        return True
    return False


def read_losses(run: Run, logger: MetricsLogger) -> None:
    """Write down the losses that wait on the device, and end a run whose losses are no numbers.

    Args:
        run: after a step at which every process calls this.
        logger: where the losses go.

    Raises:
        RunError: in the first process.
    """
    accelerator = run.accelerator
    rows = run.meter.read(lambda tensor: mean_over_ranks(accelerator, tensor))
    broken = first_nonfinite(rows, check_gradients=accelerator.scaler is None)
    if rows:
        run.last_row = rows[-1].row(run.learns_logvar)
    if accelerator.is_main_process:
        logger.log_training(rows if broken is None else rows[: rows.index(broken)])
    if broken is not None:
        logger.progress_bar.close()
        give_up(run, broken.step)


def validate(run: Run, logger: MetricsLogger) -> bool:
    """Measure raw and EMA weights on the same images, timesteps and noise, and let the monitor judge.

    Args:
        run: after a step; none of its weights is changed.
        logger: where the result goes.

    Returns:
        Whether it was done; False where a signal broke it off, and its numbers are worth nothing.
    """
    values = measure(run)
    if any_rank(run.accelerator, bool(run.requests.stopped_by)):
        return False
    if values and run.accelerator.is_main_process:
        logger.log_validation(run.step, values)
    run.todo = [task for task in run.todo if task != "validation"]  # done, in the checkpoint below too
    if run.monitor is not None:
        decision = run.monitor.update(run.step, (values | run.last_row).get(run.monitor.name, math.nan))
        if decision.stop and run.step < run.plan.steps:
            run.stopped_early = True
            run.todo = [task for task in END if task != "validation"]
            run.accelerator.print(f"step {run.step:,}: {run.monitor.name} has not improved lately; stopping early")
        keep_best(run, logger, decision)
    return True


def save(run: Run, logger: MetricsLogger) -> bool:
    """Put the pipeline, as it is now, into the run's folder.

    Args:
        run: after a step.
        logger: of the run.

    Returns:
        True: it is done, or cannot be.

    Raises:
        RunError: the final one could not be written; on the way there it is a warning.
    """
    failure = ""
    networks, logvar = take_pipeline(run)
    if networks is not None:
        try:
            save_pipeline(
                run.taken_folder, networks, run.parts.scheduler, logvar, run.parts.pipeline_kwargs, logvar_network(run)
            )
        except OSError as error:
            failure = f"the pipeline could not be saved in {run.folder} ({error.strerror or error})"
    run.accelerator.wait_for_everyone()
    if failure and "end" in run.todo:
        logger.progress_bar.close()
        raise RunError(f"{failure}; make room and go on with --resume_from_checkpoint latest")
    if failure:
        warn(failure)
    elif run.publisher is not None and "end" not in run.todo:
        run.publisher.on_the_way(run.step)
    return True


def spared(run: Run, picture: Callable[[Run], None]) -> bool:
    """Draw, and survive a disk that is full.

    Args:
        run: after a step.
        picture: draws.

    Returns:
        Whether it was done; False where a signal broke it off.
    """
    try:
        picture(run)
    except OSError as error:
        warn(f"a picture could not be written ({error.strerror or error})")
    except Interrupted:
        return False
    return True


def shown(run: Run, logger: MetricsLogger, picture: Callable[[Run], None]) -> bool:
    """Draw, and let the trackers have what was drawn.

    Args:
        run: after a step.
        logger: of the run.
        picture: draws.

    Returns:
        As `spared`.
    """
    done = spared(run, picture)
    if done and run.accelerator.is_main_process:
        place = run.taken_folder / FOLDER
        names = [f"samples-{run.step}", f"denoise_row-{run.step}"]
        names += ["loss", "logvar"] if run.step == run.plan.steps else []
        pictures = {name.partition("-")[0]: place / f"{name}.png" for name in names}
        logger.log_images(run.accelerator.trackers, pictures, run.step)
    return done


TASKS: dict[str, Callable[[Run, MetricsLogger], bool]] = {
    "validation": validate,
    BEST: lambda run, logger: keep_best_pipeline(run),
    "images": lambda run, logger: shown(run, logger, draw_samples),
    "model": save,
    "end": lambda run, logger: shown(run, logger, draw_end),
}

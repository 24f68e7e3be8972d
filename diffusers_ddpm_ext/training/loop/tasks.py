"""Tasks between two steps: validation, the best pipeline, image grids, and the saved pipeline."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from diffusers_ddpm_ext.errors import Interrupted, RunError, warn
from diffusers_ddpm_ext.training.config.train_config import TrainConfig
from diffusers_ddpm_ext.training.distributed import any_rank
from diffusers_ddpm_ext.training.loop.metrics_logging import log_images
from diffusers_ddpm_ext.training.loop.run import Run, Task
from diffusers_ddpm_ext.training.loop.saving import save_best_pipeline, save_checkpoint, save_top_checkpoint
from diffusers_ddpm_ext.training.loop.stop_requests import RequestPoller, StopRequest
from diffusers_ddpm_ext.training.loop.workload import workload_of
from diffusers_ddpm_ext.training.tracking.console import describe_validation, print_line, validation_bound
from diffusers_ddpm_ext.training.tracking.plan import Plan

FINAL_TASKS = (Task.MODEL, Task.VALIDATION, Task.END)
"""Tasks of the last step, in order: what cannot be repeated comes first."""


class StopTraining(Exception):
    """The run ends before its last step and can be resumed; ``signal`` is 0 where the time limit requested it."""

    def __init__(self, signal: int, checkpoint_written: bool) -> None:
        super().__init__(signal, checkpoint_written)
        self.signal = signal
        self.checkpoint_written = checkpoint_written


@dataclass(frozen=True)
class DueWork:
    """Work that is due after a step.

    Attributes:
        log_losses: read the losses back from the device and log them.
        checkpoint: write a checkpoint, before the tasks: a run that is killed in one of them repeats it.
        tasks: in order.
    """

    log_losses: bool
    checkpoint: bool
    tasks: tuple[Task, ...]


def due_after(step: int, config: TrainConfig, plan: Plan, request: StopRequest) -> DueWork:
    """What is due after ``step`` optimizer steps by the options and the request; the same in every process."""
    output, options = config.output, config.checkpoint

    def every(steps: int | None) -> bool:
        return steps is not None and steps > 0 and step % steps == 0

    def every_epochs(epochs: int | None) -> bool:
        return epochs is not None and plan.epoch(step) // epochs > plan.epoch(step - 1) // epochs

    last = step == plan.steps
    is_due = {
        Task.VALIDATION: every(config.validation.validation_steps),
        Task.IMAGES: every(output.save_images_steps) or every_epochs(output.save_images_epochs),
        Task.MODEL: every_epochs(output.save_model_epochs),
    }
    tasks = FINAL_TASKS if last else tuple(task for task, due in is_due.items() if due)
    checkpoint = request.checkpoint or every(options.checkpointing_steps) or last
    return DueWork(every(output.logging_steps) or bool(tasks) or checkpoint, checkpoint, tasks)


def run_pending_tasks(run: Run, poller: RequestPoller) -> None:
    """Do the pending tasks of the present step, each completely or not at all. Collective call.

    Raises:
        StopTraining: a request to stop arrived meanwhile; a checkpoint has been written.
    """
    progress = run.progress
    while progress.pending:
        task = progress.pending[0]
        if run_task(task, run) and progress.pending[:1] == [task]:
            progress.pending = progress.pending[1:]
        request = poller.poll_now()
        if request.stop:
            raise StopTraining(request.signal, save_checkpoint(run))


def run_task(task: Task, run: Run) -> bool:
    """Do one task; False where a signal interrupted it. Collective call: every process must make it."""
    workload = workload_of(run.setup)
    match task:
        case Task.VALIDATION:
            return validate(run)
        case Task.BEST:
            save_best_pipeline(run.setup, run.folder, run.progress.step)
        case Task.MODEL:
            save_model(run)
        case Task.IMAGES:
            return draw_and_log(run, workload.draw_samples, workload.sample_images(run.progress.step))
        case Task.END:
            curves = workload.final_images if run.progress.step == run.setup.plan.steps else ()
            return draw_and_log(run, workload.draw_final, (*workload.sample_images(run.progress.step), *curves))
    return True


def validate(run: Run) -> bool:
    """Evaluate raw and EMA weights on the same draws, and update the monitor; False where a signal interrupted it."""
    setup, progress = run.setup, run.progress
    values = workload_of(setup).validation_metrics(setup, run.processes)
    if any_rank(setup.accelerator, bool(run.signals.stopped_by)):
        return False
    if values and setup.accelerator.is_main_process:
        run.logger.log_validation(progress.step, values)
    progress.pending = [task for task in progress.pending if task != Task.VALIDATION]  # in the checkpoint below, too
    progress.last_bound = validation_bound(values)
    decision = None
    if setup.monitor is not None:
        value = (values | progress.last_metrics).get(setup.monitor.name, math.nan)
        decision = setup.monitor.update(progress.step, value)
    if values and setup.accelerator.is_main_process:
        print_line(describe_validation(progress.step, values | progress.last_metrics, setup.monitor, decision))
    if setup.monitor is not None and decision is not None:
        if decision.stop and progress.step < setup.plan.steps:
            progress.stopped_early = True
            progress.pending = [task for task in FINAL_TASKS if task != Task.VALIDATION]
            if setup.accelerator.is_main_process:
                print_line(f"step {progress.step:,}: {setup.monitor.name} has not improved lately; stopping early")
        save_top_checkpoint(run, decision)
    return True


def save_model(run: Run) -> None:
    """Save the present pipeline in the run's folder.

    Raises:
        RunError: the final one could not be written; an earlier failure is a warning.
    """
    setup, is_final = run.setup, Task.END in run.progress.pending
    failure, workload = "", workload_of(setup)
    networks = workload.export(setup)
    if networks is not None:
        try:
            workload.save(setup, run.folder, networks, warn=is_final)
        except OSError as error:
            failure = f"the pipeline could not be saved in {run.folder} ({error.strerror or error})"
    setup.accelerator.wait_for_everyone()
    if failure and is_final:
        run.logger.progress_bar.close()
        raise RunError(f"{failure}; free some space and resume with --resume_from_checkpoint latest")
    if failure:
        warn(failure)
    elif run.publisher is not None and not is_final:
        run.publisher.push_in_background(run.progress.step)


def draw_and_log(run: Run, draw: Callable[[Run], None], names: tuple[str, ...]) -> bool:
    """Draw images, and log those of the given names to the trackers; False where a signal interrupted it.

    A full disk, or a network whose samples are not finite, is a warning.
    """
    try:
        draw(run)
    except OSError as error:
        warn(f"an image could not be written ({error.strerror or error})")
    except ValueError as error:  # the network overflows in sampling, which the losses need not show
        warn(f"the images of step {run.progress.step:,} could not be drawn: {error}")
    except Interrupted:
        return False
    log_images(run, names)
    return True

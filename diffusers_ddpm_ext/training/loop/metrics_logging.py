"""Metrics logging of a run: opening the files and the tracker, and logging losses and images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from accelerate import Accelerator

from diffusers_ddpm_ext.errors import as_run_error, warn
from diffusers_ddpm_ext.training.config.train_config import TrainConfig
from diffusers_ddpm_ext.training.distributed import fail_together, mean_over_ranks
from diffusers_ddpm_ext.training.loop.nonfinite import stop_nonfinite
from diffusers_ddpm_ext.training.loop.previews import IMAGE_FOLDER
from diffusers_ddpm_ext.training.loop.run import Run, RunProgress, Task
from diffusers_ddpm_ext.training.loop.setup import Setup
from diffusers_ddpm_ext.training.tracking.console import ProgressDisplay
from diffusers_ddpm_ext.training.tracking.metrics import MetricsLogger
from diffusers_ddpm_ext.training.tracking.step_losses import first_nonfinite
from diffusers_ddpm_ext.utils.files import METRICS

PROJECT = "diffusers-ddpm-ext"


def open_metrics_logger(setup: Setup, folder: Path, progress: RunProgress) -> MetricsLogger:
    """Open files, tracker and progress bar; only the main process' logger writes."""
    accelerator = setup.accelerator
    tracker_failed = bool(accelerator.log_with) and not start_tracker(accelerator, setup.config, folder)
    bar = ProgressDisplay(setup.plan.steps, progress.step, accelerator.is_main_process)
    logger = MetricsLogger(
        folder,
        accelerator.log,
        setup.learns_logvar,
        setup.plan.effective_batch,
        bar,
        is_stream=setup.data.stream is not None,
    )
    logger.tracker_failed = tracker_failed
    with fail_together(accelerator):
        if accelerator.is_main_process:
            with as_run_error(folder):
                logger.trim_files(progress.step, Task.VALIDATION in progress.pending)
    return logger


def start_tracker(accelerator: Accelerator, config: TrainConfig, folder: Path) -> bool:
    """Connect the tracker; False, and a warning, if it cannot be reached: the run continues without it."""
    output = config.output
    accelerator.project_configuration.logging_dir = str(folder / output.logging_dir)
    options = {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in config.to_flat_dict().items()
    }
    try:
        accelerator.init_trackers(PROJECT, config=options)
    except Exception as error:  # of any library; metrics.jsonl has the values in any case
        reason = " ".join(f"{type(error).__name__} {error}".split())
        warn(f"--report_to {output.report_to}: {reason}; the run continues without it, {METRICS} has the values")
        return False
    return True


def log_losses(run: Run) -> None:
    """Read the pending losses back from the device and log them. Collective call: every process must make it.

    Raises:
        RunError: a loss is not finite; in the main process.
    """
    setup, accelerator = run.setup, run.setup.accelerator
    records = run.meter.read(lambda tensor: mean_over_ranks(accelerator, tensor))
    broken = first_nonfinite(records, check_gradients=accelerator.scaler is None)
    if records:
        run.progress.last_metrics = records[-1].row(setup.learns_logvar)
    if accelerator.is_main_process:
        run.logger.log_training(records if broken is None else records[: records.index(broken)])
    if broken is not None:
        run.logger.progress_bar.close()
        stop_nonfinite(run, broken.step)


def log_images(run: Run, names: Iterable[str]) -> None:
    """Log images of the run's folder to the trackers, under the part of their names before the step."""
    accelerator = run.setup.accelerator
    if accelerator.is_main_process:
        images = {name.partition("-")[0]: run.folder / IMAGE_FOLDER / f"{name}.png" for name in names}
        run.logger.log_images(accelerator.trackers, images, run.progress.step)

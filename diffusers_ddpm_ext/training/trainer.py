"""The training loop.

Every process runs the same code; only the main process draws images and writes files. All steps are optimizer steps,
and everything random is a function of the seed and the step.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from diffusers_ddpm_ext.errors import as_run_error, printable_lines, warn
from diffusers_ddpm_ext.hub.card import environment_versions
from diffusers_ddpm_ext.training.checkpoints.output_dir import run_name
from diffusers_ddpm_ext.training.config.train_config import TrainConfig
from diffusers_ddpm_ext.training.data.class_table import count_classes
from diffusers_ddpm_ext.training.distributed import fail_together
from diffusers_ddpm_ext.training.loop.attention import settle_attention
from diffusers_ddpm_ext.training.loop.captions import open_text_cache
from diffusers_ddpm_ext.training.loop.description import describe_run
from diffusers_ddpm_ext.training.loop.hub_publisher import Publisher, move_token_to_environment
from diffusers_ddpm_ext.training.loop.latents import open_latent_cache, settle_scale
from diffusers_ddpm_ext.training.loop.metrics_logging import log_losses, open_metrics_logger
from diffusers_ddpm_ext.training.loop.nonfinite import settle
from diffusers_ddpm_ext.training.loop.previews import preview_prompts
from diffusers_ddpm_ext.training.loop.resume import resume
from diffusers_ddpm_ext.training.loop.run import Run, RunProgress, acquire_folder
from diffusers_ddpm_ext.training.loop.run_batches import RunBatches
from diffusers_ddpm_ext.training.loop.saving import mark_finished, save_checkpoint
from diffusers_ddpm_ext.training.loop.setup import Setup, build_setup
from diffusers_ddpm_ext.training.loop.step import train_step
from diffusers_ddpm_ext.training.loop.stop_requests import RequestPoller
from diffusers_ddpm_ext.training.loop.tasks import StopTraining, draw_and_log, due_after, run_pending_tasks
from diffusers_ddpm_ext.training.loop.threads import settle_threads
from diffusers_ddpm_ext.training.loop.trial import run_trial
from diffusers_ddpm_ext.training.loop.workload import workload_of
from diffusers_ddpm_ext.training.signals import handle_signals
from diffusers_ddpm_ext.training.tracking.console import describe_end
from diffusers_ddpm_ext.training.tracking.plan import describe_trial
from diffusers_ddpm_ext.training.tracking.step_losses import LossMeter
from diffusers_ddpm_ext.utils.files import CONFIG, ENVIRONMENT, write_text_atomically

MAX_PROMPTS = 9
"""Prompts of preview images in ``environment.json``, for the model card."""


def train(config: TrainConfig) -> Path | None:
    """Train a model and save its pipeline in the run's folder.

    Args:
        config: as parsed.

    Returns:
        The folder; None for a dry run, which writes nothing.

    Raises:
        ConfigError: an option cannot be satisfied; nothing was written.
        RunError: the run had started and cannot continue.
        SystemExit: a signal requested the end, with its status; a checkpoint has been written.
    """
    start_time = time.monotonic()
    config = move_token_to_environment(config)
    setup = build_setup(config)
    accelerator, pushes = setup.accelerator, config.hub.push_to_hub
    if config.loop.dry_run:
        settle_scale(setup, None)
        settle_attention(setup, RunProgress())
        accelerator.print(printable_lines(describe_run(setup, None, settle_threads(setup, RunProgress()))))
        accelerator.print(describe_trial(run_trial(setup), setup.plan))
        end_training(accelerator, config.output.report_to)
        return None
    setup = open_latent_cache(setup)
    open_text_cache(setup)
    folder, lock = acquire_folder(config, accelerator)
    publisher = Publisher(folder, config.hub) if accelerator.is_main_process and pushes else None
    try:
        progress = resume(setup, folder)
        if progress is not None:
            settle_scale(setup, progress.latent_scale)
            settle_attention(setup, progress)
            with handle_signals() as signals:
                threads = settle_threads(setup, progress)
                with fail_together(accelerator):
                    write_run_files(setup, folder)
                accelerator.print(printable_lines(describe_run(setup, folder, threads)))
                logger = open_metrics_logger(setup, folder, progress)
                run = Run(setup, folder, lock, publisher, signals, LossMeter(), logger, progress)
                run_training(run, start_time)
        if publisher is not None:
            accelerator.print(publisher.push_final())
    finally:
        if publisher is not None:
            publisher.terminate()
        if lock is not None:
            lock.release()
    end_training(accelerator, config.output.report_to)
    return folder


def run_training(run: Run, start_time: float) -> None:
    """Do everything that remains of a run, which is before its first step or where it resumes.

    A RunError ends it where it cannot continue; SystemExit where a signal requested the end.
    """
    setup, accelerator, progress = run.setup, run.setup.accelerator, run.progress
    workload = workload_of(setup)
    if progress.step == 0:
        draw_and_log(run, workload.draw_data, workload.data_images)
        if setup.config.loop.on_nonfinite == "rollback":
            save_checkpoint(run)  # for a rollback before the first regular checkpoint
    try:
        fit(run, RequestPoller(accelerator, setup.config.checkpoint, run.signals, start_time))
    except StopTraining as stop:
        run.logger.progress_bar.close()
        accelerator.print(describe_stop(stop, progress.step, setup.plan.steps))
        if stop.signal:
            end_training(accelerator, setup.config.output.report_to)
            raise SystemExit(128 + stop.signal) from None
        return
    run.logger.progress_bar.close()
    in_latents = setup.latents is not None
    accelerator.print(describe_end(time.monotonic() - start_time, setup.monitor, progress.last_bound, in_latents))
    with fail_together(accelerator):
        if accelerator.is_main_process:
            mark_finished(run.folder, progress.step, progress.stopped_early)
    accelerator.print(printable_lines(workload.describe_end(setup, run.folder)))


def fit(run: Run, poller: RequestPoller) -> None:
    """Train from the run's present step, or the pending tasks of that step, to its end.

    Raises:
        StopTraining: the end was requested; a checkpoint has been written.
    """
    setup, progress = run.setup, run.progress
    steps, rule = setup.plan.steps, setup.config.loop.on_nonfinite
    batches = RunBatches(run)
    setup.task.train()
    with run.logger.stopwatch.stopped():
        run_pending_tasks(run, poller)
    while progress.step < steps and not progress.stopped_early:
        trace = train_step(setup, progress.step, batches)
        progress.step += 1
        batches.note_lanes()
        run.meter.add(trace)
        run.logger.progress_bar.update()
        request = poller.poll()
        due, applied = due_after(progress.step, setup.config, setup.plan, request), True
        if rule != "stop" and (trace.skipped is None or due.log_losses):
            applied = settle(run)
            if batches.rewind():
                due = due_after(progress.step, setup.config, setup.plan, request)
        progress.pending = list(due.tasks)
        if due.log_losses:
            log_losses(run)
        with run.logger.stopwatch.stopped():
            if due.checkpoint:
                written = save_checkpoint(run)
                if written and applied:
                    progress.recoveries = 0
                if run.publisher is not None and run.publisher.with_checkpoint and progress.step < steps:
                    run.publisher.push_in_background(progress.step)
                if request.stop:
                    raise StopTraining(request.signal, written)
            run_pending_tasks(run, poller)


def write_run_files(setup: Setup, folder: Path) -> None:
    """Write the options, and for the model card versions, device and images, in the main process."""
    if not setup.accelerator.is_main_process:
        return
    device, data = setup.accelerator.device, setup.data
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    facts = environment_versions() | {
        "device": f"{setup.plan.processes} x {name}",
        "num_threads": torch.get_num_threads(),
        "data": {
            "name": run_name(setup.config.data),
            "train": len(data.train) if data.stream is None else data.stream.opened.rows.num_rows,
            "validation": 0 if data.validation is None else len(data.validation),
            "fingerprint": data.fingerprint,
        },
    }
    if classes := count_classes(data):
        facts["data"]["classes"] = [{"name": each.name, "images": each.train} for each in classes]
    if setup.captions is not None:
        facts["data"]["prompts"] = preview_prompts(setup, range(MAX_PROMPTS))
    with as_run_error(folder):
        setup.config.write_resolved(folder / CONFIG)
        write_text_atomically(folder / ENVIRONMENT, json.dumps(facts, indent=2) + "\n")


def describe_stop(stop: StopTraining, step: int, steps: int) -> str:
    """Why a run ends before its last step, and how to resume it."""
    reason = signal.Signals(stop.signal).name if stop.signal else "--max_train_minutes"
    checkpoint = "no checkpoint could be written, the older ones stay"
    if stop.checkpoint_written:
        checkpoint = f"checkpoint-{step} is written"
    return (
        f"{reason}: stopped after step {step:,} of {steps:,}; {checkpoint}. "
        "To resume: the same command with --resume_from_checkpoint latest"
    )


def end_training(accelerator: Accelerator, report_to: str) -> None:
    """Close the trackers and leave the other processes; a failing tracker is a warning, since the run is complete."""
    try:
        accelerator.end_training()
    except Exception as error:
        warn(f"--report_to {report_to}: {' '.join(f'{type(error).__name__} {error}'.split())}")

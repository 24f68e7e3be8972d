"""Saving during a run: checkpoints, the best pipeline, and the mark of a finished run.

A full disk or a folder that cannot be written costs a checkpoint, never the run: one warning, and the older
checkpoints stay.
"""

from __future__ import annotations

import json
import secrets
import shutil
from functools import partial
from pathlib import Path

from diffusers_ddpm_ext.errors import RunError, as_run_error, warn
from diffusers_ddpm_ext.training.checkpoints import snapshot as snapshots
from diffusers_ddpm_ext.training.checkpoints.folders import checkpoint_step, delete_checkpoint, prune_checkpoints
from diffusers_ddpm_ext.training.checkpoints.state import capture_snapshot
from diffusers_ddpm_ext.training.checkpoints.writer import write_checkpoint
from diffusers_ddpm_ext.training.distributed import any_rank, fail_together
from diffusers_ddpm_ext.training.loop.export import ExportedNetworks
from diffusers_ddpm_ext.training.loop.resume import BEST, FINISHED, MONITOR, saved_progress, training_objects
from diffusers_ddpm_ext.training.loop.run import Run, Task
from diffusers_ddpm_ext.training.loop.setup import Setup
from diffusers_ddpm_ext.training.loop.workload import workload_of
from diffusers_ddpm_ext.training.tracking.console import print_line
from diffusers_ddpm_ext.training.tracking.monitor import Monitor, MonitorDecision
from diffusers_ddpm_ext.utils.files import replace_folder, write_text_atomically
from diffusers_ddpm_ext.utils.folder_lock import FolderBusy, FolderLock
from diffusers_ddpm_ext.utils.generations import carry_over, foreign_files


def save_checkpoint(run: Run, announce: bool = True) -> bool:
    """Write a checkpoint of this step, then delete those beyond the limit; False if not written. Collective call.

    A line is printed unless ``announce`` is false.

    Raises:
        RunError: another run has acquired the folder; in the main process.
    """
    setup, step = run.setup, run.progress.step
    accelerator, written = setup.accelerator, True
    progress = saved_progress(setup, run.progress, run.logger.metrics_size)
    snapshot = capture_snapshot(training_objects(setup), progress, share_memory=True)
    with fail_together(accelerator):
        if accelerator.is_main_process and snapshot is not None:
            renew_lock(run.lock)
            try:
                run.logger.sync()
                write_checkpoint(run.folder, step, partial(snapshots.write_snapshot, snapshot))
                delete_old_checkpoints(
                    run.folder, step, setup.config.checkpoint.checkpoints_total_limit, setup.monitor
                )
                if announce:
                    print_line(f"step {step:,}: checkpoint-{step} is written")
            except OSError as error:
                warn(str(error))
                written = False
    run.signals.clear()
    return not any_rank(accelerator, not written)


def renew_lock(lock: FolderLock | None) -> None:
    """Check that the folder is still locked by this run; a RunError where another run has acquired it."""
    if lock is not None:
        try:
            lock.renew()
        except FolderBusy as error:
            raise RunError(f"the run ends without writing any more: {error}") from None


def delete_old_checkpoints(folder: Path, step: int, limit: int | None, monitor: Monitor | None) -> None:
    """Delete the checkpoints that neither the limit nor the monitor keeps, apart from the newest, of ``step``."""
    if limit is not None:
        best = [] if monitor is None else [entry.step for entry in monitor.top if entry.step != step]
        prune_checkpoints(folder, limit, best)


def save_top_checkpoint(run: Run, decision: MonitorDecision) -> None:
    """Write the checkpoint of a validation that is among the best. Collective call.

    The pipeline of the very best is a separate task that the checkpoint contains: a run that is killed in between
    writes it after it resumes.
    """
    if not decision.in_top_k:
        return
    if decision.best:
        run.progress.pending = [Task.BEST, *run.progress.pending]
    save_checkpoint(run, announce=False)  # the line of the validation says that it is among the best
    evicted = decision.evicted_step
    if evicted is None or not run.setup.accelerator.is_main_process:
        return
    every = run.setup.config.checkpoint.checkpointing_steps
    path = run.folder / f"checkpoint-{evicted}"
    try:
        if (every is None or evicted % every) and path.is_dir() and checkpoint_step(path) != run.progress.step:
            delete_checkpoint(path)  # it was kept only because it was among the best
    except OSError as error:
        warn(f"{path.name} could not be deleted ({error.strerror or error})")


def save_best_pipeline(setup: Setup, folder: Path, step: int) -> None:
    """Save the pipeline of the present weights, the best so far, in the folder ``best``. Collective call."""
    networks = workload_of(setup).export(setup)
    if networks is not None and setup.monitor is not None:
        try:
            _write_best(setup, folder, step, networks, setup.monitor)
        except OSError as error:
            warn(f"{folder / BEST} could not be written ({error.strerror or error}); the previous one stays")
    setup.accelerator.wait_for_everyone()


def _write_best(setup: Setup, folder: Path, step: int, networks: ExportedNetworks, monitor: Monitor) -> None:
    if monitor.best is None:
        return
    draft = folder / f".writing-{step}-{secrets.token_hex(4)}"
    draft.mkdir()
    try:
        workload_of(setup).save(setup, draft, networks, warn=False)
        facts = {"format": 1, "monitor": monitor.name, "mode": monitor.mode, "step": step, "value": monitor.best.value}
        write_text_atomically(draft / MONITOR, json.dumps(facts, indent=1) + "\n")
        carry_over(folder / BEST, draft, foreign_files(folder / BEST))
        replace_folder(draft, folder / BEST)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def mark_finished(folder: Path, step: int, stopped_early: bool) -> None:
    """Record that a run is finished, so that the same command does not start it again; a RunError on a full disk."""
    facts = {"format": 1, "step": step, "stopped_early": stopped_early}
    with as_run_error(folder / FINISHED):
        write_text_atomically(folder / FINISHED, json.dumps(facts) + "\n")

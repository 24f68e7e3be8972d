"""What a run keeps: checkpoints while it lasts, and the best pipeline.

A disk that is full or a folder that cannot be written costs a checkpoint, never the run: one warning, and the older
checkpoints still stand.
"""

from __future__ import annotations

import json
import secrets
import shutil
from functools import partial

from torch import Tensor

from diffusers_ddpm_ext.errors import RunError, warn
from diffusers_ddpm_ext.losses.logvar import ContinuousLogvar
from diffusers_ddpm_ext.training.checkpoints import snapshot as snapshots
from diffusers_ddpm_ext.training.checkpoints import state
from diffusers_ddpm_ext.training.checkpoints.folders import checkpoint_step, delete_checkpoint, prune_checkpoints
from diffusers_ddpm_ext.training.checkpoints.lock import FolderBusy
from diffusers_ddpm_ext.training.checkpoints.writer import write_checkpoint
from diffusers_ddpm_ext.training.distributed import any_rank, fail_together
from diffusers_ddpm_ext.training.loop.export import Networks, save_pipeline, take_networks
from diffusers_ddpm_ext.training.loop.resume import BEST, FINISHED, MONITOR, live, progress_of
from diffusers_ddpm_ext.training.loop.run import Run, take_logvar
from diffusers_ddpm_ext.training.tracking.metrics import MetricsLogger
from diffusers_ddpm_ext.training.tracking.monitor import MonitorDecision
from diffusers_ddpm_ext.utils.files import replace_folder, write_text_atomically


def keep(run: Run, logger: MetricsLogger) -> bool:
    """Write a checkpoint of the present step, and then drop those beyond the limit; all processes enter.

    Args:
        run: after a step, its losses read.
        logger: of the run.

    Returns:
        Whether it stands; the same in all processes.

    Raises:
        RunError: another run has taken the folder; in the first process.
    """
    accelerator, stands = run.accelerator, True
    snapshot = state.capture_snapshot(live(run), progress_of(run, logger.metrics_size), share_memory=True)
    with fail_together(accelerator):
        if accelerator.is_main_process and snapshot is not None:
            hold_folder(run)
            try:
                logger.sync()
                write_checkpoint(run.taken_folder, run.step, partial(snapshots.write_snapshot, snapshot))
                drop(run)
            except OSError as error:
                warn(str(error))
                stands = False
    run.requests.clear()
    return not any_rank(accelerator, not stands)


def hold_folder(run: Run) -> None:
    """Make sure that the folder is still this run's before anything is written into it.

    Args:
        run: in its first process.

    Raises:
        RunError: another run has taken it.
    """
    if run.lock is not None:
        try:
            run.lock.renew()
        except FolderBusy as error:
            raise RunError(f"the run ends without writing any more: {error}") from None


def drop(run: Run) -> None:
    """Delete the checkpoints that neither the limit nor the monitor keeps.

    Args:
        run: whose newest checkpoint stands.

    Raises:
        OSError: one cannot be deleted.
    """
    limit = run.config.checkpoint.checkpoints_total_limit
    if limit is not None:
        best = () if run.monitor is None else [entry.step for entry in run.monitor.top if entry.step != run.step]
        prune_checkpoints(run.taken_folder, limit, best)


def keep_best(run: Run, logger: MetricsLogger, decision: MonitorDecision) -> None:
    """Keep the checkpoint of a validation that is among the best; all processes enter.

    The best one's pipeline is a task of its own, and the checkpoint says so: a run that dies in between makes it anew.

    Args:
        run: after a validation.
        logger: of the run.
        decision: of its monitor.
    """
    if not decision.in_top_k:
        return
    if decision.best:
        run.todo = [BEST, *run.todo]
    keep(run, logger)
    if decision.evicted_step is None or not run.accelerator.is_main_process:
        return
    try:
        _drop_former(run, decision.evicted_step)
    except OSError as error:
        warn(f"checkpoint-{decision.evicted_step} could not be deleted ({error.strerror or error})")


def keep_best_pipeline(run: Run) -> bool:
    """Put the pipeline of the present weights, the best so far, into the folder ``best``; all processes enter.

    Args:
        run: after the validation that was the best.

    Returns:
        True: it is done, or cannot be.
    """
    networks, logvar = take_pipeline(run)
    if networks is not None:
        try:
            _export_best(run, networks, logvar)
        except OSError as error:
            warn(f"{run.taken_folder / BEST} could not be written ({error.strerror or error}); the former one stands")
    run.accelerator.wait_for_everyone()
    return True


def _drop_former(run: Run, step: int) -> None:
    """Delete a checkpoint that stood only because it was among the best."""
    every = run.config.checkpoint.checkpointing_steps
    path = run.taken_folder / f"checkpoint-{step}"
    if (every is None or step % every) and path.is_dir() and checkpoint_step(path) != run.step:
        delete_checkpoint(path)


def take_pipeline(run: Run) -> tuple[Networks | None, Tensor | None]:
    """Networks and log-variances of a run, to be saved by the first process; all processes enter.

    Args:
        run: after a step.

    Returns:
        The networks, None but in the first process; the log-variances, None where they are not learned.
    """
    return take_networks(run.denoiser, run.ema), take_logvar(run)


def logvar_network(run: Run) -> ContinuousLogvar | None:
    """The function that the log-variances are, where they are one and it is not spread over processes."""
    network = run.parts.objective.logvar_network
    return None if run.is_sharded else network


def _export_best(run: Run, networks: Networks, logvar: Tensor | None) -> None:
    folder, monitor = run.taken_folder, run.monitor
    if monitor is None or monitor.best is None:
        return
    draft = folder / f".writing-{run.step}-{secrets.token_hex(4)}"
    draft.mkdir()
    try:
        save_pipeline(draft, networks, run.parts.scheduler, logvar, run.parts.pipeline_kwargs, logvar_network(run))
        facts = {
            "format": 1,
            "monitor": monitor.name,
            "mode": monitor.mode,
            "step": run.step,
            "value": monitor.best.value,
        }
        (draft / MONITOR).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        replace_folder(draft, folder / BEST)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def mark_finished(run: Run) -> None:
    """Note that a run came to its end, so that a restart of the same line does not begin again.

    Args:
        run: at its end, its pipeline saved.
    """
    facts = {"format": 1, "step": run.step, "stopped_early": run.stopped_early}
    write_text_atomically(run.taken_folder / FINISHED, json.dumps(facts) + "\n")

"""Resuming a run: which checkpoint, whether it belongs to this run, and the exact state it holds.

Only the main process finds and reads a checkpoint; all processes load its state together.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from diffusers_ddpm_ext.errors import ConfigError, as_config_error, as_run_error, printable, warn
from diffusers_ddpm_ext.training.checkpoints import snapshot as snapshots
from diffusers_ddpm_ext.training.checkpoints.facts import check_facts
from diffusers_ddpm_ext.training.checkpoints.folders import move_aside, move_newer_aside, newest, remove_leftovers
from diffusers_ddpm_ext.training.checkpoints.identity import (
    SCALE_IDENTITY,
    changed_options,
    refuse_changes,
    run_identity,
)
from diffusers_ddpm_ext.training.checkpoints.manifest import (
    Checkpoint,
    DamagedCheckpoint,
    NewerCheckpointFormat,
    verify,
)
from diffusers_ddpm_ext.training.checkpoints.restore import restore_snapshot
from diffusers_ddpm_ext.training.checkpoints.snapshot import Snapshot
from diffusers_ddpm_ext.training.checkpoints.state import TrainingObjects
from diffusers_ddpm_ext.training.checkpoints.state_file import STATE_FILE, Progress, read_state
from diffusers_ddpm_ext.training.data.latent_scale import restored_stage, scale_settings
from diffusers_ddpm_ext.training.distributed import fail_together
from diffusers_ddpm_ext.training.loop.batches import restored_lanes, stream_state
from diffusers_ddpm_ext.training.loop.run import RunProgress, Task
from diffusers_ddpm_ext.training.loop.setup import Setup
from diffusers_ddpm_ext.training.tracking.monitor import Monitor
from diffusers_ddpm_ext.utils.files import METRICS, write_atomically
from diffusers_ddpm_ext.utils.input_files import read_json_object

FINISHED = "finished.json"
BEST = "best"
MONITOR = "monitor.json"


def training_objects(setup: Setup) -> TrainingObjects:
    """The objects whose state a checkpoint holds."""
    return TrainingObjects(setup.task, setup.optimizer, setup.lr_scheduler, setup.ema, setup.accelerator.scaler)


def own_identity(setup: Setup) -> dict[str, Any]:
    """`run_identity` of this run."""
    first_stage = None if setup.latents is None else setup.latents.content_hash
    text_encoder = None if setup.captions is None else setup.captions.content_hash
    return run_identity(setup.config, setup.plan.effective_batch, setup.plan.steps, first_stage, text_encoder)


def resume(setup: Setup, folder: Path) -> RunProgress | None:
    """Load the newest, best or named checkpoint, where the options request it. Collective call.

    Returns:
        The progress of the run, at step 0 without a checkpoint; None where the run is finished. The same in all
        processes.

    Raises:
        ConfigError: the checkpoint does not exist, or belongs to another run; in the main process. Nothing is changed.
    """
    config, accelerator = setup.config, setup.accelerator
    requested = config.checkpoint.resume_from_checkpoint
    if config.hub.resume_from_hub is not None:
        requested = "latest"
    if requested is None:
        return RunProgress()
    status = [(False, False)]
    snapshot: Snapshot | None = None
    with fail_together(accelerator):
        if accelerator.is_main_process:
            checkpoint = find_checkpoint(folder, requested)
            snapshot = None if checkpoint is None else read_matching_snapshot(setup, folder, checkpoint)
            finished = is_finished(folder, setup.plan.steps, snapshot)
            if checkpoint is not None and not finished:
                with as_run_error(folder):
                    make_newest(folder, checkpoint)
            status = [(checkpoint is not None, finished)]
    broadcast_object_list(status)
    exists, finished = status[0]
    if finished:
        text = f"{folder} is finished: nothing is left to do. For more steps raise --max_train_steps."
        accelerator.print(printable(text))
        return None
    if exists:
        with fail_together(accelerator), as_config_error("--resume_from_checkpoint"):
            saved = restore_snapshot(snapshot, training_objects(setup), config.checkpoint.allow_config_change)
        progress = restore_progress(saved, setup.monitor)
        progress.latent_scale = own_scale(setup, saved)
        progress.lanes = restored_lanes(setup, saved.records)
        source = requested if requested not in ("latest", "auto", BEST) else f"checkpoint-{progress.step}"
        accelerator.print(
            printable(f"{folder} resumes from {source}, resuming from step {progress.step:,} of {setup.plan.steps:,}")
        )
        return progress
    if setup.ckpt_path_missing:
        raise ConfigError(
            f"--ckpt_path {config.start.ckpt_path} does not exist, and there is no checkpoint to resume from: give"
            " the file"
        )
    return RunProgress()


def find_checkpoint(folder: Path, requested: str) -> Checkpoint | None:
    """Find the requested checkpoint, ``latest``, ``auto``, ``best`` or a path; None for ``auto`` without one.

    Damaged ones are reported and set aside, leftovers of a killed run deleted.

    Raises:
        ConfigError: there is none.
    """
    try:
        remove_leftovers(folder)
        if requested in ("latest", "auto"):
            return _find_newest(folder, requested)
        return verify(_best_checkpoint(folder) if requested == BEST else Path(requested))
    except DamagedCheckpoint as error:
        raise ConfigError(
            f"--resume_from_checkpoint {requested}: {error}; use latest for the newest intact one"
        ) from None
    except (NewerCheckpointFormat, OSError) as error:
        raise ConfigError(f"--resume_from_checkpoint {requested}: {error}") from None


def _find_newest(folder: Path, requested: str) -> Checkpoint | None:
    search = newest(folder)
    for path, reason in search.damaged:
        # Files and links of this name are not ours.
        is_ours = path.is_dir() and not path.is_symlink()
        warn(f"{reason}; set aside as {move_aside(path, reason).name}" if is_ours else f"{reason}; it is ignored")
    if search.checkpoint is None and requested == "latest":
        raise ConfigError(
            f"--resume_from_checkpoint latest: {folder} holds no intact checkpoint; use auto to start a new run then"
        )
    return search.checkpoint


def _best_checkpoint(folder: Path) -> Path:
    try:
        step = read_json_object(folder / BEST / MONITOR).integer("step", low=0, high=10**18 - 1)
    except ConfigError as error:
        raise ConfigError(f"--resume_from_checkpoint best: {str(error).rstrip('.')}; use latest") from None
    return folder / f"checkpoint-{step}"


def read_matching_snapshot(setup: Setup, folder: Path, checkpoint: Checkpoint) -> Snapshot:
    """Read a checkpoint of this run; a ConfigError where it is unreadable or forged, or options have changed."""
    try:
        snapshot = read_checkpoint(setup, folder, checkpoint)
    except ValueError as error:
        text = str(error).removeprefix("--resume_from_checkpoint: ")
        raise ConfigError(f"--resume_from_checkpoint: {text}") from None
    if snapshot.progress.step > setup.plan.steps:
        raise ConfigError(
            f"--resume_from_checkpoint: {checkpoint.path.name} is beyond --max_train_steps {setup.plan.steps}: raise"
            " it, or name an earlier checkpoint"
        )
    return snapshot


def read_checkpoint(setup: Setup, folder: Path, checkpoint: Checkpoint) -> Snapshot:
    """Read a snapshot and compare it with its manifest and with the run.

    Raises:
        ValueError: it cannot be read, or states what no run writes.
        ConfigError: it is of a run with other options or images.
    """
    progress = read_state(checkpoint.path).progress
    file, may_change = checkpoint.path / STATE_FILE, setup.config.checkpoint.allow_config_change
    if progress.step != checkpoint.step:
        raise ValueError(f"{file}: progress.step is {progress.step}, and the manifest has {checkpoint.step}")
    if not may_change:
        changed = changed_options(own_identity(setup), progress.config)
        if progress.data_fingerprint != setup.data.fingerprint:
            changed.append("the images or their conditions are not those of the run")
        refuse_changes(changed, folder)
        epoch = setup.plan.epoch(progress.step)
        if progress.epoch != epoch:
            raise ValueError(f"{file}: progress.epoch is {progress.epoch}, and its samples make {epoch}")
    snapshot = snapshots.read_snapshot(checkpoint.path)
    try:
        restore_progress(progress, copy.deepcopy(setup.monitor))
        restored_lanes(setup, progress.records)
        scale = own_scale(setup, progress)
        if setup.latents is not None and scale is not None:
            restored_stage(setup.latents.stage, scale)
        check_facts(snapshot, training_objects(setup), may_change)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from None
    return snapshot


def is_finished(folder: Path, steps: int, snapshot: Snapshot | None) -> bool:
    """Whether the folder's run has ended, and a run of ``steps`` that resumes from the snapshot ends there, too."""
    try:
        finished = read_json_object(folder / FINISHED)
        step = finished.integer("step")
        at_end = snapshot is None or step == snapshot.progress.step
        return at_end and (finished.boolean("stopped_early") or step >= steps)
    except ConfigError:
        return False


def make_newest(folder: Path, checkpoint: Checkpoint) -> None:
    """Make a checkpoint the newest of the run's folder: set newer ones aside, and use its metrics."""
    (folder / FINISHED).unlink(missing_ok=True)
    for path in move_newer_aside(folder, checkpoint.step):
        warn(f"set aside as {path.name}: it is newer than step {checkpoint.step}")
    source = checkpoint.path.parent / METRICS
    if checkpoint.path.resolve().parent != folder.resolve() and source.is_file():
        with source.open("rb") as rows:
            write_atomically(folder / METRICS, lambda file: shutil.copyfileobj(rows, file))


def own_scale(setup: Setup, saved: Progress) -> dict[str, Any] | None:
    """The scale of a checkpoint's latents, if this run's are scaled alike; None where it must be settled anew.

    Raises:
        ValueError: the checkpoint has no scale, or one that no run writes.
    """
    own = own_identity(setup)
    if setup.latents is None or any(own[name] != saved.config.get(name) for name in SCALE_IDENTITY):
        return None
    scale = saved.records.get("latent_scale")
    if not isinstance(scale, dict):
        raise ValueError("progress.records.latent_scale is missing")
    return scale


def saved_progress(setup: Setup, progress: RunProgress, metrics_size: int) -> Progress:
    """The progress of a run in the form of a checkpoint; ``metrics_size`` is in bytes. Collective call."""
    stream = stream_state(setup, progress.lanes)
    return Progress(
        step=progress.step,
        epoch=setup.plan.epoch(progress.step),
        samples=progress.step * setup.plan.effective_batch,
        seed=setup.seed,
        world_size=setup.accelerator.num_processes,
        config=own_identity(setup),
        data_fingerprint=setup.data.fingerprint,
        records={
            "metrics_size": metrics_size,  # read by earlier versions; the rows before a step are known by their steps
            "todo": [task.value for task in progress.pending],
            "stopped_early": progress.stopped_early,
            "recoveries": progress.recoveries,
            "fast_attention": bool(progress.fast_attention),
        }
        | ({} if setup.latents is None else {"latent_scale": scale_settings(setup.latents.stage)})
        | ({} if stream is None else {"stream": stream})
        | ({} if progress.threads is None else {"threads": dict(progress.threads)}),
        monitor=None if setup.monitor is None else setup.monitor.state_dict(),
    )


def restore_progress(saved: Progress, monitor: Monitor | None) -> RunProgress:
    """The inverse of `saved_progress`; the monitor gets the state of the checkpoint's.

    Raises:
        ValueError: the monitor's state, or the name of a task, is not one that a run writes.
    """
    if monitor is not None and saved.monitor is not None:
        monitor.load_state_dict(saved.monitor, saved.step)
    return RunProgress(
        step=saved.step,
        pending=[Task(name) for name in saved.records.get("todo", [])],
        stopped_early=bool(saved.records.get("stopped_early", False)),
        recoveries=int(saved.records.get("recoveries", 0)),
        threads=saved.records.get("threads", {}),
        fast_attention=saved.records.get("fast_attention", False),
    )

"""Resuming a run: which checkpoint, whether it belongs to this run, and the exact state it holds.

Only the main process finds and reads a checkpoint; all processes load its state together.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from diffusers_ddpm_ext.errors import ConfigError, warn
from diffusers_ddpm_ext.training.checkpoints import snapshot as snapshots
from diffusers_ddpm_ext.training.checkpoints.folders import move_aside, move_newer_aside, newest, remove_leftovers
from diffusers_ddpm_ext.training.checkpoints.manifest import (
    Checkpoint,
    DamagedCheckpoint,
    NewerCheckpointFormat,
    verify,
)
from diffusers_ddpm_ext.training.checkpoints.restore import restore_snapshot
from diffusers_ddpm_ext.training.checkpoints.snapshot import Progress, Snapshot
from diffusers_ddpm_ext.training.checkpoints.state import TrainingObjects
from diffusers_ddpm_ext.training.config.options import OPTIONS
from diffusers_ddpm_ext.training.config.train_config import TrainConfig
from diffusers_ddpm_ext.training.distributed import fail_together
from diffusers_ddpm_ext.training.loop.run import RunProgress, Task
from diffusers_ddpm_ext.training.loop.setup import Setup
from diffusers_ddpm_ext.training.tracking.monitor import Monitor
from diffusers_ddpm_ext.training.tracking.plan import Plan
from diffusers_ddpm_ext.utils.files import METRICS, write_atomically

FINISHED = "finished.json"
BEST = "best"
MONITOR = "monitor.json"
# Sections and options that determine the weights. The others determine when something is written, drawn or read.
MODEL_SECTIONS = ("model", "start", "schedule", "objective", "optim", "ema")
MODEL_OPTIONS = (
    "resolution", "center_crop", "random_flip", "channels", "mixed_precision", "seed",
    "class_column", "concat_column", "context_column", "conditioning_dropout",
)  # fmt: skip
SCHEDULES_WITHOUT_END = (
    "constant",
    "constant_with_warmup",
    "piecewise_constant",
    "LambdaWarmUpCosineScheduler",
    "LambdaWarmUpCosineScheduler2",
    "LambdaLinearScheduler",
)


def training_objects(setup: Setup) -> TrainingObjects:
    """The objects whose state a checkpoint holds."""
    return TrainingObjects(setup.task, setup.optimizer, setup.lr_scheduler, setup.ema, setup.accelerator.scaler)


def run_identity(config: TrainConfig, plan: Plan) -> dict[str, Any]:
    """Every option that determines a run's results, as JSON: stored in a checkpoint, and compared with it."""
    chosen = {name: value for section in MODEL_SECTIONS for name, value in vars(getattr(config, section)).items()}
    chosen |= {name: value for name, value in config.to_flat_dict().items() if name in MODEL_OPTIONS}
    chosen["effective_batch"] = plan.effective_batch
    if config.optim.lr_scheduler not in SCHEDULES_WITHOUT_END:
        chosen["max_train_steps"] = plan.steps
    plain: dict[str, Any] = json.loads(json.dumps(chosen))
    return plain


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
                make_newest(folder, checkpoint)
            status = [(checkpoint is not None, finished)]
    broadcast_object_list(status)
    exists, finished = status[0]
    if finished:
        accelerator.print(f"{folder} is finished: nothing is left to do. For more steps raise --max_train_steps.")
        return None
    if exists:
        with fail_together(accelerator):
            saved = restore_snapshot(snapshot, training_objects(setup), config.checkpoint.allow_config_change)
        progress = restore_progress(saved, setup.monitor)
        accelerator.print(f"resuming from step {progress.step:,}")
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
    remove_leftovers(folder)
    try:
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
        step = int(json.loads((folder / BEST / MONITOR).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"--resume_from_checkpoint best: {folder / BEST} names no checkpoint; use latest") from None
    return folder / f"checkpoint-{step}"


def read_matching_snapshot(setup: Setup, folder: Path, checkpoint: Checkpoint) -> Snapshot:
    """Read a checkpoint of this run; a ConfigError where it is unreadable or options have changed."""
    try:
        snapshot = snapshots.read_snapshot(checkpoint.path)
    except ValueError as error:
        raise ConfigError(f"--resume_from_checkpoint: {error}") from None
    if setup.config.checkpoint.allow_config_change:
        return snapshot
    changed = changed_options(run_identity(setup.config, setup.plan), snapshot.progress.config)
    if snapshot.progress.data_fingerprint != setup.data.fingerprint:
        changed.append("the images are not those of the run")
    if changed:
        raise ConfigError(
            f"--resume_from_checkpoint: {'; '.join(changed)}. Repeat the run's options (--config "
            f"{folder / 'config.yaml'}), or add --allow_config_change"
        )
    return snapshot


def changed_options(own: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """One phrase per option that differs between this run and a checkpoint."""
    names = [*own, *(name for name in saved if name not in own)]
    # A checkpoint of an older version lacks an option that is new; its run used the default.
    was = {name: saved[name] if name in saved else _default(name) for name in names}
    return [f"--{name} is {own.get(name)} and was {was[name]}" for name in names if own.get(name) != was[name]]


def _default(name: str) -> Any:
    return OPTIONS[name].default if name in OPTIONS else None


def is_finished(folder: Path, steps: int, snapshot: Snapshot | None) -> bool:
    """Whether the folder's run has ended, and a run of ``steps`` that resumes from the snapshot ends there, too."""
    try:
        finished = json.loads((folder / FINISHED).read_text(encoding="utf-8"))
        at_end = snapshot is None or finished["step"] == snapshot.progress.step
        return at_end and bool(finished["stopped_early"] or finished["step"] >= steps)
    except (OSError, ValueError, KeyError, TypeError):
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


def saved_progress(setup: Setup, progress: RunProgress, metrics_size: int) -> Progress:
    """The progress of a run in the form of a checkpoint; ``metrics_size`` is in bytes."""
    samples = progress.step * setup.plan.effective_batch
    return Progress(
        step=progress.step,
        epoch=samples // setup.plan.images,
        samples=samples,
        seed=setup.seed,
        world_size=setup.accelerator.num_processes,
        config=run_identity(setup.config, setup.plan),
        data_fingerprint=setup.data.fingerprint,
        records={
            "metrics_size": metrics_size,  # read by earlier versions; the rows before a step are known by their steps
            "todo": [task.value for task in progress.pending],
            "stopped_early": progress.stopped_early,
            "recoveries": progress.recoveries,
        },
        monitor=None if setup.monitor is None else setup.monitor.state_dict(),
    )


def restore_progress(saved: Progress, monitor: Monitor | None) -> RunProgress:
    """The inverse of `saved_progress`; the monitor gets the state of the checkpoint's."""
    if monitor is not None and saved.monitor is not None:
        monitor.load_state_dict(saved.monitor)
    return RunProgress(
        step=saved.step,
        pending=[Task(name) for name in saved.records.get("todo", [])],
        stopped_early=bool(saved.records.get("stopped_early", False)),
        recoveries=int(saved.records.get("recoveries", 0)),
    )

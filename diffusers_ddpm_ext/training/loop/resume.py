"""How a run goes on: which checkpoint, whether it is a checkpoint of this run, and back to the very bit.

The first process alone looks for a checkpoint and reads it; all of them put it back together.
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
from diffusers_ddpm_ext.training.checkpoints import state
from diffusers_ddpm_ext.training.checkpoints.folders import (
    move_aside,
    move_newer_aside,
    newest,
    remove_leftovers,
)
from diffusers_ddpm_ext.training.checkpoints.manifest import (
    Checkpoint,
    DamagedCheckpoint,
    NewerCheckpointFormat,
    verify,
)
from diffusers_ddpm_ext.training.checkpoints.restore import restore_snapshot
from diffusers_ddpm_ext.training.checkpoints.snapshot import Progress, Snapshot
from diffusers_ddpm_ext.training.config.options import OPTIONS
from diffusers_ddpm_ext.training.distributed import fail_together
from diffusers_ddpm_ext.training.loop.run import Run
from diffusers_ddpm_ext.utils.files import METRICS

FINISHED = "finished.json"
BEST = "best"
MONITOR = "monitor.json"
# Sections that decide the weights, and in the others the few options that do. What is left decides when something is
# written, shown or read.
MATHEMATICS = ("model", "start", "schedule", "objective", "optim", "ema")
ALSO = (
    "resolution", "center_crop", "random_flip", "channels", "mixed_precision", "seed",
    "class_column", "concat_column", "context_column", "conditioning_dropout",
)  # fmt: skip
COURSES_WITHOUT_END = (
    "constant",
    "constant_with_warmup",
    "piecewise_constant",
    "LambdaWarmUpCosineScheduler",
    "LambdaWarmUpCosineScheduler2",
    "LambdaLinearScheduler",
)


def live(run: Run) -> state.TrainingObjects:
    """The objects of a run that a checkpoint holds."""
    return state.TrainingObjects(run.task, run.optimizer, run.lr_scheduler, run.ema, run.accelerator.scaler)


def identity(run: Run) -> dict[str, Any]:
    """All that decides a run's numbers, as JSON: for the checkpoint, and to compare with one."""
    config = run.config
    chosen = {name: value for section in MATHEMATICS for name, value in vars(getattr(config, section)).items()}
    chosen |= {name: value for name, value in config.to_flat_dict().items() if name in ALSO}
    chosen["effective_batch"] = run.plan.effective_batch
    if config.optim.lr_scheduler not in COURSES_WITHOUT_END:
        chosen["max_train_steps"] = run.plan.steps
    plain: dict[str, Any] = json.loads(json.dumps(chosen))
    return plain


def resume(run: Run) -> bool:
    """Put a run where its newest, best or named checkpoint was written, if it is to go on from one.

    Args:
        run: with its folder, before its first step.

    Returns:
        Whether there is anything left to do; the same in all processes.

    Raises:
        ConfigError: there is no such checkpoint, or it is of another run; in the first process. Nothing is changed.
    """
    wanted = run.config.checkpoint.resume_from_checkpoint
    if run.config.hub.resume_from_hub is not None:
        wanted = "latest"
    if wanted is None:
        return True
    accelerator = run.accelerator
    found: list[tuple[bool, bool]] = [(False, False)]
    snapshot: Snapshot | None = None
    with fail_together(accelerator):
        if accelerator.is_main_process:
            checkpoint = find(run.taken_folder, wanted)
            snapshot = None if checkpoint is None else _read(run, checkpoint)
            done = _is_finished(run, snapshot)
            if checkpoint is not None and not done:
                _take_over(run, checkpoint)
            found = [(checkpoint is not None, done)]
    broadcast_object_list(found)
    exists, done = found[0]
    if done:
        accelerator.print(f"{run.folder} is finished: nothing is left to do. For more steps raise --max_train_steps.")
    elif not exists and run.start_is_missing:
        path = run.config.start.ckpt_path
        raise ConfigError(
            f"--ckpt_path {path} does not exist, and there is no checkpoint to go on from: give the file"
        )
    elif exists:
        with fail_together(accelerator):
            progress = restore_snapshot(snapshot, live(run), run.config.checkpoint.allow_config_change)
        _go_on(run, progress)
        accelerator.print(f"going on from step {run.step:,}")
    return not done


def find(folder: Path, wanted: str) -> Checkpoint | None:
    """The checkpoint that a person asks for. Damaged ones are named and set aside, leftovers of a dead run removed.

    Args:
        folder: of the run, locked.
        wanted: ``latest``, ``auto``, ``best`` or a path.

    Returns:
        A whole checkpoint; None for ``auto`` where there is none.

    Raises:
        ConfigError: there is none.
    """
    remove_leftovers(folder)
    try:
        if wanted in ("latest", "auto"):
            return _latest(folder, wanted)
        return verify(_best(folder) if wanted == BEST else Path(wanted))
    except DamagedCheckpoint as error:
        raise ConfigError(f"--resume_from_checkpoint {wanted}: {error}; say latest for the newest whole one") from None
    except (NewerCheckpointFormat, OSError) as error:
        raise ConfigError(f"--resume_from_checkpoint {wanted}: {error}") from None


def _latest(folder: Path, wanted: str) -> Checkpoint | None:
    search = newest(folder)
    for path, reason in search.damaged:
        warn(f"{reason}; set aside as {move_aside(path, reason).name}")
    if search.checkpoint is None and wanted == "latest":
        raise ConfigError(
            f"--resume_from_checkpoint latest: {folder} holds no whole checkpoint; say auto to start afresh then"
        )
    return search.checkpoint


def _best(folder: Path) -> Path:
    try:
        step = int(json.loads((folder / BEST / MONITOR).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"--resume_from_checkpoint best: {folder / BEST} names no checkpoint; say latest") from None
    return folder / f"checkpoint-{step}"


def _read(run: Run, checkpoint: Checkpoint) -> Snapshot:
    try:
        snapshot = snapshots.read_snapshot(checkpoint.path)
    except ValueError as error:
        raise ConfigError(f"--resume_from_checkpoint: {error}") from None
    if not run.config.checkpoint.allow_config_change:
        _refuse_changes(run, snapshot.progress)
    return snapshot


def _refuse_changes(run: Run, progress: Progress) -> None:
    """Refuse options that would change the mathematics, each by its name."""
    changed = differing(identity(run), progress.config)
    if progress.data_fingerprint != run.data.fingerprint:
        changed.append("the images are others than the run's")
    if changed:
        raise ConfigError(
            f"--resume_from_checkpoint: {'; '.join(changed)}. Repeat the run's options (--config "
            f"{run.taken_folder / 'config.yaml'}), or add --allow_config_change"
        )


def differing(own: Mapping[str, Any], held: Mapping[str, Any]) -> list[str]:
    """What options differ, in words.

    Args:
        own: of this run, from `identity`.
        held: of the checkpoint.

    Returns:
        One phrase an option.
    """
    names = [*own, *(name for name in held if name not in own)]
    # A checkpoint of an older version does not know an option that is new; its run was one with the default.
    was = {name: held[name] if name in held else _default(name) for name in names}
    return [f"--{name} is {own.get(name)} and was {was[name]}" for name in names if own.get(name) != was[name]]


def _default(name: str) -> Any:
    return OPTIONS[name].default if name in OPTIONS else None


def _is_finished(run: Run, snapshot: Snapshot | None) -> bool:
    """Whether the run in the folder came to its end, and its end is still this run's."""
    path = run.taken_folder / FINISHED
    try:
        finished = json.loads(path.read_text(encoding="utf-8"))
        at_end = snapshot is None or finished["step"] == snapshot.progress.step
        return at_end and bool(finished["stopped_early"] or finished["step"] >= run.plan.steps)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _take_over(run: Run, checkpoint: Checkpoint) -> None:
    """Make the checkpoint the newest of the run's folder, and the run's metrics what it knows of."""
    folder = run.taken_folder
    (folder / FINISHED).unlink(missing_ok=True)
    for path in move_newer_aside(folder, checkpoint.step):
        warn(f"set aside as {path.name}: it is newer than step {checkpoint.step}")
    source = checkpoint.path.parent / METRICS
    if checkpoint.path.resolve().parent != folder.resolve() and source.is_file():
        shutil.copyfile(source, folder / METRICS)


def _go_on(run: Run, progress: Progress) -> None:
    run.step = progress.step
    run.todo = list(progress.records.get("todo", []))
    run.stopped_early = bool(progress.records.get("stopped_early", False))
    run.metrics_size = int(progress.records.get("metrics_size", 0))
    run.recoveries = int(progress.records.get("recoveries", 0))
    if run.monitor is not None and progress.monitor is not None:
        run.monitor.load_state_dict(progress.monitor)


def progress_of(run: Run, metrics_size: int) -> Progress:
    """Where a run stands, for a checkpoint.

    Args:
        run: after a step.
        metrics_size: bytes of ``metrics.jsonl`` so far.

    Returns:
        The progress.
    """
    samples = run.step * run.plan.effective_batch
    return Progress(
        step=run.step,
        epoch=samples // run.plan.images,
        samples=samples,
        seed=run.seed,
        world_size=run.accelerator.num_processes,
        config=identity(run),
        data_fingerprint=run.data.fingerprint,
        records={
            "metrics_size": metrics_size,
            "todo": run.todo,
            "stopped_early": run.stopped_early,
            "recoveries": run.recoveries,
        },
        monitor=None if run.monitor is None else run.monitor.state_dict(),
    )

"""A training run: its setup, its folder, and its progress between two steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from diffusers_ddpm_ext.training.checkpoints.output_dir import acquire_output_dir
from diffusers_ddpm_ext.training.config.train_config import TrainConfig
from diffusers_ddpm_ext.training.distributed import fail_together
from diffusers_ddpm_ext.training.evaluation.processes import Processes
from diffusers_ddpm_ext.training.loop.hub_download import download_run
from diffusers_ddpm_ext.training.loop.hub_publisher import Publisher
from diffusers_ddpm_ext.training.loop.setup import Setup
from diffusers_ddpm_ext.training.signals import SignalRequests
from diffusers_ddpm_ext.training.tracking.metrics import MetricsLogger
from diffusers_ddpm_ext.training.tracking.step_losses import LossMeter
from diffusers_ddpm_ext.utils.folder_lock import FolderLock


class Task(StrEnum):
    """Work between two steps, by the names that checkpoints store."""

    VALIDATION = "validation"
    BEST = "best"
    IMAGES = "images"
    MODEL = "model"
    END = "end"


@dataclass
class RunProgress:
    """How far a run has come; all of it but the last metrics and bound is in every checkpoint.

    Attributes:
        step: optimizer steps done.
        pending: tasks that the present step still requires, in order.
        stopped_early: whether the monitor's patience is used up.
        recoveries: skipped steps in a row, or rollbacks to the same checkpoint.
        last_metrics: metrics of the step that was read last.
        last_bound: bits per dimension at the last validation; None if they are not computed.
        threads: CPU threads and cores of the checkpoint, empty in one of an earlier version; then those of the run.
            None without a checkpoint, and on an accelerator.
        fast_attention: whether the network's attention is the checkpoint's, or then the run's,
            `FastAttnProcessor`; None without a checkpoint.
        lanes: of a stream, where those of this process are, by number; None before the first step or without one.
        latent_scale: scale of the latents in the checkpoint that the run resumed from; None where it must be settled.
    """

    step: int = 0
    pending: list[Task] = field(default_factory=list)
    stopped_early: bool = False
    recoveries: int = 0
    last_metrics: dict[str, float] = field(default_factory=dict)
    last_bound: float | None = None
    latent_scale: dict[str, Any] | None = None
    lanes: Mapping[int, Sequence[int]] | None = None
    threads: Mapping[str, int] | None = None
    fast_attention: bool | None = None


@dataclass(frozen=True)
class Run:
    """A run between two steps.

    Attributes:
        setup: what was built once.
        folder: of the run.
        lock: keeps other runs out of the folder; in the main process only.
        publisher: pushes the folder to the Hub; in the main process only, None without ``push_to_hub``.
        signals: requests of this process.
        meter: losses that were not read back from the device yet.
        logger: writes the metrics.
        progress: how far the run has come.
    """

    setup: Setup
    folder: Path
    lock: FolderLock | None
    publisher: Publisher | None
    signals: SignalRequests
    meter: LossMeter
    logger: MetricsLogger
    progress: RunProgress

    @property
    def processes(self) -> Processes:
        """How the processes share an evaluation."""
        return self.setup.processes(lambda: bool(self.signals.stopped_by))


def acquire_folder(config: TrainConfig, accelerator: Accelerator) -> tuple[Path, FolderLock | None]:
    """Create the run's folder, or use the one to resume in, and lock it in the main process. Collective call.

    Raises:
        ConfigError: the folder cannot be used, or the run to resume cannot be downloaded; in the main process. A
            folder that was created for it is removed, if nothing is in it.
    """
    names: list[str | None] = [None]
    lock: FolderLock | None = None
    with fail_together(accelerator):
        if accelerator.is_main_process:
            place, repository = config.output.output_dir, config.hub.resume_from_hub
            is_new = place is None or not Path(place).exists()
            folder, lock = acquire_output_dir(config.data, config.output, config.resumes, config.folder_suffix)
            if repository is not None:
                with _given_back_on_error(lock, folder if is_new else None):
                    accelerator.print(download_run(repository, folder))
            names = [str(folder)]
    broadcast_object_list(names)
    return Path(str(names[0])), lock


@contextmanager
def _given_back_on_error(lock: FolderLock, created: Path | None) -> Iterator[None]:
    """After an error, release the lock, and remove a folder that was created for the run if nothing is in it."""
    try:
        yield
    except BaseException:
        lock.release()
        if created is not None:
            with suppress(OSError):  # a part was downloaded, from which the next try goes on
                created.rmdir()
        raise

"""Publishing a run on the Hub: at its end, and during training by separate processes that never delay it.

The files of a push are copied the moment they are consistent, and the pushing process reads only the copy. A push that
fails during training is a warning. One that fails at the end leaves the folder intact, and its message names the
command that completes it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from diffusers_ddpm_ext.errors import ConfigError, RunError, warn
from diffusers_ddpm_ext.hub.upload import PUSH_RECORD, check_repo_id, copy_snapshot, list_upload_files
from diffusers_ddpm_ext.training.checkpoints.folders import list_checkpoints, newest
from diffusers_ddpm_ext.training.config.options import HubOptions
from diffusers_ddpm_ext.training.config.train_config import TrainConfig

STAGING_PREFIX = ".publishing-"
PUSH_NICENESS = 15


def move_token_to_environment(config: TrainConfig) -> TrainConfig:
    """Move the token to the Hub client's environment variable, so that nothing that shows the options can show it."""
    if config.hub.hub_token is None:
        return config
    os.environ["HF_TOKEN"] = config.hub.hub_token
    return replace(config, hub=replace(config.hub, hub_token=None))


def check_hub_token(options: HubOptions) -> None:
    """Refuse ``push_to_hub`` without a token, as a ConfigError."""
    from huggingface_hub import get_token

    if options.push_to_hub and get_token() is None:
        raise ConfigError("--push_to_hub needs a token of the Hub: `hf auth login`, HF_TOKEN or --hub_token")


@dataclass
class Publisher:
    """Pushes a run's folder.

    Attributes:
        folder: of the run.
        options: section ``hub``.
        process: the background process that pushes, while there is one.
        staging: the copied files that it pushes.
        last_warning: why the last push failed; the same reason is not repeated.
    """

    folder: Path
    options: HubOptions
    process: subprocess.Popen[str] | None = None
    staging: Path | None = None
    last_warning: str = ""

    def __post_init__(self) -> None:
        """Delete the copies of a run that was killed."""
        for old in self.folder.glob(f"{STAGING_PREFIX}*"):
            shutil.rmtree(old, ignore_errors=True)

    @property
    def repo_id(self) -> str:
        """The repository on the Hub."""
        return self.options.hub_model_id or self.folder.resolve().name

    @property
    def with_checkpoint(self) -> bool:
        """Whether the newest checkpoint is included."""
        return self.options.hub_strategy == "checkpoint"

    def _flags(self) -> list[str]:
        flags = ["--hub_model_id", self.repo_id]
        flags += ["--hub_private_repo"] * self.options.hub_private_repo
        return flags + ["--with_checkpoint"] * self.with_checkpoint

    @property
    def command(self) -> str:
        """The command that completes the push."""
        return shlex.join(["ddpm-ext", "push", str(self.folder), *self._flags()])

    def push_in_background(self, step: int) -> None:
        """Copy the folder's files and push them in a new process, unless an earlier push is still running."""
        if self.options.hub_strategy == "end" or not (self.folder / "model_index.json").is_file() or self._is_busy():
            return
        try:
            self._finish_push()
            checkpoints = list_checkpoints(self.folder) if self.with_checkpoint else []
            checkpoint = checkpoints[-1] if checkpoints else None
            uploads = list_upload_files(self.folder, checkpoint)
            uploads.check_complete(checkpoint)
            self.staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=self.folder))
            copy_snapshot(uploads.files, self.staging)
            command = [sys.executable, "-m", "diffusers_ddpm_ext", "push", str(self.staging), *self._flags()]
            if not checkpoints and self.with_checkpoint:
                command.remove("--with_checkpoint")
            command += ["--no_images", "--commit_message", f"Step {step}"]
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                env=_environment(),
            )  # fmt: skip
            with suppress(OSError):  # it may have ended already, which the next look at it reports
                os.setpriority(os.PRIO_PROCESS, self.process.pid, PUSH_NICENESS)
        except (OSError, ConfigError) as error:
            self._warn(f"{getattr(error, 'strerror', None) or error}")
            self._delete_staging()

    def _is_busy(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def _finish_push(self, wait: bool = False) -> None:
        """Report how the last push ended, if it has, and delete its files."""
        if self.process is None or (not wait and self.process.poll() is None):
            return
        _, output = self.process.communicate()
        if self.process.returncode:
            errors = [line for line in output.splitlines() if line.startswith("error: ")]
            reason = errors[-1].removeprefix("error: ") if errors else f"status {self.process.returncode}"
            self._warn(reason.split(f". {self.staging} is as it was")[0])
        elif self.staging is not None and (self.staging / PUSH_RECORD).is_file():
            os.replace(self.staging / PUSH_RECORD, self.folder / PUSH_RECORD)
        self.process = None
        self._delete_staging()

    def _warn(self, reason: str) -> None:
        if reason != self.last_warning:
            self.last_warning = reason
            warn(
                f"not pushed: {reason}; the training continues, and everything is pushed at its end. By hand:"
                f" {self.command}"
            )

    def _delete_staging(self) -> None:
        if self.staging is not None:
            shutil.rmtree(self.staging, ignore_errors=True)
            self.staging = None

    def push_final(self) -> str:
        """Push the complete run, and return what was pushed where.

        Raises:
            RunError: it could not be pushed; the message names the command that completes the push.
        """
        from diffusers_ddpm_ext.hub.push import PushOptions, push

        self._finish_push(wait=True)
        if not (self.folder / "model_index.json").is_file():
            return f"nothing was pushed: {self.folder} holds no pipeline yet"
        checkpoint = newest(self.folder).checkpoint if self.with_checkpoint else None
        try:
            options = PushOptions(
                self.folder, check_repo_id(self.repo_id), self.options.hub_private_repo, checkpoint is not None
            )
            return push(options, None if checkpoint is None else checkpoint.path)
        except ConfigError as error:
            raise RunError(f"not pushed: {error}; to finish: {self.command}") from None

    def terminate(self) -> None:
        """End a push that is still running."""
        if self.process is not None:
            if self.process.poll() is None:
                self.process.terminate()
            self._finish_push(wait=True)


def _environment() -> Mapping[str, str]:
    """The environment of a process outside the distributed run."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    own = {name: value for name, value in os.environ.items() if name not in dropped}
    return own | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}

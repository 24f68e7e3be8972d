"""A run on the Hub: pushed at its end, and on the way by processes of their own, which never hold the training up.

The files of a push are set aside the moment they belong together; the process that sends them reads nothing else. A
push that fails on the way is a warning. One that fails at the end leaves the folder whole, and names the line that
finishes it.
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
from diffusers_ddpm_ext.hub.upload import PUSH_RECORD, copy_snapshot, list_upload_files
from diffusers_ddpm_ext.training.checkpoints.folders import checkpoint_step, list_checkpoints, newest
from diffusers_ddpm_ext.training.config.options import HubOptions
from diffusers_ddpm_ext.training.config.train_config import TrainConfig

PLACE = ".publishing-"
NICE = 15
NOT_THE_RUN_S = ("README.md", "proof.json", "card/*", ".gitattributes")


def take_token(config: TrainConfig) -> TrainConfig:
    """Hand the token over to the client's variable, so that nothing that knows the options can show it.

    Args:
        config: as parsed.

    Returns:
        The same without it.
    """
    if config.hub.hub_token is None:
        return config
    os.environ["HF_TOKEN"] = config.hub.hub_token
    return replace(config, hub=replace(config.hub, hub_token=None))


def check_token(options: HubOptions) -> None:
    """Refuse a run that could never push.

    Raises:
        ConfigError: there is no token.
    """
    from huggingface_hub import get_token

    if options.push_to_hub and get_token() is None:
        raise ConfigError("--push_to_hub needs a token of the Hub: `hf auth login`, HF_TOKEN or --hub_token")


@dataclass
class Publisher:
    """Pushes a run's folder.

    Attributes:
        folder: of the run.
        options: what goes where, and when.
        child: the process that sends what was set aside, while there is one.
        place: what was set aside for it.
        told: what went wrong last; the same is not said twice.
    """

    folder: Path
    options: HubOptions
    child: subprocess.Popen[str] | None = None
    place: Path | None = None
    told: str = ""

    def __post_init__(self) -> None:
        """Remove what a run that died had set aside."""
        for old in self.folder.glob(f"{PLACE}*"):
            shutil.rmtree(old, ignore_errors=True)

    @property
    def repo_id(self) -> str:
        """Where it goes."""
        return self.options.hub_model_id or self.folder.resolve().name

    @property
    def with_checkpoint(self) -> bool:
        """Whether the newest checkpoint goes along."""
        return self.options.hub_strategy == "checkpoint"

    def _flags(self) -> list[str]:
        flags = ["--hub_model_id", self.repo_id]
        flags += ["--hub_private_repo"] * self.options.hub_private_repo
        return flags + ["--with_checkpoint"] * self.with_checkpoint

    @property
    def line(self) -> str:
        """What finishes the push."""
        return shlex.join(["ddpm-ext", "push", str(self.folder), *self._flags()])

    def on_the_way(self, step: int) -> None:
        """Set the folder's files aside and send them, unless an earlier push is still at work.

        Args:
            step: of the run, for the commit's message.
        """
        if self.options.hub_strategy == "end" or not (self.folder / "model_index.json").is_file() or self._is_busy():
            return
        try:
            self._collect()
            checkpoints = list_checkpoints(self.folder) if self.with_checkpoint else []
            self.place = Path(tempfile.mkdtemp(prefix=PLACE, dir=self.folder))
            copy_snapshot(list_upload_files(self.folder, checkpoints[-1] if checkpoints else None), self.place)
            command = [sys.executable, "-m", "diffusers_ddpm_ext", "push", str(self.place), *self._flags()]
            if not checkpoints and self.with_checkpoint:
                command.remove("--with_checkpoint")
            command += ["--no_images", "--commit_message", f"Step {step}"]
            self.child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                env=_environment(),
            )  # fmt: skip
            with suppress(OSError):  # it may be gone already, which is told when it is looked at
                os.setpriority(os.PRIO_PROCESS, self.child.pid, NICE)
        except OSError as error:
            self._warn(f"{error.strerror or error}")
            self._clear()

    def _is_busy(self) -> bool:
        return self.child is not None and self.child.poll() is None

    def _collect(self, wait: bool = False) -> None:
        """See how the last push ended."""
        if self.child is None or (not wait and self.child.poll() is None):
            return
        _, told = self.child.communicate()
        if self.child.returncode:
            errors = [line for line in told.splitlines() if line.startswith("error: ")]
            why = errors[-1].removeprefix("error: ") if errors else f"status {self.child.returncode}"
            self._warn(why.split(f". {self.place} is as it was")[0])
        elif self.place is not None and (self.place / PUSH_RECORD).is_file():
            os.replace(self.place / PUSH_RECORD, self.folder / PUSH_RECORD)
        self.child = None
        self._clear()

    def _warn(self, why: str) -> None:
        if why != self.told:
            self.told = why
            warn(f"not pushed: {why}; the training goes on, and the end pushes all. By hand: {self.line}")

    def _clear(self) -> None:
        if self.place is not None:
            shutil.rmtree(self.place, ignore_errors=True)
            self.place = None

    def at_the_end(self) -> str:
        """Push all there is, now that the run is complete.

        Returns:
            What was pushed where.

        Raises:
            RunError: it could not be pushed; the folder is whole, and the sentence names the line that finishes it.
        """
        from diffusers_ddpm_ext.hub.push import PushOptions, check_repo_id, push

        self._collect(wait=True)
        if not (self.folder / "model_index.json").is_file():
            return f"nothing was pushed: {self.folder} holds no pipeline yet"
        checkpoint = newest(self.folder).checkpoint if self.with_checkpoint else None
        try:
            options = PushOptions(
                self.folder, check_repo_id(self.repo_id), self.options.hub_private_repo, checkpoint is not None
            )
            return push(options, None if checkpoint is None else checkpoint.path)
        except ConfigError as error:
            raise RunError(f"not pushed: {error}; to finish: {self.line}") from None

    def stop(self) -> None:
        """End the push that is under way: the process is asked to go."""
        if self.child is not None:
            if self.child.poll() is None:
                self.child.terminate()
            self._collect(wait=True)


def _environment() -> Mapping[str, str]:
    """Of a process that is no part of a distributed run."""
    gone = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    own = {name: value for name, value in os.environ.items() if name not in gone}
    return own | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def fetch_run(repo_id: str, folder: Path) -> str:
    """Bring the run that was pushed last into a folder, unless the folder has gone further.

    Args:
        repo_id: where ``--hub_strategy checkpoint`` has pushed it.
        folder: of the run here.

    Returns:
        What was done, in a sentence.

    Raises:
        ConfigError: there is no checkpoint on the Hub, or it cannot be loaded.
    """
    from huggingface_hub import HfApi

    from diffusers_ddpm_ext.hub.upload import HubTarget, describe_error, hub_timeout

    own = newest(folder).checkpoint if list_checkpoints(folder) else None
    option = f"--resume_from_hub {repo_id}"
    with tempfile.TemporaryDirectory(prefix=PLACE, dir=folder) as name, hub_timeout(HubTarget(repo_id).timeout):
        place = Path(name)
        try:
            api = HfApi()
            commit = api.model_info(repo_id).sha
            files = api.list_repo_files(repo_id, revision=commit)
            steps = {file.split("/")[0] for file in files if file.startswith("checkpoint-")}
            there = max((checkpoint_step(Path(each)) or 0 for each in steps), default=None)
            if there is None:
                raise ConfigError(
                    f"{option} holds no checkpoint: the run was not pushed with --hub_strategy checkpoint"
                )
            if own is not None and own.step >= there:
                return f"{folder} is at step {own.step:,} already, {repo_id} at {there:,}: going on from here"
            api.snapshot_download(repo_id, revision=commit, local_dir=place, ignore_patterns=list(NOT_THE_RUN_S))
        except ConfigError:
            raise
        except Exception as error:  # of the client or the transport
            raise ConfigError(f"{option} cannot be loaded: {describe_error(error, HubTarget(repo_id))}") from None
        if newest(place).checkpoint is None:
            raise ConfigError(f"{option}: checkpoint-{there} there is not whole")
        shutil.rmtree(place / ".cache", ignore_errors=True)
        for path in sorted(place.rglob("*")):
            if path.is_file():
                target = folder / path.relative_to(place)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
    return f"checkpoint-{there} of {repo_id} is in {folder}"

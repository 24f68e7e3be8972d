"""Upload of a folder to the Hub: which files, in how many attempts, and the comparison of the commit with the folder.

Nothing here imports torch, so that an upload during a training costs it little.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from diffusers_ddpm_ext.errors import ConfigError, RunError, printable, warn
from diffusers_ddpm_ext.utils.files import write_text_atomically
from diffusers_ddpm_ext.utils.folder_scan import LINK, list_names, scan_folder
from diffusers_ddpm_ext.utils.input_files import exists, read_json_object

PUSH_RECORD = ".hub.json"
"""The last push from a folder; never uploaded."""
APPENDED_SUFFIXES = (".jsonl",)
IGNORE_PATTERNS = (
    ".*", "*.part", "checkpoint-*", "aside-*", "logs", "crash", "samples-seed*", "wandb", "mlruns", "runs",
)  # fmt: skip
"""At the top of a run's folder: locks, incomplete files, what the run resumes from, and trackers' files."""
DELETE_PATTERNS = (
    "unet/*", "scheduler/*", "vae/*", "vqvae/*", "logvar/*", "class_embedder/*", "samples/*", "card/*", "plots/*",
    "evaluation/*", "checkpoint-*/*", "best/*",
)  # fmt: skip
"""Files that a push deletes from the repository if the folder no longer has them."""
NEEDED_FILES = ("model_index.json", "config.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors")
"""At the top of the folder, and in those of its parts."""
MAX_ATTEMPTS, HUB_TIMEOUT = 4, 60.0
MAX_RETRY_SECONDS = 20.0
"""No attempt starts later: by then the client itself has tried some calls five times."""

Result = TypeVar("Result")


class PushError(RunError):
    """An upload that failed; the folder is unchanged."""


@dataclass(frozen=True)
class HubTarget:
    """A repository on the Hub and how to reach it.

    Attributes:
        repo_id: ``user/name``, or a name alone for the token's own account.
        private: whether a repository that is created is private; None for the account's default.
        token: of the Hub; None for the one that ``hf auth login`` stored.
        timeout: seconds that the Hub may take to answer.
    """

    repo_id: str
    private: bool | None = None
    token: str | None = None
    timeout: float = HUB_TIMEOUT


def check_repo_id(name: str, option: str = "--hub_model_id") -> str:
    """A repository's name, if the Hub allows it; else a ConfigError."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ConfigError(
            f"{option} {name!r} is not the name of a repository: letters, digits and . _ - in `name` or `user/name`"
        ) from None
    return name


@dataclass(frozen=True)
class UploadResult:
    """Result of an upload.

    Attributes:
        repo_id: with its namespace.
        commit: id of the commit that has the folder's files.
        url: of the repository.
        files: number of files.
    """

    repo_id: str
    commit: str
    url: str
    files: int


@dataclass(frozen=True)
class UploadList:
    """Files of a folder that belong on the Hub.

    Attributes:
        files: path in the repository -> file.
        left_out: path -> why it is not uploaded though it would belong there: a link, say.
    """

    files: dict[str, Path]
    left_out: dict[str, str]

    @property
    def warning(self) -> str:
        """What was left out and why, as one sentence; empty if nothing was."""
        reasons = sorted(set(self.left_out.values()))
        parts = [
            f"{list_names([n for n, why in self.left_out.items() if why == reason])} ({reason})" for reason in reasons
        ]
        return f"left out of the upload: {'; '.join(parts)}" if parts else ""

    def check_complete(self, checkpoint: Path | None = None) -> None:
        """Refuse to upload a pipeline or a checkpoint without a file that loading needs.

        Raises:
            ConfigError: such a file was left out.
        """
        for name, reason in self.left_out.items():
            own = checkpoint is not None and name.split("/")[0] == checkpoint.name
            if own or (name.count("/") < 2 and name.split("/")[-1] in NEEDED_FILES):
                what = (
                    "leave out --with_checkpoint, or put the file itself there" if own else "put the file itself there"
                )
                raise ConfigError(f"{printable(name)} is {reason}, and nothing loads without it: {what}")


def belongs_on_hub(parts: tuple[str, ...], with_checkpoint: bool = False) -> bool:
    """Whether a push uploads an entry of a run's folder, by the parts of its name; its checkpoint is added apart."""
    ignored = IGNORE_PATTERNS if with_checkpoint else (*IGNORE_PATTERNS, "best")
    return not is_hidden(parts) and not any(fnmatch(parts[0], pattern) for pattern in ignored)


def is_hidden(parts: tuple[str, ...]) -> bool:
    """Whether an entry, or a folder above it, is hidden or being written."""
    return any(fnmatch(part, pattern) for part in parts for pattern in IGNORE_PATTERNS[:2])


def list_upload_files(folder: Path, checkpoint: Path | None = None) -> UploadList:
    """The files of a folder that belong on the Hub. Links are left out, wherever they lead.

    With ``checkpoint``, one of the run's, that is included together with all that the run resumes from.
    """
    scan = scan_folder(folder, lambda parts: not belongs_on_hub(parts, checkpoint is not None))
    files, left_out = scan.files, scan.left_out
    if checkpoint is not None and checkpoint.is_symlink():
        left_out[checkpoint.name] = LINK
    elif checkpoint is not None:
        inside = scan_folder(checkpoint)
        files |= {f"{checkpoint.name}/{name}": path for name, path in inside.files.items()}
        left_out |= {f"{checkpoint.name}/{name}": reason for name, reason in inside.left_out.items()}
    return UploadList(files, left_out)


def copy_snapshot(files: Mapping[str, Path], place: Path) -> None:
    """Copy files, from `list_upload_files`, into an empty folder that a running training does not change.

    Files that a run replaces are linked, if ``place`` is on the same disk; those that it appends to are copied. What
    was replaced by a link since it was listed is left out.
    """
    for name, file in files.items():
        target = place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix not in APPENDED_SUFFIXES:
            try:
                os.link(file, target, follow_symlinks=False)
            except OSError:
                pass  # another disk, or one without links
            else:
                if target.is_symlink():
                    target.unlink()
                continue
        if not file.is_symlink():
            shutil.copyfile(file, target)


def create_repo(target: HubTarget, warn: Callable[[str], None]) -> str:
    """Create the repository if it does not exist, and return its id with the namespace; errors as in `upload`.

    ``warn`` is called with a sentence for each further attempt.
    """
    from huggingface_hub import HfApi

    def create() -> str:
        url = HfApi(token=target.token).create_repo(target.repo_id, private=target.private, exist_ok=True)
        return str(url.repo_id)

    return _with_retries(create, target, warn)


def upload(place: Path, target: HubTarget, message: str, warn: Callable[[str], None]) -> UploadResult:
    """Upload all files of a folder as one commit, and compare the commit's files with the folder's.

    The same call completes an interrupted upload, and changes nothing when everything is uploaded. ``warn`` is called
    with a sentence for each further attempt.

    Raises:
        PushError: it failed; the message is one sentence without tokens.
    """
    return _with_retries(lambda: _upload_once(place, target, message), target, warn)


def _with_retries(action: Callable[[], Result], target: HubTarget, warn: Callable[[str], None]) -> Result:
    start = time.monotonic()
    with hub_timeout(target.timeout):
        for attempt in range(MAX_ATTEMPTS):
            try:
                return action()
            except PushError:
                raise
            except Exception as error:  # of the client, the transport or the system: a run survives them all
                reason = describe_error(error, target.repo_id, target.token)
                last = attempt == MAX_ATTEMPTS - 1 or time.monotonic() - start > MAX_RETRY_SECONDS
                if last or not _may_pass(error):
                    raise PushError(reason) from None
                if _is_about_xet(error):
                    _disable_xet()
                warn(f"{reason}; trying again")
                time.sleep(min(2**attempt, 8))
    raise AssertionError("unreachable")


def _upload_once(place: Path, target: HubTarget, message: str) -> UploadResult:
    from huggingface_hub import HfApi, constants

    api, repo_id = HfApi(token=target.token), target.repo_id
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=place, commit_message=message, delete_patterns=list(DELETE_PATTERNS)
    )
    differing = differing_files(api, repo_id, commit.oid, place)
    if differing:
        raise PushError(f"commit {commit.oid[:12]} of {repo_id} differs from the folder in {differing[0]}")
    files = sum(path.is_file() for path in place.rglob("*"))
    return UploadResult(repo_id, commit.oid, f"{constants.ENDPOINT}/{repo_id}", files)


def differing_files(api: Any, repo_id: str, commit: str, folder: Path) -> list[str]:
    """Paths of a folder's files that are missing in a commit or differ there, by the Hub's checksums.

    The commit may have more files. ``api`` is a `huggingface_hub.HfApi`.
    """
    result = api.verify_repo_checksums(repo_id, revision=commit, local_dir=folder)
    return sorted([*(mismatch["path"] for mismatch in result.mismatches), *result.extra_paths])


# ---------------------------------------------------------------------- errors


@contextmanager
def hub_timeout(seconds: float) -> Iterator[None]:
    """Limit how long the client waits for an answer; by default it waits forever."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    def factory() -> Any:
        client = _http.default_client_factory()
        client.timeout = seconds
        return client

    set_client_factory(factory)
    try:
        yield
    finally:
        set_client_factory(_http.default_client_factory)


def _disable_xet() -> None:
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_XET = True


def _is_about_xet(error: Exception) -> bool:
    return "xet" in str(error).lower()


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _may_pass(error: Exception) -> bool:
    """Whether another attempt may succeed: the Hub or the network is down, or someone else was writing."""
    status = _status(error)
    if status is not None:
        return status >= 500 or status in (408, 409, 412, 429) or _is_about_xet(error)
    return not isinstance(error, ValueError)


def describe_error(error: Exception, repo_id: str, token: str | None = None) -> str:
    """What went wrong, in one sentence without tokens; errors of the client, the transport or the system."""
    status, message = _status(error), _server_message(error)
    answer = f" ({message})" if message else ""
    if status == 401:
        text = f"the Hub does not know this token (401): `hf auth login`, or HF_TOKEN, with write access to {repo_id}"
    elif status == 403:
        text = f"the Hub does not let this token write {repo_id} (403){answer}: use another token, or another id"
    elif status is not None:
        text = f"the Hub answered {status}{answer} for {repo_id}"
    elif isinstance(error, ValueError):
        text = f"{repo_id}: {error}"
    else:
        text = f"the Hub was not reached for {repo_id} ({type(error).__name__}: {error})"
    return redact_tokens(text, token)


def _server_message(error: Exception) -> str:
    return " ".join(str(getattr(error, "server_message", None) or "").split())[:200]


def redact_tokens(text: str, token: str | None = None) -> str:
    """A text on one line, without ``token`` and the tokens of the environment."""
    for secret in {token, os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN")}:
        if secret:
            text = text.replace(secret, "***")
    return " ".join(re.sub(r"hf_[A-Za-z0-9]{8,}", "***", text).split())[:600]


# ---------------------------------------------------------------------- the last push


def _pushed_commits() -> Path:
    """The last pushed commit of each repository, for this machine."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "ddpm-ext" / "pushed.json"


def record_push(folder: Path, result: UploadResult) -> None:
    """Record the commit in the folder and next to the client's cache, for `ddpm-ext verify`."""
    record = {"repo_id": result.repo_id, "commit": result.commit, "url": result.url}
    write_text_atomically(folder / PUSH_RECORD, json.dumps(record, indent=2) + "\n")
    try:
        commits = _read_record(_pushed_commits())
    except ConfigError as error:
        warn(f"{error} It is written anew.")
        commits = {}
    write_text_atomically(_pushed_commits(), json.dumps(commits | {result.repo_id: result.commit}, indent=2) + "\n")


def last_pushed_commit(repo_id: str, folder: Path | None = None) -> str | None:
    """The last commit pushed to a repository from a folder, or from this machine.

    Raises:
        ConfigError: the record of pushes cannot be read.
    """
    path, key = (_pushed_commits(), repo_id) if folder is None else (folder / PUSH_RECORD, "commit")
    try:
        record = _read_record(path)
    except ConfigError as error:
        raise ConfigError(f"{error} Delete it: the next push writes it anew.") from None
    return record.get(key) if folder is None or record.get("repo_id") == repo_id else None


def _read_record(path: Path) -> dict[str, str]:
    if not exists(path):
        return {}
    record = read_json_object(path)
    return {key: record.string(key) for key in record.content}

"""A folder goes to the Hub: which of its files, how often it is tried, and whether what arrived is what was sent.

Nothing here imports torch, so that an upload beside a training costs it little.
"""

from __future__ import annotations

import hashlib
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

from diffusers_ddpm_ext.errors import RunError
from diffusers_ddpm_ext.utils.files import read_json, write_text_atomically

PUSH_RECORD = ".hub.json"
"""What was pushed last from a folder; never goes to the Hub itself."""
APPENDED_SUFFIXES = (".jsonl",)
IGNORE_PATTERNS = (
    ".*",
    "*.part",
    "checkpoint-*",
    "aside-*",
    "logs",
    "crash",
    "samples-seed*",
    "wandb",
    "mlruns",
    "runs",
)
"""Of the top of a run's folder: locks, halves, what a run goes on from, and trackers' files."""
DELETE_PATTERNS = (
    "unet/*", "scheduler/*", "logvar/*", "class_embedder/*", "samples/*", "card/*", "plots/*", "evaluation/*",
    "checkpoint-*/*", "best/*",
)  # fmt: skip
"""What a push takes out of the repository where the folder does not have it any more."""
MAX_ATTEMPTS, HUB_TIMEOUT = 4, 60.0
MAX_RETRY_SECONDS = 20.0
"""Seconds after which a failed attempt is the last: some calls the client has tried five times by itself by then."""


Result = TypeVar("Result")


class PushError(RunError):
    """An upload that did not succeed; the folder is as it was."""


@dataclass(frozen=True)
class HubTarget:
    """Where a folder goes.

    Attributes:
        repo_id: ``user/name``, or a name alone for the token's own account.
        private: whether a repository that is made new is private; None: as the account has it.
        token: of the Hub; None: the one that ``hf auth login`` has left.
        timeout: seconds that the Hub may stay silent.
    """

    repo_id: str
    private: bool | None = None
    token: str | None = None
    timeout: float = HUB_TIMEOUT


@dataclass(frozen=True)
class UploadResult:
    """What an upload has made.

    Attributes:
        repo_id: with its namespace.
        commit: id of the commit whose files are those of the folder.
        url: of the repository.
        files: number of files.
    """

    repo_id: str
    commit: str
    url: str
    files: int


def list_upload_files(folder: Path, checkpoint: Path | None = None) -> dict[str, Path]:
    """The files of a folder that belong on the Hub.

    Args:
        folder: of a pipeline or a run.
        checkpoint: one of its checkpoints, to go along; and with it what else a run goes on from.

    Returns:
        Path in the repository -> file.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        hidden = any(fnmatch(part, pattern) for part in inside.parts for pattern in IGNORE_PATTERNS[:2])
        left_out = IGNORE_PATTERNS if checkpoint is not None else (*IGNORE_PATTERNS, "best")
        if path.is_file() and not hidden and not any(fnmatch(inside.parts[0], pattern) for pattern in left_out):
            found[inside.as_posix()] = path
    if checkpoint is not None:
        found |= {f"{checkpoint.name}/{path.name}": path for path in sorted(checkpoint.iterdir()) if path.is_file()}
    return found


def copy_snapshot(files: Mapping[str, Path], place: Path) -> None:
    """Put files into a folder of their own that a running training does not change.

    Whatever a run replaces whole is linked; what it appends to is copied.

    Args:
        files: from `list_upload_files`.
        place: an empty folder, best on the same disk.

    Raises:
        OSError: the disk is full.
    """
    for name, file in files.items():
        target = place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix not in APPENDED_SUFFIXES:
            try:
                os.link(file, target)
                continue
            except OSError:
                pass  # another disk, or one without links
        shutil.copyfile(file, target)


def sha256_of_file(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_blob_id(path: Path) -> str:
    """The id that git, and the Hub, give a small file."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        for part in iter(lambda: file.read(1 << 20), b""):
            digest.update(part)
    return digest.hexdigest()


def create_repo(target: HubTarget, say: Callable[[str], None] = lambda text: None) -> str:
    """Make the repository, if it is not there.

    Args:
        target: where a folder is to go.
        say: takes a sentence for the user when something is tried again.

    Returns:
        Its id, with the namespace.

    Raises:
        PushError: as `upload`.
    """
    from huggingface_hub import HfApi

    def make() -> str:
        url = HfApi(token=target.token).create_repo(target.repo_id, private=target.private, exist_ok=True)
        return str(url.repo_id)

    return _persist(make, target, say)


def upload(
    place: Path, target: HubTarget, message: str, say: Callable[[str], None] = lambda text: None
) -> UploadResult:
    """Bring a folder into one commit, and compare what the Hub then has with it.

    The same call again finishes what an earlier one has begun, and does nothing where nothing is left to be done.

    Args:
        place: all its files go, as they are.
        target: a repository that is there, by its whole id.
        message: of the commit.
        say: takes a sentence for the user when something is tried again.

    Returns:
        The commit, whose files have been compared.

    Raises:
        PushError: it did not succeed, with the reason in one sentence, free of tokens.
    """
    return _persist(lambda: _upload_once(place, target, message), target, say)


def _persist(act: Callable[[], Result], target: HubTarget, say: Callable[[str], None]) -> Result:
    """Try, and try again where it may pass."""
    began = time.monotonic()
    with hub_timeout(target.timeout):
        for attempt in range(MAX_ATTEMPTS):
            try:
                return act()
            except PushError:
                raise
            except Exception as error:  # the client's own, the transport's, the system's: a run survives them all
                why = describe_error(error, target)
                last = attempt == MAX_ATTEMPTS - 1 or time.monotonic() - began > MAX_RETRY_SECONDS
                if last or not _may_pass(error):
                    raise PushError(why) from None
                if _is_about_xet(error):
                    _without_xet()
                say(f"{why}; trying again")
                time.sleep(min(2**attempt, 8))
    raise AssertionError("unreachable")


def _upload_once(place: Path, target: HubTarget, message: str) -> UploadResult:
    from huggingface_hub import HfApi, constants

    api, repo_id = HfApi(token=target.token), target.repo_id
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=place, commit_message=message, delete_patterns=list(DELETE_PATTERNS)
    )
    names = [path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()]
    differing = differing_files(api, repo_id, commit.oid, {name: place / name for name in names})
    if differing:
        raise PushError(f"commit {commit.oid[:12]} of {repo_id} differs from the folder in {differing[0]}")
    return UploadResult(repo_id, commit.oid, f"{constants.ENDPOINT}/{repo_id}", len(names))


def differing_files(api: Any, repo_id: str, commit: str, files: Mapping[str, Path]) -> list[str]:
    """Files that are not in a commit as they are here, by what the Hub reports of them.

    Large files are compared by their sha256, small ones by their git id; none is loaded again, but for small ones of
    a Hub that does not say git ids.

    Args:
        api: of huggingface_hub.
        repo_id: of the repository.
        commit: its id.
        files: path in the repository -> file here.

    Returns:
        Their paths.
    """
    there = {entry.path: entry for entry in api.list_repo_tree(repo_id, recursive=True, revision=commit)}
    differing = []
    for name, path in files.items():
        entry = there.get(name)
        if entry is None or getattr(entry, "size", -1) != path.stat().st_size:
            differing.append(name)
        elif entry.lfs is not None:
            if entry.lfs.sha256 != sha256_of_file(path):
                differing.append(name)
        elif entry.blob_id != git_blob_id(path) and not _same_bytes(api, repo_id, commit, name, path):
            differing.append(name)
    return differing


def _same_bytes(api: Any, repo_id: str, commit: str, name: str, path: Path) -> bool:
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        loaded = api.hf_hub_download(repo_id, name, revision=commit, local_dir=place)
        return Path(loaded).read_bytes() == path.read_bytes()


# ---------------------------------------------------------------------- what goes wrong


@contextmanager
def hub_timeout(seconds: float) -> Iterator[None]:
    """Let the client give up on a Hub that says nothing for so long; by itself it would wait for ever.

    Args:
        seconds: of silence.
    """
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


def _without_xet() -> None:
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_XET = True


def _is_about_xet(error: Exception) -> bool:
    return "xet" in str(error).lower()


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _may_pass(error: Exception) -> bool:
    """Whether it is worth another try: the Hub or the way to it is down, or someone else was writing."""
    status = _status(error)
    if status is not None:
        return status >= 500 or status in (408, 409, 412, 429) or _is_about_xet(error)
    return not isinstance(error, ValueError)


def describe_error(error: Exception, target: HubTarget) -> str:
    """What went wrong, in one sentence without any token.

    Args:
        error: of the client, the transport or the system.
        target: whose token must not show.
    """
    status, repo = _status(error), target.repo_id
    if status == 401:
        text = f"the Hub does not know this token (401): `hf auth login`, or HF_TOKEN, with one that may write {repo}"
    elif status == 403:
        said = _said(error)
        about = f" ({said})" if said else ""
        text = f"the Hub does not let this token write {repo} (403){about}: take one with the right, or another id"
    elif status is not None:
        said = _said(error)
        text = f"the Hub answered {status}{f' ({said})' if said else ''} for {repo}"
    elif isinstance(error, ValueError):
        text = f"{repo}: {error}"
    else:
        text = f"the Hub was not reached for {repo} ({type(error).__name__}: {error})"
    return redact_tokens(text, target.token)


def _said(error: Exception) -> str:
    message = getattr(error, "server_message", None) or ""
    return " ".join(str(message).split())[:200]


def redact_tokens(text: str, token: str | None = None) -> str:
    """A text in one line, without tokens.

    Args:
        text: that may have met one.
        token: in use; those of the environment are taken out, too.
    """
    for secret in {token, os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN")}:
        if secret:
            text = text.replace(secret, "***")
    return " ".join(re.sub(r"hf_[A-Za-z0-9]{8,}", "***", text).split())[:600]


# ---------------------------------------------------------------------- what was pushed


def _memory() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "ddpm-ext" / "pushed.json"


def record_push(folder: Path, pushed: UploadResult) -> None:
    """Note the commit beside the folder and beside the client's cache, for `ddpm-ext verify`."""
    facts = {"repo_id": pushed.repo_id, "commit": pushed.commit, "url": pushed.url}
    write_text_atomically(folder / PUSH_RECORD, json.dumps(facts, indent=2) + "\n")
    known = read_json(_memory()) | {pushed.repo_id: pushed.commit}
    write_text_atomically(_memory(), json.dumps(known, indent=2) + "\n")


def last_pushed_commit(repo_id: str, folder: Path | None = None) -> str | None:
    """The commit that was pushed last to a repository from a folder, or from this machine."""
    if folder is not None:
        record = read_json(folder / PUSH_RECORD)
        return record.get("commit") if record.get("repo_id") == repo_id else None
    return read_json(_memory()).get(repo_id)

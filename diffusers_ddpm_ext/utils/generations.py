"""One generation of a pipeline's folder: a writer replaces all of its files at once, a reader gets one state.

A writer fills a draft inside the folder and renames it to ``.committed``: from then on the new files count. They are
linked over the old ones, ``model_index.json`` last; old files that the new pipeline lacks are deleted; and
``.committed`` is removed. A writer that is killed in between leaves ``.committed``, from which readers read, and which
the next writer finishes. Files that the pipeline does not own are never touched.

A folder may also be replaced as a whole (`utils.files.replace_folder`). A reader detects both: it holds the folder
and its ``model_index.json`` open, so that no other file can get their inodes, and compares them after reading.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.utils.files import remove_path
from diffusers_ddpm_ext.utils.pipeline_files import MODEL_INDEX, owned_files

T = TypeVar("T")
COMMITTED, DRAFT_PREFIX, STALE = ".committed", ".writing-pipeline-", ".stale.json"
DIRECT_ATTEMPTS, ATTEMPTS = 2, 200
LOADING_LOGGER = "diffusers.models.modeling_utils"


# ------------------------------------------------------------------ reading


def read_one_generation(folder: str | os.PathLike[str], load: Callable[[Path], T]) -> T:
    """Read files of one generation of a folder, while other processes may replace it.

    Args:
        folder: of a pipeline.
        load: reads from the folder that it is given, and may be called again. After a few replacements while it was
            reading, it gets a copy of the pipeline's files.

    Returns:
        The result of ``load``, whose files all belonged together.

    Raises:
        ConfigError: the folder was replaced again and again for a long time.
        Exception: any error of ``load`` in a folder that was not replaced meanwhile.
    """
    for attempt in range(ATTEMPTS):
        with _Generation(Path(folder)) as generation, ExitStack() as stack, _held_messages() as messages:
            try:
                path = generation.path
                if attempt >= DIRECT_ATTEMPTS:
                    path = stack.enter_context(_copied(path))
                    if not generation.is_current():
                        continue
                    return load(path)
                result = load(path)
            except Exception:
                if generation.is_current():
                    raise
                messages.clear()
                continue
            if generation.is_current():
                return result
            messages.clear()
        time.sleep(0.001 * min(attempt, 20))
    raise ConfigError(f"{printable(os.fspath(folder))} is being replaced all the time: stop the other program first.")


@contextmanager
def _held_messages() -> Iterator[list[logging.LogRecord]]:
    """Hold what Diffusers logs of files that it cannot read, until it is known whether they were just replaced.

    Yields:
        The messages of this thread, in order. Those that remain at the end are logged then.
    """
    logger, thread = logging.getLogger(LOADING_LOGGER), threading.get_ident()
    messages: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        if record.thread == thread:
            messages.append(record)
        return record.thread != thread

    logger.addFilter(hold)
    try:
        yield messages
    finally:
        logger.removeFilter(hold)
        for message in messages:
            logger.handle(message)


class _Generation:
    """The files of a folder that count at the moment, held open."""

    def __init__(self, folder: Path) -> None:
        # In this order: a commit that starts later is detected by the index, which it replaces before it ends.
        self._held = {path: _open(path) for path in (folder, folder / MODEL_INDEX, folder / COMMITTED)}
        self.path = folder
        if self._held[folder / COMMITTED] is not None:
            self.path = folder / COMMITTED
            _close(self._held.pop(folder / MODEL_INDEX))  # it may be replaced now, or soon

    def __enter__(self) -> _Generation:
        return self

    def is_current(self) -> bool:
        """Whether no file has been replaced since."""
        return all(_is_same(path, held) for path, held in reversed(self._held.items()))

    def __exit__(self, *error: object) -> None:
        for held in self._held.values():
            _close(held)


def _open(path: Path) -> int | None:
    """A descriptor; None for a missing file, -1 for one that cannot be held open and is not compared."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):
        return -1


def _close(descriptor: int | None) -> None:
    if descriptor is not None and descriptor >= 0:
        os.close(descriptor)


def _is_same(path: Path, held: int | None) -> bool:
    try:
        now = os.stat(path)
    except (OSError, ValueError):
        return held is None or held < 0
    return held is not None and (held < 0 or os.path.samestat(now, os.fstat(held)))


@contextmanager
def _copied(folder: Path) -> Iterator[Path]:
    """A copy of the pipeline's files, for a folder that is replaced faster than it can be loaded."""
    with tempfile.TemporaryDirectory(prefix="ddpm-ext-") as name:
        copy = Path(name, folder.name if folder.name != COMMITTED else folder.parent.name or "pipeline")
        for file in owned_files(folder):
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / file, copy / file)
        yield copy


# ------------------------------------------------------------------ writing


@contextmanager
def replace_pipeline(folder: Path, keep: Callable[[Path, Path], set[str]] | None = None) -> Iterator[Path]:
    """Replace a folder's pipeline by the files that the block writes into a draft.

    Args:
        folder: created if it is missing. What its old pipeline owned and the draft lacks is deleted at the end.
        keep: from the folder and the complete draft to the files of the old pipeline that belong to the new one too.

    Yields:
        The draft, an empty folder. After an error in the block it is discarded, and the folder is unchanged.

    Raises:
        OSError: a file cannot be written; the folder has the old pipeline.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.absolute()  # the block may change the working directory
    _delete_abandoned_drafts(folder)
    draft = folder / f"{DRAFT_PREFIX}{secrets.token_hex(4)}"
    draft.mkdir()
    try:
        with _locked(draft):
            yield draft
            _set_modes(draft)
            with _locked(folder):
                _finish_commit(folder)
                if keep is not None:
                    carry_over(folder, draft, keep(folder, draft))
                files = set(_files(draft))
                (draft / STALE).write_text(json.dumps(sorted(owned_files(folder) - files)), encoding="utf-8")
                os.rename(draft, folder / COMMITTED)
                _finish_commit(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def finish_replacement(folder: Path) -> None:
    """Finish what a killed writer had committed; for a command that then changes a file of the pipeline in place."""
    with _locked(folder):
        _finish_commit(folder)


def carry_over(old: Path, draft: Path, names: set[str]) -> None:
    """Link files of a folder into a draft that will replace it; what the draft has already stays.

    Args:
        old: the folder.
        draft: on the same file system.
        names: of files, relative.
    """
    for name in names:
        target = draft / name
        if not os.path.lexists(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(old / name, target)


def foreign_files(folder: Path) -> set[str]:
    """Files and links of a folder that its pipeline does not own, relative; drafts are left out."""
    owned, names = owned_files(folder), set()
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        is_draft = name.split("/")[0].startswith((DRAFT_PREFIX, COMMITTED))
        if not is_draft and name not in owned and (path.is_symlink() or not path.is_dir()):
            names.add(name)
    return names


def _finish_commit(folder: Path) -> None:
    """Move the files of ``.committed``, if there is one, to their places; the caller holds the folder's lock."""
    committed = folder / COMMITTED
    if not committed.is_dir():
        return
    files = sorted(_files(committed), key=lambda file: (file == MODEL_INDEX, file))
    for file in files:
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
        try:
            _link(committed / file, beside)
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)
    for name in json.loads((committed / STALE).read_text(encoding="utf-8")):
        (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            (folder / name).parent.rmdir()
    done = folder / f"{DRAFT_PREFIX}{secrets.token_hex(4)}"
    os.rename(committed, done)
    remove_path(done)


def _files(draft: Path) -> list[str]:
    paths = (path for path in draft.rglob("*") if path.is_file() and path.name != STALE)
    return [path.relative_to(draft).as_posix() for path in paths]


def _link(source: Path, target: Path) -> None:
    """A second name of the file; a copy where the file system has no hard links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _set_modes(draft: Path) -> None:
    """Give every file the mode of a new one: safetensors writes files that only their owner can read."""
    probe = draft / STALE
    probe.touch()
    mode = probe.stat().st_mode
    for file in _files(draft):
        path = draft / file
        if not path.is_symlink() and path.stat().st_nlink == 1:
            path.chmod(mode)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, where the file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _delete_abandoned_drafts(folder: Path) -> None:
    """Delete drafts of writers that were killed: their locks are free."""
    for draft in folder.glob(f"{DRAFT_PREFIX}*"):
        descriptor = _open(draft)
        if descriptor is None or descriptor < 0:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A new draft is locked before it has files.
            is_abandoned = any(draft.iterdir()) or time.time() - os.fstat(descriptor).st_mtime > 60
        except OSError:
            is_abandoned = False
        finally:
            os.close(descriptor)
        if is_abandoned:
            remove_path(draft)

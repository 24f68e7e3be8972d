"""Folder of a cache: its manifest, its undamaged files, and the lock of the run that completes it.

A folder is complete once it has ``manifest.json``, which is renamed into place and lists every file with its size and
checksum. Without it, and after damage, each undamaged record of its files counts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from diffusers_ddpm_ext.errors import ConfigError, RunError, printable
from diffusers_ddpm_ext.training.data.cache_manifest import (
    SECONDS_BETWEEN_ATTEMPTS,
    lock_or_busy,
    read_manifest,
    write_manifest,
)
from diffusers_ddpm_ext.training.data.posterior_files import (
    RECORD_FILE,
    FileDigest,
    RecordFormat,
    RecordWriter,
    StoredPosteriors,
    digest_file,
    map_records,
    scan_file,
)
from diffusers_ddpm_ext.training.distributed import any_rank, fail_together, gather_rows
from diffusers_ddpm_ext.training.threads import cores
from diffusers_ddpm_ext.utils.folder_lock import FolderLock


class CacheKind(NamedTuple):
    """What a cache holds, for messages.

    Attributes:
        option: that asks for it.
        source: what is encoded, one of them.
        value: what that becomes.
        if_unwritable: the way out where the folder cannot be written.
        if_too_large: the way out where the disk has no space for it.
    """

    option: str
    source: str
    value: str
    if_unwritable: str
    if_too_large: str


class CacheFile(NamedTuple):
    """An undamaged file of this process: its records' numbers and places, (n,), int64."""

    name: str
    digest: FileDigest
    numbers: np.ndarray
    places: np.ndarray


@dataclass(frozen=True)
class CacheContent:
    """Undamaged files of a cache and what they hold, the same in all processes.

    Attributes:
        files: by name.
        table: file (by its place in ``files``) and place in the file of each posterior, (entries, 2), int64; -1 for
            those that are missing.
    """

    files: Mapping[str, FileDigest]
    table: np.ndarray

    @property
    def missing(self) -> np.ndarray:
        """Numbers of the posteriors that are missing, ascending, (n,), int64."""
        return np.flatnonzero(self.table[:, 0] < 0)


@dataclass(frozen=True)
class CacheFolder:
    """Folder of a cache, complete or not.

    Attributes:
        parent: the folder that the user named.
        key: what determines the content, as JSON.
        layout: of the records; its key is the folder's name.
        entries: number of posteriors of the complete cache.
        kind: what it holds.
    """

    parent: Path
    key: Mapping[str, Any]
    layout: RecordFormat
    entries: int
    kind: CacheKind

    @property
    def path(self) -> Path:
        """The folder."""
        return self.parent / self.layout.key

    @property
    def label(self) -> str:
        """The option with its value, for messages."""
        return f"{self.kind.option} {printable(str(self.parent), 200)}"

    def store(self, content: CacheContent) -> StoredPosteriors:
        """The posteriors of a cache that lacks none."""
        symmetries = tuple(self.key.get("symmetries", (0, 1) if self.key.get("flips") else (0,)))
        return StoredPosteriors(self.path, self.layout, symmetries, list(content.files), content.table)

    # ------------------------------------------------------------------ manifest

    def read_manifest(self) -> dict[str, FileDigest] | None:
        """The files that the manifest lists, by name; None without a manifest, or if that is damaged."""
        content = read_manifest(self.path, self.key)
        if content is None:
            return None
        with suppress(ConfigError, KeyError, TypeError):
            entries = content.object("files").content
            files = {name: FileDigest(entry["size"], entry["sha256"]) for name, entry in entries.items()}
            if all(map(RECORD_FILE.fullmatch, files)):
                return files
        return None

    def write_manifest(self, content: CacheContent) -> None:
        """Make the cache complete, and delete files that are not part of it. Only the main process calls this."""
        for path in self.path.iterdir():
            if RECORD_FILE.fullmatch(path.name) and path.name not in content.files and not path.is_dir():
                path.unlink(missing_ok=True)
        files = {name: digest._asdict() for name, digest in content.files.items()}
        write_manifest(self.path, self.key, {"files": files})

    # ------------------------------------------------------------------ files

    def verify(self, listed: Mapping[str, FileDigest], accelerator: Accelerator) -> CacheContent:
        """Compare the files that a manifest lists with it; return those that are undamaged. Collective call."""

        def verified(name: str) -> list[CacheFile]:
            path = self.path / name
            try:
                if digest_file(path) != listed[name]:
                    return []
                scan = scan_file(path, self.layout, self.entries, is_verified=True)
            except (ConfigError, OSError):
                return []
            return [CacheFile(name, listed[name], scan.numbers, scan.places)]

        with fail_together(accelerator):
            own = _map_threads(verified, sorted(listed)[accelerator.process_index :: accelerator.num_processes])
        return self.merge(own, accelerator)

    def recover(self, accelerator: Accelerator) -> list[CacheFile]:
        """Files of this process's share that hold undamaged records, from a build that was interrupted or damaged.

        Undamaged records of a file that also has others are copied to a new one. Collective call, by the processes
        of the run that has the lock.
        """
        names = from_main(accelerator, lambda: sorted(path.name for path in self.path.iterdir()))
        names = [name for name in names if RECORD_FILE.fullmatch(name)]
        with fail_together(accelerator), self.os_errors():
            own = _map_threads(self._recover, names[accelerator.process_index :: accelerator.num_processes])
        return own

    def _recover(self, name: str) -> list[CacheFile]:
        path = self.path / name
        try:
            digest = digest_file(path)
        except ConfigError:  # a folder, a pipe, or nobody may read it
            return []
        scan = scan_file(path, self.layout, self.entries)
        if len(scan.numbers) == 0:
            return []
        if scan.is_intact:
            return [CacheFile(name, digest, scan.numbers, scan.places)]
        writer = RecordWriter(self.path, self.layout)
        records, _ = map_records(path, self.layout)
        for place in scan.places.tolist():
            writer.append(np.array(records[place : place + 1]))
        writer.close()
        return written_files(writer)

    def merge(self, own: Sequence[CacheFile], accelerator: Accelerator) -> CacheContent:
        """Combine the files of all processes. Collective call."""
        parts = gather_object([{file.name: file.digest for file in own}])
        files = {name: digest for part in parts for name, digest in part.items()}
        files = {name: files[name] for name in sorted(files)}
        number_of = {name: number for number, name in enumerate(files)}
        rows = [
            np.stack([file.numbers, np.full_like(file.numbers, number_of[file.name]), file.places], axis=1)
            for file in own
        ]
        every = gather_rows(accelerator, torch.from_numpy(np.concatenate([np.empty((0, 3), np.int64), *rows])))
        table = np.full((self.entries, 2), -1, np.int64)
        table[every[:, 0].numpy()] = every[:, 1:].numpy()
        return CacheContent(files, table)

    # ------------------------------------------------------------------ one run at a time

    @contextmanager
    def locked(self, accelerator: Accelerator) -> Iterator[None]:
        """Create the folder and lock it, or wait for the run that has locked it. Collective call.

        Raises:
            ConfigError: the folder cannot be written, or the processes do not share it.
        """
        lock, is_waiting = FolderLock(self.parent, self.path.name), False
        while any_rank(accelerator, self._is_busy(lock, accelerator)):
            if not is_waiting:
                accelerator.print(
                    f"Another run is encoding the same {self.kind.source}s into {printable(str(self.path))}: waiting."
                )
            is_waiting = True
            time.sleep(SECONDS_BETWEEN_ATTEMPTS)
        try:
            with fail_together(accelerator):
                if not self.path.is_dir() or not lock.path.exists():
                    raise ConfigError(f"{self.label} is not one folder for all processes: name one that they share")
            yield
        finally:
            lock.release()

    def _is_busy(self, lock: FolderLock, accelerator: Accelerator) -> bool:
        with fail_together(accelerator):
            if accelerator.is_main_process:
                try:
                    return lock_or_busy(lock, self.path)
                except OSError as error:
                    raise ConfigError(
                        f"{self.label} cannot be written: {error.strerror or error}; {self.kind.if_unwritable}"
                    ) from None
        return False

    @contextmanager
    def os_errors(self) -> Iterator[None]:
        """Re-raise an error of the operating system as a RunError with the way out."""
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{self.label} cannot be written: {error.strerror or error}; once that is repaired, or with another"
                " folder, start the run again: what is encoded stays"
            ) from None


def written_files(writer: RecordWriter) -> list[CacheFile]:
    """What a writer has written, once it is closed."""
    places: dict[str, list[tuple[int, int]]] = {name: [] for name in writer.written}
    for number, name, place in writer.locations:
        places[name].append((number, place))
    return [
        CacheFile(name, digest, *np.array(places[name], np.int64).T.copy()) for name, digest in writer.written.items()
    ]


def from_main(accelerator: Accelerator, function: Any) -> Any:
    """The result of a function in the main process, on all processes. Collective call."""
    results = [None]
    with fail_together(accelerator):
        if accelerator.is_main_process:
            results = [function()]
    broadcast_object_list(results)
    return results[0]


def _map_threads(function: Any, names: Sequence[str]) -> list[CacheFile]:
    """Files of each name, in order; hashing releases the interpreter's lock."""
    with ThreadPoolExecutor(min(8, cores())) as pool:
        return [file for files in pool.map(function, names) for file in files]

"""Building of a cache: what it lacks is encoded once, by all processes together, and read by every later run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate import Accelerator
from tqdm import tqdm

from diffusers_ddpm_ext.errors import ConfigError, warn
from diffusers_ddpm_ext.training.data.cache_folder import (
    CacheContent,
    CacheFile,
    CacheFolder,
    from_main,
    written_files,
)
from diffusers_ddpm_ext.training.data.cache_manifest import MANIFEST, lacks_space
from diffusers_ddpm_ext.training.data.posterior_files import RecordWriter, StoredPosteriors
from diffusers_ddpm_ext.training.distributed import fail_together


@dataclass(frozen=True)
class CacheJob:
    """One cache, and how its content is made.

    Attributes:
        folder: of the cache.
        records: of the entries with some numbers, (1,) each, a few at a time, in order.
    """

    folder: CacheFolder
    records: Callable[[np.ndarray], Iterator[list[np.ndarray]]]


def open_cache(job: CacheJob, accelerator: Accelerator) -> StoredPosteriors:
    """Open a cache that is complete; otherwise complete it, or wait for another run that does. Collective call."""
    folder = job.folder
    content = _open_complete(folder, accelerator)
    if content is None:
        with folder.locked(accelerator):
            content = _open_complete(folder, accelerator) or _complete(job, accelerator)
    return folder.store(content)


def _open_complete(folder: CacheFolder, accelerator: Accelerator) -> CacheContent | None:
    """Content of a cache that is complete and undamaged; otherwise None."""
    listed = from_main(accelerator, folder.read_manifest)
    if listed is None:
        return None
    content = folder.verify(listed, accelerator)
    return None if set(content.files) < set(listed) or len(content.missing) else content


def _complete(job: CacheJob, accelerator: Accelerator) -> CacheContent:
    """Encode what a cache lacks, and write its manifest. Collective call, by the run that has the lock."""
    folder, kind = job.folder, job.folder.kind
    own = folder.recover(accelerator)
    content = folder.merge(own, accelerator)
    missing = content.missing
    if accelerator.is_main_process and (folder.path / MANIFEST).exists():
        warn(f"{folder.label}: {folder.path.name} is damaged; {len(missing):,} {kind.value}s of it are encoded again")
    with fail_together(accelerator), folder.os_errors():
        if accelerator.is_main_process:
            _check_free_space(folder, len(missing))
    share = missing[accelerator.process_index :: accelerator.num_processes]
    bar = tqdm(
        total=len(missing), desc=f"encoding {kind.source}s", unit=kind.source, delay=1, leave=False,
        disable=not accelerator.is_main_process,
    )  # fmt: skip
    with fail_together(accelerator), folder.os_errors(), bar:
        own += _encode(job, share, bar, accelerator.num_processes)
    content = folder.merge(own, accelerator)
    with fail_together(accelerator), folder.os_errors():
        if accelerator.is_main_process:
            folder.write_manifest(content)
    return content


def _check_free_space(folder: CacheFolder, missing: int) -> None:
    """Refuse a cache that the disk has no space for, before hours are spent on it."""
    lack = lacks_space(folder.path, missing * folder.layout.record.itemsize)
    if lack is not None:
        raise ConfigError(f"{folder.label}: the {folder.kind.value}s take {lack}: {folder.kind.if_too_large}")


def _encode(job: CacheJob, numbers: np.ndarray, bar: Any, processes: int) -> list[CacheFile]:
    """Encode the entries with these numbers, each of which is on the disk before the next few are begun."""
    writer = RecordWriter(job.folder.path, job.folder.layout)
    try:
        for records in job.records(numbers):
            for record in records:
                writer.append(record)
            bar.update(min(len(records) * processes, bar.total - bar.n))  # the other processes are as fast
    finally:
        writer.close()
    return written_files(writer)

"""Which images a source has, without reading them: files by path, size and times, datasets by their fingerprint."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.errors import printable
from diffusers_ddpm_ext.training.data.cache_manifest import CacheUnavailable
from diffusers_ddpm_ext.training.data.image_files import RemoteFile, locate
from diffusers_ddpm_ext.training.data.image_scan import ImageSource
from diffusers_ddpm_ext.training.data.sources import DatasetSource, FolderSource


@dataclass(frozen=True)
class SourceIdentity:
    """What a source reads.

    Attributes:
        key: changes whenever an image may have changed, as JSON.
        num_bytes: size of the files.
    """

    key: Mapping[str, Any]
    num_bytes: int


def identify(source: ImageSource) -> SourceIdentity | None:
    """Find out which images a source has; None for a source in memory.

    Raises:
        CacheUnavailable: some of them are in another file system, where nobody can see when they change.
    """
    if isinstance(source, FolderSource):
        stamps = _Stamps()
        stamps.add(source.names, source.folder)
        return SourceIdentity({"folder": os.path.realpath(source.folder)} | stamps.key, stamps.num_bytes)
    if isinstance(source, DatasetSource):
        return _identify_dataset(source)
    return None


class _Stamps:
    """Hash of the paths, sizes and times of files.

    The time of the last change of the file's entry (ctime) is part of it: unlike the time of the last modification,
    programs that copy and unpack files cannot set it.
    """

    def __init__(self) -> None:
        self.num_bytes = self._count = 0
        self._digest = hashlib.sha256()

    def add(self, paths: Iterable[str], folder: str | os.PathLike[str] = "") -> None:
        """Add files, by their paths in a folder; one that is missing counts as such."""
        prefix = os.path.join(folder, "") if folder else ""
        for path in paths:
            try:
                status = os.stat(prefix + path)
                stamp = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
                self.num_bytes += status.st_size
            except (OSError, ValueError) as error:
                stamp = type(error).__name__
            self._digest.update(os.fsencode(path) + f"\0{stamp}\0".encode())
            self._count += 1

    @property
    def key(self) -> dict[str, Any]:
        """Number and hash of the files, as JSON."""
        return {"count": self._count, "files": self._digest.hexdigest()}


def _identify_dataset(source: DatasetSource) -> SourceIdentity:
    stamps = _Stamps()
    stamps.add(file["filename"] for file in source.table.cache_files)
    external = _external_files(source)
    stamps.add(external)
    key = {
        "dataset": str(source.table._fingerprint),  # the one that `datasets` names its own caches by
        "column": source.image_column,
        "rows": len(source.rows),
        "working_directory": os.getcwd() if any(not os.path.isabs(path) for path in external) else "",
    }
    return SourceIdentity(key | stamps.key, stamps.num_bytes)


def _external_files(source: DatasetSource) -> list[str]:
    """The files of images that a dataset does not hold itself."""
    import pyarrow
    import pyarrow.compute

    cells = source.table.data.column(source.image_column)
    if pyarrow.types.is_struct(cells.type):
        if {field.name for field in cells.type} != {"bytes", "path"}:
            return []
        embedded = pyarrow.compute.struct_field(cells, "bytes")
        if not embedded.null_count:
            return []
        cells = pyarrow.compute.struct_field(cells, "path").filter(pyarrow.compute.is_null(embedded))
    elif not pyarrow.types.is_string(cells.type) and not pyarrow.types.is_large_string(cells.type):
        return []
    paths = [locate(path) for path in cells.to_pylist() if path is not None]
    for path in paths:
        if isinstance(path, RemoteFile):
            raise CacheUnavailable(
                f"{printable(path.url, 200)} is in another file system, where changes cannot be seen"
            )
    return [str(path) for path in paths if isinstance(path, Path)]

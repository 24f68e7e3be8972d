"""Files of a latent cache: records that are complete or do not count, and posteriors read from them.

A file is a sequence of records of one size. One process appends them, and nobody changes them afterwards:

    number    int64     of the posterior in the cache
    checksum  uint32    CRC-32 of the cache's key, the number and the values
    unused    4 bytes
    values    float32 or float16, (m, c, h, w): mean, and standard deviation where m is 2

A process that is killed leaves at most one incomplete record, the last one of its file.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusers_ddpm_ext.errors import RunError
from diffusers_ddpm_ext.training.data.posterior import Posterior
from diffusers_ddpm_ext.utils.input_files import open_input

RECORD_FILE = re.compile(r"records-[0-9a-f]{16}\.bin", re.ASCII)
MAX_FILE_BYTES = 2**28  # files are verified in parallel


class FileDigest(NamedTuple):
    """Size of a file in bytes, and its sha256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class RecordFormat:
    """Layout of the records of a cache.

    Attributes:
        key: identity of the cache; a record of another cache does not count.
        moments: 2 for mean and standard deviation, 1 for the mean alone.
        shape: channels, height and width of a latent.
        dtype: of the values, ``float32`` or ``float16``.
    """

    key: str
    moments: int
    shape: tuple[int, int, int]
    dtype: str

    @property
    def record(self) -> np.dtype[Any]:
        """NumPy's description of a record."""
        values = (f"<{np.dtype(self.dtype).str[1:]}", (self.moments, *self.shape))
        return np.dtype([("number", "<i8"), ("checksum", "<u4"), ("unused", "<u4"), ("values", *values)])

    def checksum(self, number: int, values: np.ndarray) -> int:
        """Checksum of a record."""
        return zlib.crc32(np.ascontiguousarray(values).data, zlib.crc32(f"{self.key} {number}".encode()))

    def is_valid(self, record: Any) -> bool:
        """Whether a record is complete and undamaged."""
        return bool(record["checksum"] == self.checksum(int(record["number"]), record["values"]))

    def encode(self, number: int, posterior: Posterior) -> np.ndarray:
        """A record of the posterior of one image, (1,).

        Raises:
            OverflowError: a value is not finite, in the dtype of the cache.
        """
        tensors = [posterior.mean] if self.moments == 1 or posterior.std is None else list(posterior)
        record = np.zeros(1, self.record)
        with np.errstate(over="ignore"):
            record["number"], record["values"][0] = number, torch.cat(tensors).cpu().numpy()  # type: ignore[arg-type]
        if not np.isfinite(record["values"]).all():
            largest = max(float(tensor.abs().max()) for tensor in tensors if tensor is not None)
            raise OverflowError(f"{largest:g}")
        record["checksum"] = self.checksum(number, record["values"][0])
        return record


class RecordWriter:
    """Appends records to new files of a folder; each is on its way to the disk when `append` returns."""

    def __init__(self, folder: Path, layout: RecordFormat) -> None:
        self.written: dict[str, FileDigest] = {}
        self.locations: list[tuple[int, str, int]] = []
        """Number, file and place in the file of each record."""
        self._folder, self._layout = folder, layout
        self._file: Any = None
        self._name, self._size, self._hash = "", 0, hashlib.sha256()

    def append(self, record: np.ndarray) -> None:
        """Append a record, (1,).

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        if self._file is None:
            self._name, self._size, self._hash = f"records-{secrets.token_hex(8)}.bin", 0, hashlib.sha256()
            self._file = (self._folder / self._name).open("xb", buffering=0)  # a killed process loses no record
        content = record.tobytes()
        rest = memoryview(content)
        while rest:
            rest = rest[self._file.write(rest) :]
        self._hash.update(content)
        self.locations.append((int(record["number"][0]), self._name, self._size // len(content)))
        self._size += len(content)
        if self._size >= MAX_FILE_BYTES:
            self.close()

    def close(self) -> None:
        """Flush the present file to the disk; the next record begins another one.

        Raises:
            OSError: the disk is full.
        """
        if self._file is not None:
            try:
                os.fsync(self._file.fileno())
            finally:
                self._file.close()
                self._file = None
            self.written[self._name] = FileDigest(self._size, self._hash.hexdigest())


class FileScan(NamedTuple):
    """Numbers and places of the undamaged records of a file, (n,), int64, and whether it has nothing else."""

    numbers: np.ndarray
    places: np.ndarray
    is_intact: bool


def digest_file(path: Path) -> FileDigest:
    """Size and checksum of a file; a ConfigError if it is missing or not a regular file."""
    with open_input(path) as file:
        digest = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]
        return FileDigest(file.tell(), digest.hexdigest())


def scan_file(path: Path, layout: RecordFormat, entries: int, is_verified: bool = False) -> FileScan:
    """Find the undamaged records of a file.

    Args:
        path: a regular file.
        layout: of the cache.
        entries: number of posteriors of the complete cache; a record with another number does not count.
        is_verified: whether the file's checksum is known to be right, so that those of the records need not be read.
    """
    records, whole = map_records(path, layout)
    numbers = np.asarray(records["number"], np.int64)
    valid = (numbers >= 0) & (numbers < entries)
    if not is_verified:
        valid &= np.fromiter(map(layout.is_valid, records), bool, len(records))
    places = np.flatnonzero(valid)
    return FileScan(numbers[places], places, whole and len(places) == len(records))


def map_records(path: Path, layout: RecordFormat) -> tuple[np.ndarray, bool]:
    """The complete records of a file, mapped into memory, and whether it has nothing else."""
    size = path.stat().st_size
    count, rest = divmod(size, layout.record.itemsize)
    if count == 0:  # an empty file cannot be mapped
        return np.empty(0, layout.record), rest == 0
    return np.memmap(path, layout.record, "r", shape=(count,)), rest == 0


@dataclass
class StoredPosteriors:
    """Posteriors of all loaded images in the files of a complete cache, a `PosteriorStore`.

    Each is verified when it is read. The files are mapped at once: another run may replace damaged ones.

    Attributes:
        folder: of the cache.
        layout: of its records.
        symmetries: the n ways in which each image is flipped and turned (see `augmentation`): the posterior of image
            ``row`` in the way at place i has number n row + i.
        files: names of the files.
        table: file (by its place in ``files``) and place in the file of each posterior, (entries, 2), int64.
    """

    folder: Path
    layout: RecordFormat
    symmetries: tuple[int, ...]
    files: Sequence[str]
    table: np.ndarray
    _maps: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for file in range(len(self.files)):
            self._records(file)

    @property
    def nbytes(self) -> int:
        """Size of the cache in bytes."""
        return len(self.table) * self.layout.record.itemsize

    def load(self, rows: Tensor, symmetries: Tensor) -> Posterior:
        """Return posteriors, (b, c, h, w), float32, on the CPU.

        Args:
            rows: which of the loaded images, (b,), int64.
            symmetries: how the images are flipped and turned, (b,), int64.

        Raises:
            ValueError: the cache does not have images that are flipped or turned in this way.
            RunError: a posterior is damaged.
        """
        place_of = {symmetry: place for place, symmetry in enumerate(self.symmetries)}
        wanted = symmetries.tolist()
        if not place_of.keys() >= set(wanted):
            raise ValueError(f"{self.folder} does not have images that are flipped or turned so.")
        numbers = [
            len(place_of) * row + place_of[symmetry] for row, symmetry in zip(rows.tolist(), wanted, strict=True)
        ]
        values = np.empty((self.layout.moments, len(numbers), *self.layout.shape), np.float32)
        for position, number in enumerate(numbers):
            file, place = self.table[number].tolist()
            record = self._records(file)[place]
            if record["number"] != number or not self.layout.is_valid(record):
                raise RunError(
                    f"an entry of {self.folder / self.files[file]} is damaged: resume from the last checkpoint, which"
                    " encodes it again"
                )
            values[:, position] = record["values"]
        mean, *std = torch.from_numpy(values)
        return Posterior(mean, *std)

    def _records(self, file: int) -> np.ndarray:
        if file not in self._maps:
            path = self.folder / self.files[file]
            try:
                self._maps[file] = map_records(path, self.layout)[0]
            except OSError as error:
                raise RunError(
                    f"{path} cannot be read ({error.strerror}): resume from the last checkpoint, which"
                    " encodes missing ones again"
                ) from None
        return self._maps[file]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}  # a pickled map would be a copy of the file

"""Files of an image cache: the pixels of all images one after the other, and an index with an entry for each row.

``pixels.bin`` has the pixels as they are in memory, (C, h, w) each. ``index.bin`` has `ENTRY` for every row of the
source, also for those that cannot be read. While a cache is built the files end in ``.part``; a process that is killed
leaves at most one incomplete image at the end of them, and its successor continues there.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from diffusers_ddpm_ext.training.data.decoding import DecodedImage

INDEX, PIXELS = "index.bin", "pixels.bin"
ENTRY = np.dtype(
    [
        ("start", "<i8"),  # of the pixels in the file, in bytes
        ("checksum", "<u4"),  # CRC-32 of the cache's name, the row and the pixels
        ("split", "<u4"),  # key of the image's name, by which images are held out for validation
        ("height", "<u4"),
        ("width", "<u4"),
        ("channels", "<u2"),  # 0 where the image cannot be read
        ("notes", "u1"),  # the yes and no of `DecodedImage`, a bit each
        ("dtype", "S5"),  # NumPy's description, with the byte order
        ("low", "<f8"),  # the smallest and the largest value before the image was resized
        ("high", "<f8"),
        ("suffix", "S4"),  # of a file that holds such pixels
    ]
)
NOTES = tuple(field.name for field in fields(DecodedImage) if field.type == "bool")
BUFFER = 2**20


def checksum(name: str, row: int, pixels: np.ndarray) -> int:
    """Checksum of the pixels in a row of a cache."""
    return zlib.crc32(pixels.data, zlib.crc32(f"{name} {row} {pixels.shape}".encode()))


def shape_of(entry: Any) -> tuple[int, int, int]:
    """Channels, height and width of an image."""
    return int(entry["channels"]), int(entry["height"]), int(entry["width"])


def read_pixels(file: np.ndarray, entry: Any) -> np.ndarray:
    """The pixels of an entry, (C, h, w), a view of the file.

    Args:
        file: the whole of ``pixels.bin``, uint8.
        entry: of the index, with channels.

    Raises:
        ValueError: the entry is not one of this file.
    """
    dtype, shape, start = np.dtype(entry["dtype"].decode()), shape_of(entry), int(entry["start"])
    size = dtype.itemsize * shape[0] * shape[1] * shape[2]
    values: np.ndarray = file[start : start + size].view(dtype).reshape(shape)
    return values


def map_file(path: Path, dtype: Any = np.uint8) -> np.ndarray:
    """A file as an array in memory that is read when it is used; what is left of its last element is left out.

    Raises:
        OSError: there is none, or it cannot be read.
    """
    count = path.stat().st_size // np.dtype(dtype).itemsize
    if count == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, "r", shape=(count,)))


class ImageWriter:
    """Appends images to the unfinished files of a cache.

    Attributes:
        rows: number of rows that are written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parts = {name: folder / f"{name}.part" for name in (INDEX, PIXELS)}
        self._files: dict[str, Any] = {}
        self.rows, self._end = 0, 0

    def kept(self, name: str) -> Iterator[DecodedImage | None]:
        """Yield the images that another process has written before it ended, None for rows that cannot be read.

        What is appended afterwards follows the last row after which the next one was asked for.

        Args:
            name: of the cache.
        """
        with suppress(OSError, ValueError, TypeError):
            index, pixels = map_file(self._parts[INDEX], ENTRY), map_file(self._parts[PIXELS])
            for row, entry in enumerate(index):
                decoded = None
                if entry["channels"]:
                    values = read_pixels(pixels, entry)
                    if entry["start"] != self._end or checksum(name, row, values) != entry["checksum"]:
                        return
                    notes = {note: bool(entry["notes"] >> bit & 1) for bit, note in enumerate(NOTES)}
                    low, high, suffix = float(entry["low"]), float(entry["high"]), entry["suffix"].decode()
                    decoded = DecodedImage(values, low=low, high=high, suffix=suffix, **notes)
                yield decoded
                self.rows, self._end = row + 1, self._end + (0 if decoded is None else decoded.pixels.nbytes)

    def append(self, name: str, split: int, decoded: DecodedImage | None) -> None:
        """Append the next row.

        Args:
            name: of the cache.
            split: key of the image's name.
            decoded: the image; None where it cannot be read.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        if not self._files:
            self._open()
        entry = np.zeros(1, ENTRY)
        entry["start"], entry["split"] = self._end, split
        if decoded is not None:
            pixels = np.ascontiguousarray(decoded.pixels)
            entry["checksum"], entry["dtype"] = checksum(name, self.rows, pixels), pixels.dtype.str.encode()
            entry["channels"], entry["height"], entry["width"] = pixels.shape
            entry["low"], entry["high"], entry["suffix"] = decoded.low, decoded.high, decoded.suffix.encode()
            entry["notes"] = sum(getattr(decoded, note) << bit for bit, note in enumerate(NOTES))
            self._files[PIXELS].write(pixels.data)
            self._end += pixels.nbytes
        self._files[INDEX].write(entry.tobytes())
        self._files[INDEX].flush()  # its buffer would hold as many rows as take a minute to decode
        self.rows += 1

    def _open(self) -> None:
        ends = {INDEX: self.rows * ENTRY.itemsize, PIXELS: self._end}
        for name, path in self._parts.items():
            self._files[name] = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", BUFFER)
            self._files[name].truncate(ends[name])
            self._files[name].seek(ends[name])

    def finish(self) -> int:
        """Flush the files to the disk and give them their names; return the size of the pixels in bytes.

        Raises:
            OSError: the disk is full.
        """
        if not self._files:
            self._open()
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self.close()
        for name, path in self._parts.items():
            path.replace(self._folder / name)
        return self._end

    def close(self) -> None:
        """Close the files; what is written of them stays for a later build."""
        files, self._files = list(self._files.values()), {}
        for file in files:
            with suppress(OSError):  # a full disk, which `append` has reported
                file.close()

    def discard(self) -> None:
        """Delete what is written."""
        self.close()
        for path in self._parts.values():
            with suppress(OSError):
                path.unlink(missing_ok=True)

"""Image files: finding those of a folder, and opening one without waiting, executing or filling the memory."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.utils.input_files import open_input

# Formats for which Pillow starts another program (EPS: Ghostscript), cannot decode by itself, or that are no images.
EXCLUDED_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# Tried first: some formats are only recognized by parsing them, which takes as long as decoding a small image.
COMMON_FORMATS = {"BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"}
# Images of types that Pillow lacks, or lacks on this machine: counted, so that nobody misses them.
OTHER_IMAGE_TYPES = {
    ".ai", ".arw", ".avif", ".avifs", ".cr2", ".cr3", ".dng", ".eps", ".exr", ".hdr", ".heic", ".heics", ".heif",
    ".heifs", ".hif", ".jp2", ".j2k", ".jxl", ".jxr", ".kra", ".nef", ".nrw", ".orf", ".pef", ".psb", ".raf", ".raw",
    ".rw2", ".srw", ".svg", ".svgz", ".webp", ".wmf", ".emf", ".x3f", ".xcf", ".dcm",
}  # fmt: skip
# Folders of thumbnails and deleted files that systems leave among the user's images.
SYSTEM_FOLDERS = {
    "__macosx", "@eadir", "@tmp", "#recycle", "#snapshot", "$recycle.bin", "lost+found", "system volume information",
}  # fmt: skip
ARRAY_EXTENSIONS = frozenset((".npy", ".npz"))
MAX_DECODED_BYTES = 2**27
"""Bytes that a decoded image may have, or ``MAX_EXPANSION`` for each byte of its file: photographs have far less."""
MAX_EXPANSION = 64
LARGE = 2**25
"""Images of more bytes are decoded one at a time, however many threads there are."""
MAX_REMOTE_BYTES = 2**30
_one_large_image = Lock()


@dataclass(frozen=True)
class RemoteFile:
    """A file in another file system of `fsspec`: ``zip://a.png::images.zip``, ``https://...``, ``memory://...``."""

    url: str

    def read(self) -> bytes:
        """The content of the file.

        Raises:
            ConfigError: it cannot be read, or has more than 1 GiB.
        """
        name = printable(self.url, 200)
        try:
            import fsspec
        except ImportError:
            raise ConfigError(f"{name} needs `fsspec`: pip install fsspec") from None
        try:
            with fsspec.open(self.url, "rb") as file:
                content = bytes(file.read(MAX_REMOTE_BYTES + 1))
        except Exception as error:  # every file system has errors of its own
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"{name} cannot be read: {printable(reason, 200)}") from None
        if len(content) > MAX_REMOTE_BYTES:
            raise ConfigError(f"{name} has more than {MAX_REMOTE_BYTES:,} bytes")
        return content


@dataclass(frozen=True)
class ListCell:
    """An image in nested lists: Python's, or one row of an Arrow column."""

    values: Any


Payload = bytes | Path | RemoteFile | ListCell | np.ndarray | None
"""An undecoded image: the content of its file, the path of it, an array, or None if there is none."""


def locate(path: str, folder: Path | None = None) -> Path | RemoteFile:
    """A path as a column holds it: in a file system of `fsspec`, absolute, or inside ``folder``."""
    if "://" in path or "::" in path:
        return RemoteFile(path)
    local = Path(path).expanduser() if path.startswith("~") else Path(path)
    return local if folder is None else folder / local


@cache
def readable_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read, in the order in which it tries them."""
    Image.init()
    names = set(Image.OPEN) - EXCLUDED_FORMATS
    return tuple(sorted(names, key=lambda name: (name not in COMMON_FORMATS, name)))


@cache
def image_extensions() -> frozenset[str]:
    """Extensions of image files that are read, in lower case."""
    formats = {*readable_formats(), "MPO"}  # Pillow opens MPO files as JPEG
    return frozenset(extension for extension, name in Image.registered_extensions().items() if name in formats)


@dataclass(frozen=True)
class FolderFiles:
    """The files of a folder and its subfolders, as sorted paths inside it with forward slashes.

    Attributes:
        images: files with an extension that Pillow or NumPy reads.
        metadata: files named metadata.csv or metadata.jsonl.
        other_images: images of types that are not read, by extension: their number.
        other_files: all files that are neither images nor metadata, by extension: their number.
        count: number of all files, hidden ones excepted.
    """

    images: list[str]
    metadata: list[str]
    other_images: dict[str, int]
    other_files: dict[str, int]
    count: int


def find_files(root: Path, metadata_names: tuple[str, ...]) -> FolderFiles:
    """Find the images of a folder; hidden files and folders, and those of the system, are left out."""
    images, metadata, others, count = [], [], Counter[str](), 0
    extensions = image_extensions() | ARRAY_EXTENSIONS
    for name in _walk(root):
        count += 1
        base = name.rpartition("/")[2]
        stem, dot, tail = base.rpartition(".")
        extension = (dot + tail).lower() if stem else ""
        if extension in extensions:
            images.append(name)
        elif base in metadata_names:
            metadata.append(name)
        else:
            others[extension] += 1
    other_images = {
        extension: number for extension, number in sorted(others.items()) if extension in OTHER_IMAGE_TYPES
    }
    return FolderFiles(sorted(images), sorted(metadata), other_images, dict(others), count)


def first_image(root: Path) -> Path | None:
    """One of the images of a folder, the first that the system lists; None without images, or with arrays alone."""
    extensions = image_extensions()
    names = (name for name in _walk(root) if os.path.splitext(name)[1].lower() in extensions)
    name = next(names, None)
    return None if name is None else root / name


def _walk(root: Path) -> Iterator[str]:
    """Yield the files below a folder, following each link to a folder once."""
    visited = set()
    for parent, folders, files in os.walk(root, followlinks=True):
        real_path = os.path.realpath(parent)
        if real_path in visited:
            folders.clear()
            continue
        visited.add(real_path)
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        inside = os.path.relpath(parent, root).replace(os.sep, "/")
        prefix = "" if inside == "." else f"{inside}/"
        yield from (prefix + name for name in files if not _is_hidden(name))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


@contextmanager
def open_image(payload: bytes | Path | RemoteFile) -> Iterator[tuple[Image.Image, bytes | Path]]:
    """Open an image without decoding it.

    Yields:
        The image, and its content or path for what Pillow does not report. Both are used before the file is closed.

    Raises:
        ConfigError: it is missing, empty, not a regular file, or would take too much memory.
        UnidentifiedImageError: Pillow does not know its format, or executes another program to read it.
    """
    with ExitStack() as stack:
        if isinstance(payload, RemoteFile):
            payload = payload.read()
        if isinstance(payload, bytes):
            file: BinaryIO = BytesIO(payload)
            size = len(payload)
        else:
            file = stack.enter_context(open_image_file(payload))
            size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise ConfigError("it is empty: 0 bytes")
        image = stack.enter_context(Image.open(file, formats=readable_formats()))
        stack.enter_context(turn_of(_decoded_bytes(image, size)))
        yield image, payload


@contextmanager
def turn_of(num_bytes: int) -> Iterator[None]:
    """Wait until no other image of many bytes is decoded, if this one has so many. Not to be nested."""
    with _one_large_image if num_bytes > LARGE else nullcontext():
        yield


def open_image_file(path: Path) -> BinaryIO:
    """Open a regular file; the reason why it is none stands alone, since messages name the image."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise ConfigError(getattr(error, "strerror", None) or str(error)) from None
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
        raise ConfigError(f"it is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a file")
    return open_input(path)


def _decoded_bytes(image: Image.Image, file_size: int) -> int:
    """Bytes of the pixels of an image; far more than its file suggests are refused."""
    bytes_per_pixel = 1 if image.mode in ("1", "L") else 2 if image.mode.startswith("I;16") else 4
    needed = image.width * image.height * bytes_per_pixel
    check_decoded_bytes(needed, file_size, f"{image.width:,} x {image.height:,} pixels")
    return needed


def check_decoded_bytes(needed: int, file_size: int, size: str = "its pixels") -> None:
    """Raise a ConfigError if pixels of ``needed`` bytes are far more than the file suggests."""
    if needed > max(MAX_DECODED_BYTES, MAX_EXPANSION * file_size):
        raise ConfigError(f"{size} in a file of {file_size:,} bytes would take {needed / 1e6:,.0f} MB: scale it down")

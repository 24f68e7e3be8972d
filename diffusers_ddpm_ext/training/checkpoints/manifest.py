"""Manifest of a checkpoint folder, and verification of the folder's files against it.

``manifest.json`` lists every file of a checkpoint with its size and sha256. Its first entry is a checksum of the rest:

    {
    "sha256": "<of all bytes after this line>",
     "format": 1,
     "version": "<of this package>",
     "step": 40,
     "facts": {},
     "files": {"optimizer.safetensors": {"size": 1234, "sha256": "..."}, ...}
    }

Nothing is ever unpickled or imported from a checkpoint: files are bytes with a checksum, and only files that the
manifest lists are opened.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext._version import __version__
from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.utils.input_files import decode_text, parse_json

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
MANIFEST_SIZE_LIMIT = 1 << 26  # bytes; a larger file is not a manifest and would only fill the memory
CHECKPOINT_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})", re.ASCII)
# The checksum is of bytes, so that it does not depend on a JSON library. This line is the same in every format.
CHECKSUM_LINE = re.compile(rb'\{\n"sha256": "([0-9a-f]{64})",\n')
# Errors that mean a damaged file when it is opened or read. Any other (no permission, too many open files) is not
# about the file, and the user has to fix it.
DAMAGE_ERRNOS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.EIO, errno.ENAMETOOLONG)


class DamagedCheckpoint(ValueError):
    """A folder that differs from what was written; the message describes the damage in one sentence."""


class NewerCheckpointFormat(ValueError):
    """A checkpoint in a format of a later version of this package: intact, but this version cannot read it."""


@dataclass(frozen=True)
class FileDigest:
    """Size of a file in bytes, and its sha256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose manifest is valid."""

    path: Path
    step: int  # optimizer steps done
    files: Mapping[str, FileDigest]  # by name relative to the folder, with / between parts


def digest_file(file: FileIO) -> FileDigest:
    """Compute size and checksum of a file that is open for reading, at its beginning."""
    digest = hashlib.file_digest(file, "sha256")
    return FileDigest(file.tell(), digest.hexdigest())


def encode_manifest(step: int, files: Mapping[str, FileDigest]) -> bytes:
    """Encode ``manifest.json`` for a checkpoint's step and files (without the manifest), with its checksum."""
    entries = {name: {"size": files[name].size, "sha256": files[name].sha256} for name in sorted(files)}
    # Format 1 has an object for facts about the run; nothing is stored in it.
    content = {"format": MANIFEST_FORMAT, "version": __version__, "step": step, "facts": {}, "files": entries}
    return add_checksum(json.dumps(content, indent=1, allow_nan=False).encode("ascii"))


def add_checksum(text: bytes) -> bytes:
    """Insert the checksum line into a JSON object written by `json.dumps` with an indent."""
    body = text.removeprefix(b"{\n") + b"\n"
    return b'{\n"sha256": "%s",\n' % hashlib.sha256(body).hexdigest().encode() + body


def read_manifest(folder: Path) -> Checkpoint:
    """Read the manifest of a checkpoint, under any name of its folder, without opening any other file.

    Raises:
        DamagedCheckpoint: the manifest is missing, altered or invalid.
        NewerCheckpointFormat: its format is newer than this version reads.
        OSError: as `verify`.
    """
    if not folder.is_dir():
        raise DamagedCheckpoint(f"{folder} is not a folder" if os.path.lexists(folder) else f"{folder} does not exist")
    content = _read_content(folder)
    step, files = content.get("step"), content.get("files")
    if type(step) is not int or step < 0 or not isinstance(files, dict) or not isinstance(content.get("facts"), dict):
        raise DamagedCheckpoint(f"{folder}: {MANIFEST} lacks a step, files or facts")
    name = CHECKPOINT_NAME.fullmatch(folder.name)
    if name and int(name[1]) != step:
        raise DamagedCheckpoint(f"{folder} contains step {step}, not the one in its name")
    return Checkpoint(folder, step, {name: _parse_entry(folder, name, entry) for name, entry in files.items()})


def _read_content(folder: Path) -> dict[str, Any]:
    """Content of a manifest whose checksum is right and whose format this version reads."""
    with _open_file(folder, MANIFEST, MANIFEST_SIZE_LIMIT) as file:
        raw = file.read()
    match = CHECKSUM_LINE.match(raw)
    if match is None or hashlib.sha256(raw[match.end() :]).hexdigest().encode() != match[1]:
        raise DamagedCheckpoint(f"{folder}: {MANIFEST} does not match its own sha256")
    try:
        content: dict[str, Any] = parse_json(decode_text(raw, MANIFEST), MANIFEST)
    except ConfigError as error:
        raise DamagedCheckpoint(
            f"{folder}: {MANIFEST} is not JSON: {str(error).removeprefix(MANIFEST).strip(' .')}"
        ) from None
    number = content.get("format")
    if type(number) is not int or number < 1:
        raise DamagedCheckpoint(f"{folder}: {MANIFEST} has no format number")
    if number > MANIFEST_FORMAT:
        raise NewerCheckpointFormat(
            f"{folder} is in format {number} and version {__version__} of this package reads format {MANIFEST_FORMAT}:"
            f" install diffusers-ddpm-ext {content.get('version', '(the version that wrote it)')} or newer"
        )
    return content


def _parse_entry(folder: Path, name: str, entry: Any) -> FileDigest:
    """Check an entry of a manifest: a plain name below the folder, a size and a checksum."""
    plain = name.isprintable() and "\\" not in name and name != MANIFEST
    if not plain or any(part in ("", ".", "..") for part in name.split("/")):
        raise DamagedCheckpoint(
            f"{folder}: {MANIFEST} lists {printable(name, 100)!r}, which is not a name of a file in it"
        )
    size, sha256 = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
    if type(size) is not int or size < 0 or not isinstance(sha256, str):
        raise DamagedCheckpoint(f"{folder}: {MANIFEST} has no size and sha256 for {name}")
    return FileDigest(size, sha256)


def verify(folder: Path) -> Checkpoint:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        DamagedCheckpoint: a file is missing or differs; the message names it.
        NewerCheckpointFormat: as `read_manifest`.
        OSError: a file cannot be read for a reason unrelated to its content (permission, too many open files).
    """
    checkpoint = read_manifest(folder)
    for name, expected in checkpoint.files.items():
        with _open_file(folder, name, expected.size) as file:
            actual = digest_file(file)
        if actual.size != expected.size:
            raise DamagedCheckpoint(
                f"{folder}: {name} has {actual.size} bytes and should have {expected.size} by {MANIFEST}"
            )
        if actual.sha256 != expected.sha256:
            raise DamagedCheckpoint(f"{folder}: the sha256 of {name} is not the one in {MANIFEST}")
    return checkpoint


@contextmanager
def _open_file(folder: Path, name: str, size_limit: int) -> Iterator[FileIO]:
    """Open a regular file of limited size, following no symbolic link below the folder."""
    descriptor, shown = None, printable(name, 100)
    try:
        for above in Path(name).parents[:-1]:
            if (folder / above).is_symlink():
                raise DamagedCheckpoint(f"{folder}: {above} is a symbolic link")
        # Non-blocking: opening a named pipe of this name would wait forever.
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise DamagedCheckpoint(f"{folder}: {shown} is not a regular file")
        if status.st_size > size_limit:
            raise DamagedCheckpoint(
                f"{folder}: {name} has {status.st_size} bytes, more than the {size_limit} expected"
            )
        yield FileIO(descriptor, closefd=False)
    except OSError as error:
        if error.errno not in DAMAGE_ERRNOS:
            raise
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
        reason = "is a symbolic link" if error.errno == errno.ELOOP else f"cannot be read ({error.strerror})"
        raise DamagedCheckpoint(f"{folder}: {shown} {'is missing' if missing else reason}") from None
    finally:
        if descriptor is not None:
            os.close(descriptor)

"""What a checkpoint folder promises, and whether it keeps it.

``manifest.json`` names every file of a checkpoint with its size and sha256, under a seal of its own:

    {
    "sha256": "<of all bytes behind this line>",
     "format": 1,
     "version": "<of this package>",
     "step": 40,
     "facts": {...},
     "files": {"optimizer.safetensors": {"size": 1234, "sha256": "..."}, ...}
    }

Nothing is ever unpickled or imported from a checkpoint: files are bytes with a checksum, and only those that the
manifest names are opened.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext._version import __version__

FORMAT = 1
MANIFEST = "manifest.json"
MANIFEST_LIMIT = 1 << 26  # bytes; more is no manifest and would only fill the memory
CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})", re.ASCII)
# The seal is of bytes, so that it holds whatever a JSON library makes of them. Its form is that of every format.
SEAL = re.compile(rb'\{\n"sha256": "([0-9a-f]{64})",\n')
# What a damaged file says when it is opened or read. Anything else (no permission, too many open files) is not about
# the file, and a person has to put it right.
SIGNS_OF_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.EIO)


class DamagedCheckpoint(ValueError):
    """A folder that is not what was written: the message says in one sentence what is wrong with it."""


class NewerCheckpointFormat(ValueError):
    """A checkpoint in a format of a later version of this package: whole, but not ours to read or to set aside."""


@dataclass(frozen=True)
class FileDigest:
    """What the manifest says of one file: bytes, and their sha256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose manifest is sound.

    Attributes:
        path: the folder.
        step: optimizer steps done.
        files: by name relative to the folder, with ``/`` between parts.
        facts: what the writer noted in the manifest, JSON.
        unnamed: files in the folder that the manifest does not name. They are never opened.
    """

    path: Path
    step: int
    files: Mapping[str, FileDigest]
    facts: Mapping[str, Any]
    unnamed: tuple[str, ...]

    def read(self, name: str) -> bytes:
        """The bytes of one file: the very bytes that were compared with the manifest.

        Args:
            name: as in ``files``.

        Returns:
            All of it.

        Raises:
            DamagedCheckpoint: the manifest does not name it, or it differs from what the manifest says.
        """
        if name not in self.files:
            raise DamagedCheckpoint(f"{self.path}: {MANIFEST} names no {name}")
        with _opened(self.path, name, self.files[name].size) as file:
            data = file.read()
        _compare(self, name, FileDigest(len(data), hashlib.sha256(data).hexdigest()))
        return data


def digest_file(file: FileIO) -> FileDigest:
    """Size and checksum of a file.

    Args:
        file: open for reading, at its beginning.

    Returns:
        Both, of the bytes that were read.
    """
    digest = hashlib.file_digest(file, "sha256")
    return FileDigest(file.tell(), digest.hexdigest())


def encode_manifest(step: int, files: Mapping[str, FileDigest], facts: Mapping[str, Any]) -> bytes:
    """The content of ``manifest.json``.

    Args:
        step: optimizer steps done.
        files: of the checkpoint, the manifest not among them.
        facts: anything that JSON can hold.

    Returns:
        ASCII, sealed.
    """
    named = {name: {"size": files[name].size, "sha256": files[name].sha256} for name in sorted(files)}
    content = {"format": FORMAT, "version": __version__, "step": step, "facts": facts, "files": named}
    return seal(json.dumps(content, indent=1, allow_nan=False).encode("ascii"))


def seal(text: bytes) -> bytes:
    """Put a checksum in front of a JSON object that `json.dumps` wrote with an indent."""
    body = text.removeprefix(b"{\n") + b"\n"
    return b'{\n"sha256": "%s",\n' % hashlib.sha256(body).hexdigest().encode() + body


def read_manifest(folder: Path) -> Checkpoint:
    """Look at a checkpoint without opening any file but its manifest.

    Args:
        folder: a checkpoint, under the name that it was given or another.

    Returns:
        What the manifest says.

    Raises:
        DamagedCheckpoint: the manifest is missing, altered or not to be believed.
        NewerCheckpointFormat: its format is newer than this package.
        OSError: as `verify`.
    """
    if not folder.is_dir():
        raise DamagedCheckpoint(f"{folder} is not a folder" if os.path.lexists(folder) else f"{folder} does not exist")
    content = _manifest_content(folder)
    step, files, facts = content.get("step"), content.get("files"), content.get("facts")
    if type(step) is not int or step < 0 or not isinstance(files, dict) or not isinstance(facts, dict):
        raise DamagedCheckpoint(f"{folder}: {MANIFEST} lacks a step, files or facts")
    named = CHECKPOINT.fullmatch(folder.name)
    if named and int(named[1]) != step:
        raise DamagedCheckpoint(f"{folder} holds step {step}, not the one in its name")
    promised = {name: _promise(folder, name, entry) for name, entry in files.items()}
    return Checkpoint(folder, step, promised, facts, _unnamed(folder, files))


def _manifest_content(folder: Path) -> dict[str, Any]:
    """What stands in a manifest whose seal is whole and whose format is ours."""
    with _opened(folder, MANIFEST, MANIFEST_LIMIT) as file:
        raw = file.read()
    found = SEAL.match(raw)
    if found is None or hashlib.sha256(raw[found.end() :]).hexdigest().encode() != found[1]:
        raise DamagedCheckpoint(f"{folder}: {MANIFEST} is not as it was written")
    try:
        content: dict[str, Any] = json.loads(raw)
    except (ValueError, RecursionError):
        raise DamagedCheckpoint(f"{folder}: {MANIFEST} is not JSON") from None
    number = content.get("format")
    if type(number) is not int or number < 1:
        raise DamagedCheckpoint(f"{folder}: {MANIFEST} names no format")
    if number > FORMAT:
        raise NewerCheckpointFormat(
            f"{folder} is in format {number} and version {__version__} of this package reads format {FORMAT}: install "
            f"diffusers-ddpm-ext {content.get('version', '(the version that wrote it)')} or newer"
        )
    return content


def _promise(folder: Path, name: str, entry: Any) -> FileDigest:
    """One line of a manifest: a plain name below the folder, a size and a checksum."""
    plain = name.isprintable() and "\\" not in name and name != MANIFEST
    if not plain or any(part in ("", ".", "..") for part in name.split("/")):
        raise DamagedCheckpoint(f"{folder}: {MANIFEST} names {name!r}, which is no name of a file in it")
    size, sha256 = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
    if type(size) is not int or size < 0 or not isinstance(sha256, str):
        raise DamagedCheckpoint(f"{folder}: {MANIFEST} has no size and sha256 for {name}")
    return FileDigest(size, sha256)


def _unnamed(folder: Path, files: Collection[str]) -> tuple[str, ...]:
    found = []
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if Path(place, name).is_symlink()]
        found += [Path(place, name).relative_to(folder).as_posix() for name in (*names, *links)]
    return tuple(sorted(name for name in found if name not in files and name != MANIFEST))


def verify(folder: Path) -> Checkpoint:
    """Compare every file of a checkpoint with its manifest.

    Args:
        folder: the checkpoint.

    Returns:
        The checkpoint. Its ``read`` compares again whatever it returns.

    Raises:
        DamagedCheckpoint: something is missing or differs; the message names the file.
        NewerCheckpointFormat: as `read_manifest`.
        OSError: a file cannot be read for a reason that lies outside of it (permission, too many open files).
    """
    checkpoint = read_manifest(folder)
    for name, promised in checkpoint.files.items():
        with _opened(folder, name, promised.size) as file:
            found = digest_file(file)
        _compare(checkpoint, name, found)
    return checkpoint


def _compare(checkpoint: Checkpoint, name: str, found: FileDigest) -> None:
    promised = checkpoint.files[name]
    if found.size != promised.size:
        raise DamagedCheckpoint(
            f"{checkpoint.path}: {name} has {found.size} bytes and should have {promised.size}, says {MANIFEST}"
        )
    if found.sha256 != promised.sha256:
        raise DamagedCheckpoint(f"{checkpoint.path}: the sha256 of {name} is not the one in {MANIFEST}")


@contextmanager
def _opened(folder: Path, name: str, most: int) -> Iterator[FileIO]:
    """Open a plain file of at most so many bytes, through no symbolic link below the folder."""
    descriptor = None
    try:
        for above in Path(name).parents[:-1]:
            if (folder / above).is_symlink():
                raise DamagedCheckpoint(f"{folder}: {above} is a symbolic link")
        # non-blocking: a named pipe of the file's name would keep us waiting for ever
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise DamagedCheckpoint(f"{folder}: {name} is not a plain file")
        if status.st_size > most:
            raise DamagedCheckpoint(f"{folder}: {name} has {status.st_size} bytes, more than the {most} expected")
        yield FileIO(descriptor, closefd=False)
    except OSError as error:
        if error.errno not in SIGNS_OF_DAMAGE:
            raise
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
        linked = "is a symbolic link" if error.errno == errno.ELOOP else f"cannot be read ({error.strerror})"
        raise DamagedCheckpoint(f"{folder}: {name} {'is missing' if missing else linked}") from None
    finally:
        if descriptor is not None:
            os.close(descriptor)

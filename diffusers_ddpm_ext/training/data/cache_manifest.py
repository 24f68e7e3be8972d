"""What all caches share: a folder named by a hash of its key, the manifest that makes it complete, and one builder.

A key is everything that determines the content, as JSON. The manifest is written last, with the key in it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.utils.files import fsync_folder, write_atomically
from diffusers_ddpm_ext.utils.folder_lock import FolderBusy, FolderLock
from diffusers_ddpm_ext.utils.input_files import JsonObject, read_json_object

MANIFEST = "manifest.json"
SECONDS_BETWEEN_ATTEMPTS = 1.0


class CacheUnavailable(Exception):
    """A cache that cannot be built. The text is the reason."""


def name_of_key(key: Mapping[str, Any]) -> str:
    """The name of a cache's folder: a hash of its key, 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def read_manifest(folder: Path, key: Mapping[str, Any]) -> JsonObject | None:
    """The manifest of a cache; None without one, or if it is damaged or that of another key."""
    with suppress(ConfigError):
        content = read_json_object(folder / MANIFEST)
        if content.object("key").content == json.loads(json.dumps(key)):
            return content
    return None


def write_manifest(folder: Path, key: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Make a cache complete.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    text = json.dumps({"key": key, **content}, indent=1) + "\n"
    write_atomically(folder / MANIFEST, lambda file: file.write(text.encode()), fsync=True)
    fsync_folder(folder)


def lock_or_busy(lock: FolderLock, folder: Path) -> bool:
    """Create the folder of a cache and lock it; whether another run has locked it.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire()
    except FolderBusy:
        return True
    return False


def lacks_space(folder: Path, needed: int) -> str | None:
    """How many bytes are needed and free, if the disk has no space for them."""
    free = shutil.disk_usage(folder).free
    return f"{needed:,} bytes, and {free:,} are free" if needed > free else None

"""The check of images that are decoded for each use: done once, and remembered while no file changes.

The record is one small JSON file in ``ddpm_ext_images/checked`` of ``--cache_dir``, named by a hash of its key: which
files (path, size, times), how they are prepared, and by which versions of the programs that decode them. It has no
pixels. An image that becomes unreadable all the same ends the run when it is used, as without the record.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.data.cache_manifest import name_of_key
from diffusers_ddpm_ext.training.data.image_scan import ImageScan, ImageSource
from diffusers_ddpm_ext.utils.files import write_text_atomically
from diffusers_ddpm_ext.utils.input_files import read_json_object

FOLDER = "checked"


def read_check(parent: Path, key: Mapping[str, Any], source: ImageSource) -> ImageScan | None:
    """The finished pass over a source with this key; None where there was none, or its record is damaged.

    Args:
        parent: the folder of all caches.
        key: of the images and their preparation, as JSON.
        source: of the images.
    """
    with suppress(ConfigError, KeyError, TypeError, ValueError):
        record = read_json_object(_file(parent, key))
        if record.object("key").content == json.loads(json.dumps(key)):
            bad = {int(row) for row in record.list("bad_rows")}
            readable = array("q", (row for row in range(len(source.names)) if row not in bad))
            scan = ImageScan.restored(source, record.object("images").content, readable)
            return scan if len(bad) == scan.num_bad else None
    return None


def write_check(parent: Path, key: Mapping[str, Any], scan: ImageScan) -> None:
    """Remember a finished pass; a folder that cannot be written remembers nothing."""
    readable = set(scan.readable)
    bad = [row for row in range(len(scan.source.names)) if row not in readable]
    images = scan.to_dict() | {"sizes": sorted(scan.sizes)}
    content = {"key": key, "images": images, "bad_rows": bad}
    with suppress(OSError):
        _file(parent, key).parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(_file(parent, key), json.dumps(content) + "\n")


def _file(parent: Path, key: Mapping[str, Any]) -> Path:
    return parent / FOLDER / f"{name_of_key(key)}.json"

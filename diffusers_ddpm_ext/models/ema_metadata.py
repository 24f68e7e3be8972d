"""Metadata of averaged weights, beside them in a pipeline's folder: ``ema.json``."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.utils.input_files import check_folder, exists, read_json_object

MAX_UPDATES = 2**53
"""Counters are integers in JSON and floats in the decay."""

EMA_METADATA_NAME = "ema.json"
EMA_METADATA_FORMAT = 1


@dataclass(frozen=True)
class EmaMetadata:
    """Metadata of averaged weights, saved in ``ema.json`` of a pipeline's folder.

    Attributes:
        decay: the limit of the decay.
        num_updates: number of updates; -1 without a warm-up of the decay, as in the original.
    """

    decay: float
    num_updates: int


def save_ema_metadata(folder: str | os.PathLike[str], metadata: EmaMetadata) -> None:
    """Write ``ema.json`` into a pipeline's folder.

    Args:
        folder: an existing one.
        metadata: of the average.
    """
    content = {"format": EMA_METADATA_FORMAT, "decay": metadata.decay, "num_updates": metadata.num_updates}
    Path(folder, EMA_METADATA_NAME).write_text(json.dumps(content) + "\n", encoding="utf-8")


def load_ema_metadata(folder: str | os.PathLike[str]) -> EmaMetadata | None:
    """Read ``ema.json`` of a pipeline's folder.

    Args:
        folder: of a pipeline.

    Returns:
        Its content; None without such a file.

    Raises:
        ValueError: the folder does not exist, or the file is damaged or of another format.
    """
    path = check_folder(folder) / EMA_METADATA_NAME
    if not exists(path):
        return None
    content = read_json_object(path)
    if content.integer("format") != EMA_METADATA_FORMAT:
        raise ConfigError(f'{content.name} must have "format": {EMA_METADATA_FORMAT}; a newer version may read it.')
    return EmaMetadata(
        content.number("decay", low=0, high=1), content.integer("num_updates", low=-1, high=MAX_UPDATES)
    )

"""What `datasets` is asked for: a Hub id, a folder, a single file, a pattern of files, or a saved data set."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError

BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset", ".jsonl": "json", ".json": "json"}
"""Name of the reader of `datasets` for each type of file."""


def import_datasets() -> Any:
    """Import `datasets`, which then logs nothing: what it cannot do, it raises, too.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise ConfigError("--dataset_name needs `datasets`: pip install diffusers-ddpm-ext[hub-datasets]") from None
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def builder_arguments(name: str) -> tuple[str, str | None]:
    """The path, and the files of `load_dataset`, for ``--dataset_name``; no files for a Hub id or a folder.

    Args:
        name: Hub id, folder, file, or pattern of local files such as ``shards/*.tar``.
    """
    path = Path(name)
    is_pattern = any(character in name for character in "*?[") and not path.exists()
    builder = BUILDERS.get(path.suffix.lower())
    if builder is not None and (is_pattern or path.is_file()):
        return builder, os.path.abspath(name)
    return name, None


def is_saved_dataset(name: str) -> bool:
    """Whether a path is a folder that `Dataset.save_to_disk` has written."""
    return any(Path(name, marker).is_file() for marker in ("state.json", "dataset_dict.json"))


def saved_split(name: str, split: str) -> Any:
    """A split of a folder that `save_to_disk` has written; a ValueError without it."""
    datasets = import_datasets()
    saved = datasets.load_from_disk(name)
    splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    if split not in splits:
        raise ValueError(f"it has only the splits {', '.join(splits)}")
    return splits[split]

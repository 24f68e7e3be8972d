"""Where images come from: a folder, a dataset opened by `datasets`, the digits of scikit-learn.

Nothing is decoded here: a source knows the names of its images, their order, and how to get at the bytes.

Folders are read here and not by `datasets`' imagefolder: that one takes a subfolder called `test` or `validation` for
a split of its own and then leaves out its images, and those beside it, without a word.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusers_ddpm_ext.errors import ConfigError

NEEDS_TRAIN = "pip install diffusers-ddpm-ext[train]"
# What Pillow opens but cannot decode by itself, or what is no picture in most folders.
NO_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


@dataclass(frozen=True)
class FolderSource:
    """The images of a folder and of the folders inside it.

    Attributes:
        option: name and value of the option, for messages.
        folder: the folder.
        names: paths inside it with forward slashes, sorted, so that no file system's order matters.
    """

    option: str
    folder: Path
    names: Sequence[str]

    def payload(self, index: int) -> Path:
        """Return the path of an image."""
        return self.folder / self.names[index]


@dataclass(frozen=True)
class RowSource:
    """The images in one column of a `datasets.Dataset`, which is not asked to decode them."""

    option: str
    rows: Sequence[dict[str, Any]]
    column: str
    names: Sequence[str]
    table: Any = None  # with all its columns

    def payload(self, index: int) -> bytes | Path | None:
        """Return the bytes of an image, or the path of its file."""
        cell = self.rows[index][self.column]
        if cell is None:
            return None
        data, path = cell["bytes"], cell["path"]
        if isinstance(data, bytes):
            return data
        return Path(str(path)) if path is not None else None


def scan_folder(option: str, folder: str) -> FolderSource:
    """Find the images of a folder: every type that Pillow reads, by extension in any case, hidden files left out.

    Args:
        option: flag that names the folder, for messages.
        folder: path of the folder.

    Raises:
        ConfigError: there is no such folder, or no image in it.
    """
    root = Path(folder).expanduser()
    told = f"{option} {folder!r}"
    if not root.exists():
        raise ConfigError(f"{told}: there is no such folder.")
    if not root.is_dir():
        raise ConfigError(f"{told} is a file: name the folder that holds the images.")
    Image.init()
    kinds = set(Image.OPEN) - NO_IMAGES
    extensions = {extension for extension, kind in Image.registered_extensions().items() if kind in kinds}
    files = list(_walk(root))
    names = sorted(name for name in files if Path(name).suffix.lower() in extensions)
    if not names:
        others = f"none of its {len(files)} files is one" if files else "it is empty"
        raise ConfigError(f"{told} holds no image ({others}): files that Pillow reads, .png, .jpg, .webp and others.")
    return FolderSource(told, root, names)


def _walk(root: Path) -> Iterator[str]:
    """Yield the files below a folder, links to folders followed once each."""
    seen = set()
    for place, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        yield from (Path(place, name).relative_to(root).as_posix() for name in files if not name.startswith("."))


def load_rows(
    name: str,
    split: str,
    config_name: str | None = None,
    image_column: str | None = None,
    cache_dir: str | None = None,
) -> RowSource:
    """Open one split of a dataset of the Hub, or of a local path (a script-free dataset, or `save_to_disk`'s folder).

    Args:
        name: Hub id or path.
        split: name of the split.
        config_name: configuration, where the dataset has several.
        image_column: column of the images; None takes the only image column.
        cache_dir: where downloads are kept.

    Raises:
        ConfigError: `datasets` is not installed, cannot open the dataset, or has no such split or column.
    """
    try:
        import datasets
    except ImportError:
        raise ConfigError("--dataset_name needs `datasets`: pip install diffusers-ddpm-ext[hub-datasets]") from None
    told = f"--dataset_name {name!r}"
    try:
        if any(Path(name, mark).is_file() for mark in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(name)
            splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
            if split not in splits:
                raise ValueError(f"it has only the splits {', '.join(splits)}")
            table = splits[split]
        else:
            table = datasets.load_dataset(name, config_name, split=split, cache_dir=cache_dir)
    except Exception as error:  # `datasets` raises whatever its readers and the network raise
        raise ConfigError(f"{told}, split {split!r}, cannot be opened: {_one_line(error)}") from error
    column = _image_column(told, table.features, datasets.Image, image_column)
    whole = table
    try:
        table = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except Exception as error:
        raise ConfigError(f"--image_column {column!r} of {told} holds no images: {_one_line(error)}") from error
    if len(table) == 0:
        raise ConfigError(f"{told}, split {split!r}, has no rows.")
    return RowSource(told, table, column, [f"row {index}" for index in range(len(table))], whole)


def _image_column(told: str, features: dict[str, object], image_type: type, wanted: str | None) -> str:
    """Return the column that was asked for, or the only one of images."""
    columns = ", ".join(features)
    if wanted is not None:
        if wanted not in features:
            raise ConfigError(f"--image_column {wanted!r}: {told} has the columns {columns}.")
        return wanted
    found = [name for name, kind in features.items() if isinstance(kind, image_type)]
    if len(found) != 1:
        number = f"{len(found)} image columns ({', '.join(found)})" if found else "no image column"
        raise ConfigError(f"{told} has {number}: choose one by --image_column; its columns are {columns}.")
    return found[0]


def digit_levels() -> Tensor:
    """Return the 1,797 handwritten digits of scikit-learn: (1797, 1, 8, 8), uint8, values 0 (paper) to 16 (ink).

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError(f"the digits come with scikit-learn: {NEEDS_TRAIN}") from None
    return torch.from_numpy(load_digits().images.astype(np.uint8)).unsqueeze(1)


def digit_labels() -> list[int]:
    """Return which digit each of scikit-learn's is."""
    from sklearn.datasets import load_digits

    return [int(label) for label in load_digits().target]


def digit_rows() -> RowSource:
    """Return the digits as image files of 256 levels, for those who want them in another size or in colour."""
    rows = []
    for levels in digit_levels():
        grey = Image.fromarray((levels[0].numpy() * (255 / 16)).round().astype(np.uint8))
        file = io.BytesIO()
        grey.save(file, "PNG")
        rows.append({"image": {"bytes": file.getvalue(), "path": None}})
    return RowSource("the digits", rows, "image", [f"row {index}" for index in range(len(rows))])


def _one_line(error: BaseException) -> str:
    """Put an error and its cause into one line."""
    lines = [str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__]
    if error.__cause__ is not None and str(error.__cause__).strip():
        lines.append(str(error.__cause__).strip().splitlines()[0])
    return ": ".join(lines)

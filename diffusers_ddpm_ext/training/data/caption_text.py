"""Captions of a picture as a cell or a text file holds them: one text, or several of which one is drawn each time."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.utils.input_files import exists, read_text

MAX_LENGTH = 20_000
"""Characters of a caption: text encoders read some hundreds."""
MAX_CAPTIONS = 1_000
MAX_FILE_BYTES = 2**20
_WHITE_SPACE = "\t\n\r"
_NO_VALUE = ("nan", "null", "none", "<na>")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE | re.ASCII)
_PYTHON_LIST = re.compile(r"\[\s*(['\"]).*\1\s*,?\s*\]", re.DOTALL)


def captions_of_cell(row: str, cell: Any) -> list[str]:
    """The captions in a cell, without white space and byte order marks around them.

    Args:
        row: the option, the column and the image, for messages.
        cell: a text, or a list of texts.

    Raises:
        ConfigError: there is none, or it is no text that a tokenizer can read.
    """
    if cell is None:
        raise ConfigError(f"{row} has no caption: its value is empty")
    if isinstance(cell, str):
        return [_caption(row, cell)]
    if not isinstance(cell, list | tuple):
        raise ConfigError(
            f"{row} has the caption {printable(str(cell), 40)} ({_kind(cell)}): it must be a text, or a list of texts"
        )
    if not 1 <= len(cell) <= MAX_CAPTIONS:
        raise ConfigError(f"{row} has a list of {len(cell):,} captions: it must have 1 to {MAX_CAPTIONS:,}")
    for number, each in enumerate(cell, 1):
        if not isinstance(each, str):
            what = "empty" if each is None else f"{printable(str(each), 40)} ({_kind(each)})"
            raise ConfigError(f"{row} has a list whose caption {number:,} is {what}: each must be a text")
    return [_caption(row, each) for each in cell]


def csv_cells(label: str, cells: Mapping[str, str]) -> dict[str, Any]:
    """The cells of a CSV file, in which every value is a text: a JSON list is a list, and a column of numbers refused.

    Args:
        label: the option and the column, for messages.
        cells: by name of the image.

    Raises:
        ConfigError: every cell is a number, or one is a list as Python prints it.
    """
    if cells and all(_NUMBER.fullmatch(cell.strip()) for cell in cells.values()):
        image, cell = next(iter(cells.items()))
        raise ConfigError(
            f"{label} holds only numbers ({printable(cell.strip(), 40)} for {printable(image)}): name the column with"
            " the captions; numbers that are captions go into metadata.jsonl, in quotes"
        )
    return {image: _list_or_text(f"{label}: {printable(image)}", cell) for image, cell in cells.items()}


def _list_or_text(row: str, cell: str) -> Any:
    if not (cell.startswith("[") and cell.endswith("]")):
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        if _PYTHON_LIST.fullmatch(cell):
            raise ConfigError(
                f"{row} has a list that is not JSON ({printable(cell, 60)}): write it with double quotes, as"
                ' ["a cat", "a pet"]'
            ) from None
        return cell  # a text in brackets


def read_caption_files(label: str, root: Path, images: Sequence[str]) -> dict[str, list[str]]:
    """Read the text files beside images: one caption in each line that is not empty.

    Args:
        label: the option and the folder, for messages.
        root: the folder.
        images: paths inside it.

    Raises:
        ConfigError: an image has no such file, or it is empty, too large or not UTF-8.
    """
    captions = {}
    for image, name in find_caption_files(label, root, images).items():
        text = read_text(root / name, "the caption file", MAX_FILE_BYTES)
        lines = [line for line in re.split(r"\r\n|\r|\n", text) if line.strip()]
        if not lines:
            raise ConfigError(f"{label}: {printable(name)} is empty: write the caption of {printable(image)} into it")
        captions[image] = lines
    return captions


def find_caption_files(label: str, root: Path, images: Sequence[str]) -> dict[str, str]:
    """The text file beside each image, by its name inside the folder; arguments as in `read_caption_files`.

    Raises:
        ConfigError: images have none; the first is named.
    """
    files, missing = {}, []
    for image in images:
        names = [str(PurePosixPath(image).with_suffix(suffix)) for suffix in (".txt", ".TXT")]
        found = next((name for name in names if exists(root / name)), None)
        if found is None:
            missing.append((image, names[0]))
        else:
            files[image] = found
    if missing:
        image, name = map(printable, missing[0])
        count = "" if len(missing) == 1 else f"; {len(missing):,} of {len(images):,} images have none"
        raise ConfigError(f"{label}: {image} has no text file {name} beside it{count}")
    return files


def _caption(row: str, text: str) -> str:
    """A text without white space around it."""
    caption = text.strip().strip("\ufeff").strip()
    if not caption:
        raise ConfigError(f"{row} has no caption: its value is empty")
    if len(caption) > MAX_LENGTH:
        raise ConfigError(f"{row} has a caption of {len(caption):,} characters: use at most {MAX_LENGTH:,}")
    if caption.lower() in _NO_VALUE:
        raise ConfigError(f"{row} has the caption {caption}, which stands for no value: write a text")
    if not caption.isprintable():  # spaces beside U+0020, joined emoji and the like are not printable, and allowed
        for character in caption:
            kind = unicodedata.category(character)
            if kind == "Cs" or (kind == "Cc" and character not in _WHITE_SPACE):
                what = "half of a surrogate pair" if kind == "Cs" else "the control character"
                raise ConfigError(f"{row} has a caption with {what} U+{ord(character):04X}: remove it")
    return caption


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    return "a number" if isinstance(value, int | float) else f"of type {type(value).__name__}"

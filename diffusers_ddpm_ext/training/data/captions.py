"""Captions of a run's images: all texts once in a table, with their tokens, and the numbers of each image's captions.

A caption travels with its image as a number. Number 0 is the empty prompt, which takes the place of a dropped caption.
Texts are kept as UTF-8 and tokens without their padding, so that a million captions take some 100 MB.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from diffusers_ddpm_ext.errors import ConfigError, as_config_error, printable
from diffusers_ddpm_ext.training.data.caption_text import captions_of_cell
from diffusers_ddpm_ext.utils import random_keys as keys

EMPTY_PROMPT = 0
TEXTS_PER_BLOCK = 1_024


class Tokenizes(Protocol):
    """What makes tokens of texts, such as a `TextEncoder`."""

    def tokenize_and_find_cut(self, prompts: Sequence[str]) -> tuple[Tensor, list[str]]:
        """Token ids of texts, (B, T), int64, each row padded to the same T; and the texts that do not fit into it."""


@dataclass(frozen=True)
class RaggedArray:
    """Rows of different lengths, one after the other in one array.

    Attributes:
        values: of all rows.
        ends: of the rows in ``values``, (n,), int64.
    """

    values: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> np.ndarray:
        values: np.ndarray = self.values[self.ends[row - 1] if row else 0 : self.ends[row]]
        return values


@dataclass(frozen=True)
class CaptionTable:
    """The different captions of a run's images, by number; number 0 is the empty prompt.

    Attributes:
        utf8: the texts, uint8.
        tokens: ids without the padding: of each row's last run of equal ids, the first; int32.
        num_tokens: length T of a row with its padding.
        fingerprint: sha256 over texts and tokens, in hexadecimal.
        warnings: about captions that are cut, or without tokens of their own.
    """

    utf8: RaggedArray
    tokens: RaggedArray
    num_tokens: int
    fingerprint: str
    warnings: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.utf8)

    def text(self, number: int) -> str:
        """The caption of a number, in [0, len)."""
        return self.utf8[number].tobytes().decode()

    def texts(self, numbers: Iterable[int]) -> list[str]:
        """The captions of numbers."""
        return [self.text(int(number)) for number in numbers]

    def input_ids(self, numbers: Tensor | Sequence[int]) -> Tensor:
        """Token ids of captions as the tokenizer returned them: (B, T), int64, on the CPU.

        Args:
            numbers: (B,), each in [0, len).
        """
        wanted = numbers.tolist() if isinstance(numbers, Tensor) else [int(number) for number in numbers]
        result = np.empty((len(wanted), self.num_tokens), np.int64)
        for row, number in zip(result, wanted, strict=True):
            own = self.tokens[number]
            row[: len(own)] = own
            row[len(own) :] = own[-1]
        return torch.from_numpy(result)


@dataclass(frozen=True)
class CaptionColumn:
    """The captions of images, by their numbers in the run's `CaptionTable`.

    Attributes:
        numbers: of each image's captions, one or more, int32.
        fingerprint: sha256 over the captions of all images, in their order, in hexadecimal.
    """

    numbers: RaggedArray
    fingerprint: str

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def most_per_image(self) -> int:
        """The largest number of captions of an image."""
        return int(np.diff(self.numbers.ends, prepend=0).max(initial=0))

    def draw(self, rows: Tensor, indices: Tensor, seed: int, epochs: Sequence[int] | None) -> Tensor:
        """The number of a caption of each image: (b,), int64, on the CPU.

        Args:
            rows: of the images among all loaded ones, (b,).
            indices: of the images in their set, (b,).
            seed: of the run.
            epochs: of each image, (b,): its caption depends on seed, epoch and index alone. None takes the first.
        """
        drawn = torch.empty(len(rows), dtype=torch.int64)
        for position, (row, index) in enumerate(zip(rows.tolist(), indices.tolist(), strict=True)):
            numbers, place = self.numbers[row], 0
            if epochs is not None and len(numbers) > 1:
                place = keys.key(keys.CAPTION, seed, epochs[position], index) % len(numbers)
            drawn[position] = int(numbers[place])
        return drawn


class CaptionReader:
    """Reads the captions of a run's images, those to train and those to validate on, into one table."""

    def __init__(self, tokenizer: Tokenizes) -> None:
        self._tokenizer = tokenizer
        self._numbers: dict[str, int] = {"": EMPTY_PROMPT}

    def read(self, label: str, cells: Mapping[str, Any], images: Sequence[str]) -> CaptionColumn:
        """Read the captions of images.

        Args:
            label: the option and the column, for messages.
            cells: by name of the image: a text, or a list of texts.
            images: names of the images, in the order of the result.

        Raises:
            ConfigError: a cell holds no caption; the image is named.
        """
        numbers, ends, digest = array("i"), array("q"), hashlib.sha256()
        for image in images:
            captions = captions_of_cell(f"{label}: {printable(image)}", cells[image])
            digest.update(b"".join(caption.encode() + b"\0" for caption in captions) + b"\0")
            numbers.extend(self._numbers.setdefault(caption, len(self._numbers)) for caption in captions)
            ends.append(len(numbers))
        return CaptionColumn(RaggedArray(np.array(numbers), np.array(ends)), digest.hexdigest())

    def table(self, progress: bool = False) -> CaptionTable:
        """The table of all captions that were read, each tokenized once.

        Args:
            progress: show a progress bar if it takes longer than a second.

        Raises:
            ConfigError: the tokenizer fails on a caption, or its rows differ in length.
        """
        texts = list(self._numbers)
        digest = hashlib.sha256()
        tokens: list[np.ndarray] = []
        lengths: list[np.ndarray] = []
        num_tokens, unknown, cut = 0, array("q"), list[str]()
        blocks = range(0, len(texts), TEXTS_PER_BLOCK)
        for start in tqdm(blocks, "tokenize captions", disable=not progress, delay=1, leave=False):
            with as_config_error("--tokenizer"):
                tokenized = self._tokenizer.tokenize_and_find_cut(texts[start : start + TEXTS_PER_BLOCK])
            ids = tokenized[0].numpy()
            cut += tokenized[1]
            if start and ids.shape[1] != num_tokens:
                raise ConfigError(
                    f"--tokenizer makes rows of {num_tokens} and of {ids.shape[1]} tokens: it must pad all alike"
                )
            if not start:
                empty, num_tokens = ids[EMPTY_PROMPT], ids.shape[1]
            unknown.extend((start + np.flatnonzero((ids == empty).all(1))).tolist())
            digest.update(np.ascontiguousarray(ids, dtype="<i8").tobytes())
            own = _lengths_without_padding(ids)
            lengths.append(own)
            tokens.append(ids[np.arange(num_tokens) < own[:, None]].astype(np.int32))
        encoded = [text.encode() for text in texts]
        utf8 = RaggedArray(np.frombuffer(b"".join(encoded), np.uint8), np.cumsum([len(each) for each in encoded]))
        digest.update(utf8.values.tobytes())
        ragged = RaggedArray(np.concatenate(tokens), np.cumsum(np.concatenate(lengths)))
        warnings = _warnings(
            [texts[number] for number in unknown[1:]], cut, num_tokens
        )  # 0 is the empty prompt itself
        return CaptionTable(utf8, ragged, num_tokens, digest.hexdigest(), warnings)


def _warnings(unknown: Sequence[str], cut: Sequence[str], num_tokens: int) -> list[str]:
    """Warn of captions whose tokens are those of the empty prompt, and of captions that are cut."""
    warnings = []
    if unknown:
        warnings.append(f"--tokenizer knows nothing of {_first_of(unknown)}: the tokens are those of the empty prompt")
    if cut:
        warnings.append(f"captions are cut after {num_tokens} tokens: {_first_of(cut)}")
    return warnings


def _first_of(captions: Sequence[str]) -> str:
    """The first of some captions, and the number of others."""
    more = f" and {len(captions) - 1:,} more" if len(captions) > 1 else ""
    return printable(repr(captions[0]), 60) + more


def _lengths_without_padding(ids: np.ndarray) -> np.ndarray:
    """Up to the first of the equal ids that each row of (n, T) ends in: (n,), int64, at least 1."""
    differs = ids[:, :-1] != ids[:, 1:]
    lengths: np.ndarray = (differs * np.arange(1, ids.shape[1])).max(1, initial=0) + 1
    return lengths

"""Prompts, token ids and encoders as conditions of `ddpm-ext sample`, checked before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_ddpm_ext.cli.pipeline_facts import PipelineFacts
from diffusers_ddpm_ext.cli.prompt_files import PromptRow, read_prompts, with_negative
from diffusers_ddpm_ext.cli.sample_options import SampleOptions
from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.utils.array_files import read_array
from diffusers_ddpm_ext.utils.text_encoder_config import TextEncoderConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray

TEXT_SOURCES = ("prompt", "prompts", "input_ids")
"""Options that the text encoder is for."""
ENCODERS = ("text_encoder", "tokenizer")


@dataclass(frozen=True)
class Texts:
    """Texts that are indexed by a list, as tensors are."""

    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, indices: Sequence[int]) -> list[str]:
        return [self.texts[index] for index in indices]


@dataclass(frozen=True)
class TextConditions:
    """What the images show, used in turn over them.

    Attributes:
        rows: prompts with their negative prompts and seeds; empty without prompts.
        ids: input_ids and negative_input_ids, (N, tokens), int64, by name.
    """

    rows: tuple[PromptRow, ...] = ()
    ids: Mapping[str, NDArray[Any]] | None = None

    def seed_of(self, index: int, seed: int) -> tuple[int, int]:
        """Key of an image's noise: ``seed`` and its index, or its prompt's own seed and how often that was drawn."""
        own = self.rows[index % len(self.rows)].seed if self.rows else None
        return (seed, index) if own is None else (own, index // len(self.rows))

    def arguments(self, guided: bool) -> dict[str, Any]:
        """Arguments of the pipeline's call by name, one entry for each prompt or row of ids.

        Args:
            guided: whether there is guidance; without it no prompt is negative.
        """
        import torch

        arguments: dict[str, Any] = {name: torch.from_numpy(array) for name, array in (self.ids or {}).items()}
        if self.rows:
            arguments["prompt"] = Texts(tuple(row.prompt for row in self.rows))
            if guided and any(row.negative_prompt for row in self.rows):
                arguments["negative_prompt"] = Texts(tuple(row.negative_prompt or "" for row in self.rows))
        return arguments

    def settings(self) -> dict[str, Any]:
        """What `samples.json` records of the prompts; nothing of what none of them has."""
        columns = {"prompt": "prompt", "negative_prompt": "negative_prompt", "prompt_seed": "seed"}
        values = {name: [getattr(row, key) for row in self.rows] for name, key in columns.items()}
        return {name: column for name, column in values.items() if any(value is not None for value in column)}


def check_text(options: SampleOptions, facts: PipelineFacts) -> TextConditions:
    """Check the options about prompts against a pipeline's configuration, and read the prompts or token ids.

    Raises:
        ConfigError: an option has no effect, contradicts another or is missing, or a file cannot be read or does not
            fit the model.
    """
    given = token_options(options, facts)
    if len(given) > 1:
        raise ConfigError(f"--{given[0]} and --{given[1]} both say what the images show: give one of them")
    source = given[0] if given else ""
    _check_encoders(options, facts, source)
    if options.guidance_scale == 1:
        for name in ("negative_prompt", "negative_input_ids"):
            _refuse(options, name, "at --guidance_scale 1")
    if source in ("prompt", "prompts"):
        _refuse(options, "negative_input_ids", f"with --{source}, which takes --negative_prompt")
        return TextConditions(_read_rows(options))
    _refuse(options, "negative_prompt", "without --prompt or --prompts")
    if source in ("input_ids", "encoder_hidden_states"):
        return TextConditions((), _read_ids(options, facts))
    _refuse(options, "negative_input_ids", "without --input_ids or --encoder_hidden_states")
    return TextConditions()


def token_options(options: SampleOptions, facts: PipelineFacts) -> list[str]:
    """Names of the options that were given and determine the tokens of cross attention; of pictures, where they do."""
    names = (*TEXT_SOURCES, "encoder_hidden_states", *(() if facts.image_is_label else ("image",)))
    return [name for name in names if getattr(options, name) is not None]


def _check_encoders(options: SampleOptions, facts: PipelineFacts, source: str) -> None:
    """Refuse encoders without effect, and prompts or ids without what encodes them."""
    if source not in TEXT_SOURCES:
        for name in ENCODERS:
            _refuse(options, name, "without --prompt, --prompts or --input_ids")
        return
    encoder, takes_ids = facts.text_encoder, source == "input_ids"
    if encoder is None and options.text_encoder is None:
        raise ConfigError(
            f"--{source}: {facts.source} has no text encoder: give --text_encoder FOLDER_OR_ID, or embeddings as "
            "--encoder_hidden_states FILE.npy"
        )
    if takes_ids:
        _refuse(options, "tokenizer", "with --input_ids")
    elif encoder is not None and not encoder.has_tokenizer and options.text_encoder is None and not options.tokenizer:
        raise ConfigError(
            f"--{source}: {facts.source} has no tokenizer: give --tokenizer FOLDER_OR_ID, or token ids as --input_ids "
            "FILE.npy"
        )


def _refuse(options: SampleOptions, name: str, why: str) -> None:
    if getattr(options, name) is not None:
        raise ConfigError(f"--{name} has no effect {why}: leave it out")


def _read_rows(options: SampleOptions) -> tuple[PromptRow, ...]:
    """The prompts, with their negative ones; these need guidance."""
    if options.prompts is None:
        return with_negative(tuple(map(PromptRow, options.prompt or ())), options.negative_prompt)
    rows = read_prompts(options.prompts)
    if options.guidance_scale == 1 and any(row.negative_prompt for row in rows):
        raise ConfigError(
            f"--prompts {printable(str(options.prompts), 300)} has negative prompts, which have no effect at "
            "--guidance_scale 1: give a scale, or leave them out"
        )
    return with_negative(rows, options.negative_prompt)


def _read_ids(options: SampleOptions, facts: PipelineFacts) -> dict[str, NDArray[Any]]:
    """Token ids of the images, and those that guidance leads away from."""
    encoder = facts.text_encoder
    known = None if options.text_encoder is not None else encoder
    arrays = {
        name: read_ids(f"--{name}", path, known)
        for name in ("input_ids", "negative_input_ids")
        if (path := getattr(options, name)) is not None
    }
    has_encoder = encoder is not None or options.text_encoder is not None
    has_tokenizer = encoder is not None and encoder.has_tokenizer
    if options.guidance_scale != 1 and has_encoder and not has_tokenizer and "negative_input_ids" not in arrays:
        raise ConfigError(
            f"--guidance_scale {options.guidance_scale:g} needs --negative_input_ids FILE.npy, the ids of the empty "
            f"prompt: {facts.source} has no tokenizer that could make them"
        )
    if len(arrays) == 2 and len(arrays["negative_input_ids"]) not in (1, len(arrays["input_ids"])):
        negative, positive = len(arrays["negative_input_ids"]), len(arrays["input_ids"])
        raise ConfigError(f"--negative_input_ids has {negative} rows and --input_ids {positive}: give one, or as many")
    return arrays


def read_ids(option: str, path: Path, encoder: TextEncoderConfig | None) -> NDArray[Any]:
    """An array of token ids, one row per prompt, as int64.

    Args:
        option: for messages.
        path: a .npy file.
        encoder: whose table has the tokens; None for one that is not open yet, which checks them itself.

    Raises:
        ConfigError: it cannot be read, is no table of integers, or has ids that the encoder does not know; the message
            names the row.
    """
    import numpy as np

    array = read_array(path, option)
    label = f"{option} {printable(str(path), 300)}"
    if array.dtype.kind not in "iu":
        raise ConfigError(f"{label} holds values of type {array.dtype}; token ids are integers")
    if array.ndim != 2 or 0 in array.shape:
        raise ConfigError(f"{label} has shape {array.shape}; token ids are (N, tokens), with N and tokens at least 1")
    if encoder is not None:
        if encoder.positions is not None and array.shape[1] > encoder.positions:
            raise ConfigError(f"{label} has {array.shape[1]} tokens per row; the text encoder has {encoder.positions}")
        wrong = ((array < 0) | (array >= encoder.vocab_size)).any(axis=1)
        if wrong.any():
            row = int(np.argmax(wrong))
            values = array[row]
            worst = values[(values < 0) | (values >= encoder.vocab_size)][0]
            raise ConfigError(
                f"{label}: row {row} has the token {worst}; the text encoder has 0 to {encoder.vocab_size - 1}"
            )
    if array.dtype == np.uint64 and bool((array > np.iinfo(np.int64).max).any()):
        raise ConfigError(f"{label} has numbers over {np.iinfo(np.int64).max}, which are no tokens")
    ids: NDArray[Any] = array.astype(np.int64)
    return ids

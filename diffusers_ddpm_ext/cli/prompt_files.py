"""Prompts of `ddpm-ext sample`: those of the command line, or of a file with one a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.utils.input_files import JsonObject, file_name, json_object, parse_json, read_text

OPTION = "--prompts"
KEYS = ("prompt", "negative_prompt", "seed")
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class PromptRow:
    """A prompt, what to keep away from, and a seed of its own; None where it has none."""

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None


def read_prompts(path: Path) -> tuple[PromptRow, ...]:
    """The prompts of a file, in its order.

    In a ``.txt`` file, or one without an ending, every line is a prompt, without the spaces around it. In a ``.jsonl``
    file every line is an object with ``prompt`` and, where wanted, ``negative_prompt`` and ``seed``. Blank lines are
    skipped. There are no comments: a line that begins with ``#`` is a prompt too.

    Raises:
        ConfigError: it cannot be read, has no prompt, or another ending; or a line is no such object.
    """
    name, kind = file_name(path, OPTION), path.suffix.lower()
    if kind not in ("", ".txt", ".jsonl"):
        raise ConfigError(f"{name}: a file of prompts ends in .txt (one a line) or in .jsonl (one object a line)")
    lines = enumerate(read_text(path, OPTION).split("\n"), 1)
    texts = [(number, line.strip()) for number, line in lines if line.strip()]
    if not texts:
        raise ConfigError(f"{name} has no prompt: write one a line")
    if kind == ".jsonl":
        return tuple(_read_row(text, f"{name}, line {number}") for number, text in texts)
    if all(text.startswith("{") and text.endswith("}") for _, text in texts):
        raise ConfigError(f"{name} has a JSON object in each line: rename it to .jsonl, or write the prompts alone")
    return tuple(PromptRow(text) for _, text in texts)


def _read_row(text: str, name: str) -> PromptRow:
    row: JsonObject = json_object(parse_json(text, name), name)
    for key in row.content:
        if key not in KEYS:
            near = get_close_matches(key[:60], KEYS, n=1)
            way = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(KEYS)}"
            raise ConfigError(f"{name} has a key {printable(key, 60)!r}: {way}")
    negative, seed = (row.content.get(key) for key in ("negative_prompt", "seed"))
    return PromptRow(
        _text(row, "prompt"),
        None if negative is None else _text(row, "negative_prompt"),
        None if seed is None else row.integer("seed", 0, MAX_SEED),
    )


def _text(row: JsonObject, key: str) -> str:
    """A text of a row, which may be empty."""
    value = row.content.get(key)
    if not isinstance(value, str):
        state = "is missing" if value is None else f"is {printable(repr(value), 60)}"
        raise ConfigError(f"{row.name}: {key} {state}; it must be a text")
    return value


def with_negative(rows: tuple[PromptRow, ...], negative_prompts: Sequence[str] | None) -> tuple[PromptRow, ...]:
    """Rows with the negative prompts of ``--negative_prompt`` where they have none of their own.

    Raises:
        ConfigError: there is neither one negative prompt nor one for each row.
    """
    if negative_prompts is None:
        return rows
    if len(negative_prompts) not in (1, len(rows)):
        raise ConfigError(
            f"--negative_prompt has {len(negative_prompts)} texts for {len(rows)} prompt{'s' * (len(rows) > 1)}: give "
            "one for all, or one for each prompt, each in quotes"
        )
    texts = list(negative_prompts) * (len(rows) if len(negative_prompts) == 1 else 1)
    return tuple(
        row if row.negative_prompt is not None else PromptRow(row.prompt, text, row.seed)
        for row, text in zip(rows, texts, strict=True)
    )

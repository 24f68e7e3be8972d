"""Tokenizers of Transformers: checks, and prompts as token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusers_ddpm_ext.utils.checks import describe

MAX_CHARACTERS = 100_000
"""Of one prompt: tokenizing takes time and memory, and no encoder sees more than some hundred tokens of it."""
PROBE = ("", "A cat, 12 Dogs; Crème brûlée!", "don't  <|x|> \u732b \U0001f600")
"""Texts whose ids tell tokenizers of one vocabulary apart: case, accents, spaces, special tokens, padding."""


def check_tokenizer(tokenizer: Any, vocab_size: int) -> None:
    """Raise ValueError unless it is a tokenizer of Transformers that can pad and has ids below ``vocab_size``."""
    if not all(hasattr(tokenizer, name) for name in ("get_vocab", "pad_token_id", "model_max_length")):
        shown = f"the class {tokenizer.__name__}" if isinstance(tokenizer, type) else describe(tokenizer)
        raise ValueError(f"tokenizer is {shown}; pass a tokenizer of Transformers, e.g. a CLIPTokenizer.")
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"tokenizer, a {type(tokenizer).__name__}, has no padding token, and prompts are padded to one length: "
            "set tokenizer.pad_token, e.g. to its end-of-text token."
        )
    length = tokenizer.model_max_length
    if isinstance(length, bool) or not isinstance(length, int | float) or not length >= 1:
        raise ValueError(
            f"tokenizer.model_max_length is {describe(length)}; it must be a number of tokens, 1 or more."
        )
    vocabulary = tokenizer.get_vocab()
    highest = max(vocabulary, key=vocabulary.get, default=None)
    if highest is None:
        raise ValueError("tokenizer has no tokens.")
    if vocabulary[highest] >= vocab_size:
        raise ValueError(
            f"tokenizer has the token {describe(highest)} with the id {vocabulary[highest]}, but the text encoder has "
            f"the tokens 0..{vocab_size - 1}: they are of different models."
        )


def checked_prompts(prompts: Any, name: str = "prompt") -> list[str]:
    """Prompts as a list of texts.

    Args:
        prompts: a text, or a sequence of at least one.
        name: of the argument, for messages.

    Raises:
        ValueError: it is something else, or a text is too long or not Unicode.
    """
    texts: Any = [prompts] if isinstance(prompts, str) else prompts
    texts = texts.tolist() if type(texts).__module__ == "numpy" else texts
    if not isinstance(texts, Sequence) or isinstance(texts, bytes):
        raise ValueError(f"{name} is {describe(prompts)}; it must be a text, or a list of texts with one per image.")
    if not texts:
        raise ValueError(f'{name} is an empty list; the empty prompt is "".')
    for i, text in enumerate(texts):
        where = name if isinstance(prompts, str) else f"{name} {i}"
        if not isinstance(text, str):
            raise ValueError(f"{where} is {describe(text)}; it must be a text.")
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"{where} has {len(text):,} characters; at most {MAX_CHARACTERS:,} are allowed.")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where} is {describe(text)}, which is not Unicode text.") from None
    return list(texts)


def tokenize(tokenizer: Any, prompts: Sequence[str], length: int) -> tuple[Tensor, list[str]]:
    """Token ids, and the prompts that are cut.

    Args:
        tokenizer: that can pad.
        prompts: from `checked_prompts`.
        length: tokens per prompt.

    Returns:
        Ids (B, length), int64, and the prompts that are longer.
    """
    encoded = tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_attention_mask=True
    )
    full = [prompt for prompt, mask in zip(prompts, encoded.attention_mask, strict=True) if all(mask)]
    whole = tokenizer(full, truncation=False, padding=False, verbose=False).input_ids if full else []
    cut = [prompt for prompt, row in zip(full, whole, strict=True) if len(row) > length]
    return torch.tensor(encoded.input_ids, dtype=torch.int64), cut


def tokenizer_facts(tokenizer: Any, length: int) -> str:
    """What a tokenizer does, as a text: its vocabulary, its length, and the ids of texts that tell settings apart."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    ids = tokenize(tokenizer, PROBE, length)[0].tolist()
    return hashlib.sha256(f"{vocabulary}\n{length}\n{ids}".encode()).hexdigest()

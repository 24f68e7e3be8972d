"""A text encoder of random weights, and a tokenizer whose vocabulary is made from captions; both without a network."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_ddpm_ext.models.text_encoder_saving import save_encoder

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 10
"""Tokens of a prompt, with start and end."""
VOCABULARY = 320
"""At most; half of it are single letters."""


def write_text_model(folder: Path, captions: Iterable[str], width: int = 64, seed: int = 0) -> None:
    """Write a CLIPTextModel of two layers and its CLIPTokenizer into one folder, for ``--text_encoder``.

    Args:
        folder: to write to.
        captions: what the vocabulary is made from, by byte-pair encoding.
        width: of the tokens.
        seed: of the weights.
    """
    tokenizer = make_tokenizer(captions)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=LENGTH, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(seed)
    save_encoder(CLIPTextModel(config).eval(), folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer(captions: Iterable[str]) -> CLIPTokenizer:
    """A CLIPTokenizer whose merges are learned from captions: their words become one token each, others several."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    learned = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learned.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=2 * VOCABULARY, end_of_word_suffix="</w>", show_progress=False)
    learned.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in read_merges(learned)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def read_merges(tokenizer: Tokenizer) -> list[list[str]]:
    """The merges of a trained byte-pair encoding, in their order."""
    merges: list[list[str]] = json.loads(tokenizer.to_str())["model"]["merges"]
    return merges

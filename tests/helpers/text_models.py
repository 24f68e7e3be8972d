"""Tiny text encoders of random weights, and a tokenizer of CLIP's kind for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

BYTES = [*"!\"#$%&'()*+,-./0123456789:;<=>?@abcdefghijklmnopqrstuvwxyz[\\]^_`{|}~"]
LENGTH = 8
"""Tokens of a prompt."""


def tiny_tokenizer(length: int = LENGTH) -> Any:
    """A CLIPTokenizer of single letters and the words ``red``, ``green``, ``blue``, ``cat`` and ``dog``."""
    from transformers import CLIPTokenizer

    words = {"red": "re d</w>", "green": "gre en</w>", "blue": "bl ue</w>", "cat": "ca t</w>", "dog": "do g</w>"}
    merges = ["r e", "g re", "e n</w>", "b l", "u e</w>", "c a", "d o", *words.values()]
    tokens = [*BYTES, *(f"{letter}</w>" for letter in BYTES)]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[tuple(merge.split()) for merge in merges], model_max_length=length)


def tiny_text_encoder(kind: str = "clip", width: int = 16, length: int = LENGTH, seed: int = 0) -> Any:
    """A text encoder of random weights for `tiny_tokenizer`: ``clip``, ``projection``, ``bert`` or ``t5``."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    vocabulary = len(tiny_tokenizer())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "bert":
            from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

            config = LDMBertConfig(
                vocab_size=vocabulary, max_position_embeddings=length, encoder_layers=1, encoder_ffn_dim=2 * width,
                encoder_attention_heads=2, head_dim=width // 2, d_model=width, dropout=0.0,
            )  # fmt: skip
            encoder: Any = LDMBertModel(config)
        elif kind == "t5":
            encoder = T5EncoderModel(
                T5Config(
                    vocab_size=vocabulary,
                    d_model=width,
                    d_kv=width // 2,
                    d_ff=2 * width,
                    num_layers=1,
                    num_heads=2,
                    dropout_rate=0.0,
                )
            )
        else:
            config = CLIPTextConfig(
                vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=length, projection_dim=width,
                bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1,
            )  # fmt: skip
            encoder = (CLIPTextModelWithProjection if kind == "projection" else CLIPTextModel)(config)
    return encoder.eval()


def save_text_model(folder: Path, kind: str = "clip", **options: Any) -> Path:
    """Save a tiny encoder with its tokenizer into one folder; return it."""
    from diffusers_ddpm_ext.models.text_encoder_saving import save_encoder

    save_encoder(tiny_text_encoder(kind, **options), folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder

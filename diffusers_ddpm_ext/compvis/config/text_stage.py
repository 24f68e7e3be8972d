"""Text encoders of CompVis' configurations, as options of a run that trains with captions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Class -> default of its argument ``version``, the Hub id of the encoder and its tokenizer.
RELEASED = {"FrozenCLIPEmbedder": "openai/clip-vit-large-patch14", "FrozenT5Embedder": "google/t5-v1_1-large"}
BERT_TOKENIZER = "bert-base-uncased"
BERT_VOCABULARY, BERT_POSITIONS = 30_522, 77
BERT_HEADS, BERT_HEAD_WIDTH, BERT_FEED_FORWARD = 8, 64, 4  # of BERTEmbedder, whatever the width


@dataclass(frozen=True)
class TextStage:
    """A conditioning stage that encodes prompts.

    Attributes:
        source: Hub id or folder of encoder and tokenizer; None where the configuration names none.
        is_frozen: whether its class freezes it, whatever ``cond_stage_trainable`` is.
        new: configuration of the encoder to be trained from random weights; None where it starts from others.
        tokenizer: of a new one.
    """

    source: str | None = None
    is_frozen: bool = False
    new: Mapping[str, Any] | None = None
    tokenizer: str | None = None


def read_text_stage(section: Any) -> TextStage | None:
    """The text encoder of a conditioning stage; None if that takes no prompts.

    Args:
        section: ``target`` and ``params``, as in the file.
    """
    name = str(section.get("target")).rpartition(".")[2] if isinstance(section, Mapping) else ""
    params = section.get("params") if isinstance(section, Mapping) else None
    params = params if isinstance(params, Mapping) else {}
    if name in RELEASED:
        version = params.get("version", RELEASED[name])
        return TextStage(version if isinstance(version, str) else None, bool(params.get("freeze", True)))
    if name == "FrozenOpenCLIPEmbedder":
        return TextStage(None, bool(params.get("freeze", True)))
    if name != "BERTEmbedder" or not params.get("use_tokenizer", True):
        return None
    width, layers = params.get("n_embed"), params.get("n_layer")
    if type(width) is not int or type(layers) is not int:
        return TextStage()
    new = {
        "_class_name": "LDMBertModel",
        "vocab_size": params.get("vocab_size", BERT_VOCABULARY),
        "max_position_embeddings": params.get("max_seq_len", BERT_POSITIONS),
        "d_model": width,
        "encoder_layers": layers,
        "encoder_ffn_dim": BERT_FEED_FORWARD * width,
        "encoder_attention_heads": BERT_HEADS,
        "head_dim": BERT_HEAD_WIDTH,
        "dropout": 0.0,
    }
    return TextStage(None, False, new, BERT_TOKENIZER)

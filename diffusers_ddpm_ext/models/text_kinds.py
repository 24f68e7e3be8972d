"""Classes of text encoders, and what their configurations say: width, positions, vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from diffusers_ddpm_ext.utils.wrappers import network_class, unwrap

ENCODER_SLOTS = ("text_encoder", "bert")
"""Names of a text encoder in a pipeline; the second is that of `LDMTextToImagePipeline`."""
UNBOUNDED_LENGTH = 512
"""Tokens of an encoder without positions, where no tokenizer says how many it takes: T5 was trained with these."""


@dataclass(frozen=True)
class TextKind:
    """A family of encoders.

    Attributes:
        name: short, for code that differs between them.
        library: that has the classes.
        classes: their names.
        model_types: of ``config.json``; the first is written by the class itself.
        width: key of the width of the encoder's output.
        positions: key of its number of positions; None for relative ones.
        architecture: further keys on which the output depends.
        others: first parts of the names of tensors that whole models have besides the encoder.
    """

    name: str
    library: str
    classes: tuple[str, ...]
    model_types: tuple[str, ...]
    width: str
    positions: str | None
    architecture: tuple[str, ...]
    others: tuple[str, ...] = ()


KINDS = (
    TextKind(
        "clip",
        "transformers",
        ("CLIPTextModel", "CLIPTextModelWithProjection"),
        ("clip_text_model", "clip"),
        "hidden_size",
        "max_position_embeddings",
        ("intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps"),
        ("vision_model", "visual_projection", "text_projection", "logit_scale"),
    ),
    TextKind(
        "bert",
        "diffusers",
        ("LDMBertModel",),
        ("ldmbert",),
        "d_model",
        "max_position_embeddings",
        (
            *("encoder_layers", "encoder_ffn_dim", "encoder_attention_heads", "head_dim", "activation_function"),
            "scale_embedding",
        ),
    ),
    TextKind(
        "t5",
        "transformers",
        ("T5EncoderModel", "UMT5EncoderModel", "MT5EncoderModel"),
        ("t5", "umt5", "mt5"),
        "d_model",
        None,
        (
            *("d_kv", "d_ff", "num_layers", "num_heads", "feed_forward_proj", "layer_norm_epsilon"),
            *("relative_attention_num_buckets", "relative_attention_max_distance"),
        ),
        ("decoder", "lm_head"),
    ),
)
CLASS_NAMES = ", ".join(name for kind in KINDS for name in kind.classes)
VISION_KIND = TextKind(
    "clip_vision",
    "transformers",
    ("CLIPVisionModelWithProjection", "CLIPVisionModel"),
    ("clip_vision_model", "clip"),
    "hidden_size",
    None,
    (),
    ("text_model", "visual_projection", "text_projection", "logit_scale"),
)
"""Encoders of pictures, which are loaded in the same way."""


def kind_of(encoder: nn.Module) -> TextKind:
    """The family of an encoder, with or without wrappers.

    Raises:
        ValueError: it is of no supported class.
    """
    name = network_class(encoder).__name__ if isinstance(encoder, nn.Module) else type(encoder).__name__
    kind = kind_named(name)
    if kind is None or not isinstance(encoder, nn.Module):
        way = (
            "the encoder comes first: TextEncoder(encoder, tokenizer)"
            if "Tokenizer" in name
            else f"pass a {CLASS_NAMES}"
        )
        raise ValueError(f"text_encoder is a {name}; {way}.")
    return kind


def kind_named(class_name: str) -> TextKind | None:
    """The family of a class; None if it is not supported."""
    return next((kind for kind in KINDS if class_name in kind.classes), None)


def encoder_config(encoder: nn.Module) -> Any:
    """The configuration of an encoder, which the type ``nn.Module`` lacks."""
    network: Any = unwrap(encoder)
    return network.config


def architecture(encoder: nn.Module) -> Mapping[str, Any]:
    """What the output of an encoder depends on besides its weights, by the keys of its configuration."""
    kind, config = kind_of(encoder), encoder_config(encoder)
    keys = ("vocab_size", kind.width, *([] if kind.positions is None else [kind.positions]), *kind.architecture)
    return {key: getattr(config, key) for key in keys}

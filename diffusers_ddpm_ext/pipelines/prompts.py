"""Prompts of a pipeline call: texts, token ids or embeddings, of which one gives the tokens of cross attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_ddpm_ext.models.text_encoder import TextEncoder
from diffusers_ddpm_ext.models.tokenizers import checked_prompts
from diffusers_ddpm_ext.utils.checks import describe

NEEDS_ENCODER = (
    "this pipeline has no text encoder: pass prompt_embeds (B, tokens, width), or load the model with text_encoder= "
    "and tokenizer=."
)


@dataclass(frozen=True)
class Prompts:
    """What a call says of the tokens of cross attention; at most one is not None.

    Attributes:
        prompt: a text, or one per image.
        input_ids: (B, T), integer.
        prompt_embeds: (B, T, width); a list is concatenated along the tokens.
        encoder_hidden_states: the same under another name.
        prefix: of the arguments' names: "negative_", or none.
    """

    prompt: str | Sequence[str] | None = None
    input_ids: Tensor | Sequence[Sequence[int]] | None = None
    prompt_embeds: Tensor | Sequence[Tensor] | None = None
    encoder_hidden_states: Tensor | Sequence[Tensor] | None = None
    prefix: str = ""

    @property
    def name(self) -> str | None:
        """The one that is given, without prefix.

        Raises:
            ValueError: two are.
        """
        names = ("prompt", "input_ids", "prompt_embeds", "encoder_hidden_states")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"{self.prefix}{given[0]} and {self.prefix}{given[1]} are both given; both are the tokens of cross "
                "attention: give one."
            )
        return given[0] if given else None

    def tokens(self, stage: TextEncoder | None, takes_tokens: bool) -> Any:
        """The tokens of cross attention as the caller gave them, or as the text encoder makes them.

        Args:
            stage: of the pipeline.
            takes_tokens: whether the network has cross attention.

        Returns:
            (B, T, width), or what was passed as embeddings; None if nothing was given.

        Raises:
            ValueError: two are given, there is no text encoder, or it cannot encode them.
        """
        if self.name is None:
            return None
        name, value = f"{self.prefix}{self.name}", getattr(self, self.name)
        if self.name in ("prompt_embeds", "encoder_hidden_states"):
            return value
        if stage is None:
            reason = NEEDS_ENCODER if takes_tokens else "this model has no cross attention, and takes no text."
            raise ValueError(f"{name} is given, but {reason}")
        if self.name == "prompt":
            return encode_unique(stage, checked_prompts(value, name))
        return stage.encode(stage.checked_ids(name, value))


def encode_unique(stage: TextEncoder, prompts: Sequence[str]) -> Tensor:
    """`TextEncoder.encode_prompts`, with every text encoded once."""
    texts = list(dict.fromkeys(prompts))
    rows = {text: row for row, text in enumerate(texts)}
    return stage.encode_prompts(texts)[torch.tensor([rows[text] for text in prompts])]


def empty_prompt(stage: TextEncoder) -> Tensor:
    """The tokens of the empty prompt, against which there is guidance: (1, T, width).

    Raises:
        ValueError: there is no tokenizer, and the ids of the empty prompt are not known.
    """
    if stage.tokenizer is None:
        raise ValueError(
            "guidance_scale needs negative_input_ids or negative_prompt_embeds: without a tokenizer the tokens of the "
            "empty prompt are not known."
        )
    return stage.encode_prompts([""])


def split_first_argument(batch_size: Any, prompt: Any, has_encoder: bool) -> tuple[Any, Any]:
    """Batch size and prompt of a call whose first argument is one of them.

    Args:
        batch_size: as passed, the first argument.
        prompt: as passed by name.
        has_encoder: whether the pipeline takes prompts; otherwise a text is left to the check of the batch size.

    Raises:
        ValueError: both are prompts.
    """
    is_list = isinstance(batch_size, list | tuple) and all(isinstance(text, str) for text in batch_size)
    if not has_encoder or not (is_list or isinstance(batch_size, str)):
        return batch_size, prompt
    if prompt is not None:
        raise ValueError(f"The first argument is {describe(batch_size)}, and prompt is given too: give one of them.")
    return 1, batch_size


def checked_images_per_prompt(value: Any, has_prompts: bool) -> int:
    """The number of images of each prompt.

    Raises:
        ValueError: it is not an integer of at least 1, or there are no prompts.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"num_images_per_prompt is {describe(value)}; it must be an integer, 1 or more.")
    if value > 1 and not has_prompts:
        raise ValueError(f"num_images_per_prompt is {value}, but there is no prompt: use batch_size.")
    return value

"""Text encoders: prompts as tokens of cross attention, as CompVis' ``get_learned_conditioning`` makes them.

The networks are those of Transformers and Diffusers. As in the original, no attention mask is used: a prompt is padded
to the encoder's length, and the network attends to the padding too.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusers_ddpm_ext.models.evaluation_mode import evaluation_mode
from diffusers_ddpm_ext.models.plain_operations import ContiguousProducts
from diffusers_ddpm_ext.models.text_encoder_loading import load_text_encoder, load_tokenizer
from diffusers_ddpm_ext.models.text_encoder_saving import encoder_tensors, save_encoder
from diffusers_ddpm_ext.models.text_kinds import UNBOUNDED_LENGTH, architecture, encoder_config, kind_of
from diffusers_ddpm_ext.models.tokenizers import check_tokenizer, checked_prompts, tokenize, tokenizer_facts
from diffusers_ddpm_ext.utils.checks import describe
from diffusers_ddpm_ext.utils.dtensor import full_tensor
from diffusers_ddpm_ext.utils.wrappers import network_class, unwrap

__all__ = ["TextEncoder", "load_text_encoder", "load_tokenizer", "save_encoder"]

logger = logging.getLogger(__name__)


class TextEncoder:
    """A text network and its tokenizer.

    It computes in float32 or more, outside autocast: a network in half precision is cast to float32, which is exact,
    and stays so.

    Args:
        encoder: a ``CLIPTextModel``, ``CLIPTextModelWithProjection``, Diffusers' ``LDMBertModel``, a
            ``T5EncoderModel`` or one of its kinds; wrappers such as ``torch.compile`` are taken off.
        tokenizer: of Transformers; without one there are token ids, and no prompts.

    Raises:
        ValueError: the encoder is of another class, or the tokenizer cannot pad or has ids beyond its table.
    """

    def __init__(self, encoder: nn.Module, tokenizer: Any = None) -> None:
        self._kind = kind_of(encoder)
        self.encoder: Any = unwrap(encoder)
        self.tokenizer = tokenizer
        if tokenizer is not None:
            check_tokenizer(tokenizer, self.vocab_size)
        self._has_warned = False

    # ------------------------------------------------------------------ what it is

    @property
    def kind(self) -> str:
        """Family of the network: "clip", "bert" (`LDMBertModel`) or "t5"."""
        return self._kind.name

    @property
    def width(self) -> int:
        """Width of a token in the output."""
        return int(getattr(encoder_config(self.encoder), self._kind.width))

    @property
    def vocab_size(self) -> int:
        """Rows of the encoder's table of tokens."""
        return int(self.encoder.get_input_embeddings().num_embeddings)

    @property
    def positions(self) -> int | None:
        """The largest number of tokens that the network can take; None where it has no table of positions."""
        key = self._kind.positions
        return None if key is None else int(getattr(encoder_config(self.encoder), key))

    @property
    def max_length(self) -> int:
        """Tokens of a prompt: those of the tokenizer, at most the encoder's positions."""
        limit = UNBOUNDED_LENGTH if self.positions is None else self.positions
        length = getattr(self.tokenizer, "model_max_length", None)
        if length is None or length > (10**9 if self.positions is None else limit):
            return limit
        return int(length)

    # ------------------------------------------------------------------ encoding

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Prompts as token ids, padded to ``max_length`` and cut there; the first prompt cut is named in a warning.

        Args:
            prompts: texts, at least one; "" is the empty prompt.

        Returns:
            (B, max_length), int64, on the CPU.

        Raises:
            ValueError: there is no tokenizer, or the prompts are not texts.
        """
        ids, cut = self.tokenize_and_find_cut(prompts)
        if cut and not self._has_warned:
            self._has_warned = True
            logger.warning("A prompt is longer than %d tokens and is cut there: %s", self.max_length, describe(cut[0]))
        return ids

    def tokenize_and_find_cut(self, prompts: Sequence[str]) -> tuple[Tensor, list[str]]:
        """`tokenize` without a warning: the ids, and the prompts that are longer than ``max_length`` tokens."""
        if self.tokenizer is None:
            raise ValueError(
                "prompts need a tokenizer, and this text encoder has none: pass input_ids or prompt_embeds, or load "
                "the model with tokenizer=."
            )
        return tokenize(self.tokenizer, checked_prompts(prompts), self.max_length)

    def encode(self, input_ids: Tensor, requires_grad: bool = False, check_finite: bool = True) -> Tensor:
        """Token ids as tokens of cross attention: the network's last hidden state, after the final norm.

        Args:
            input_ids: (B, T), integer, in [0, vocab_size).
            requires_grad: train the network: in its own mode and precision, under the caller's autocast, with
                gradients to its weights.
            check_finite: read from the device whether the output is finite (not of a network that is trained).

        Returns:
            (B, T, width), float32 (without ``requires_grad``), on the encoder's device.

        Raises:
            ValueError: the ids have another shape or type, are out of the table, or too many; or the network's output
                is not finite.
        """
        ids = self.checked_ids("input_ids", input_ids).to(self.encoder.device, non_blocking=True)
        if requires_grad:
            tokens: Tensor = self.encoder(input_ids=ids, return_dict=True).last_hidden_state
            return tokens
        self.to_float32()
        with ExitStack() as stack:
            for context in self._exact(ids):
                stack.enter_context(context)
            tokens = self.encoder(input_ids=ids, return_dict=True).last_hidden_state
        if check_finite and not bool(torch.isfinite(tokens).all()):
            raise ValueError("text_encoder returned values that are not finite (NaN or infinity): check its weights.")
        return tokens

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Prompts as tokens of cross attention: `tokenize`, then `encode`.

        Args:
            prompts: texts, at least one.

        Returns:
            (B, max_length, width), float32.

        Raises:
            ValueError: as `tokenize` and `encode`.
        """
        return self.encode(self.tokenize(prompts))

    def checked_ids(self, name: str, input_ids: Any) -> Tensor:
        """Token ids as (B, T), int64.

        Args:
            name: of the argument, for messages.
            input_ids: (B, T), or (T,) for one sample, integer; a list of them, too.

        Raises:
            ValueError: as `encode`.
        """
        try:
            ids = torch.as_tensor(input_ids)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise ValueError(
                f"{name} is {describe(input_ids)}; it must be integers of shape (batch, tokens), every row of the "
                "same length."
            ) from None
        ids = ids[None] if ids.ndim == 1 else ids
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.ndim != 2 or 0 in ids.shape:
            raise ValueError(
                f"{name} has type {ids.dtype} and shape {tuple(ids.shape)}; it must be integers of shape (batch, "
                "tokens)."
            )
        if self.positions is not None and ids.shape[1] > self.positions:
            raise ValueError(
                f"{name} has {ids.shape[1]} tokens per prompt; this text encoder has {self.positions} positions."
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(
                f"{name} has the token {wrong}; this text encoder has the tokens 0..{self.vocab_size - 1}."
            )
        return ids.long()

    def to_float32(self) -> None:
        """Cast a network in half precision, for good."""
        dtype = torch.promote_types(torch.float32, self.encoder.dtype)
        if self.encoder.dtype != dtype:
            self.encoder.to(dtype)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations of the network's layers in its backward pass, with the same gradients to the bit."""
        layers = next(module for module in self.encoder.modules() if isinstance(module, nn.ModuleList))
        for layer in layers:  # Transformers' own way has another name in every version, and none for LDMBertModel
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    def _exact(self, ids: Tensor) -> tuple[AbstractContextManager[Any], ...]:
        """Evaluation mode, without gradients and autocast, and with the products of the original's class."""
        device = ids.device.type
        autocast: Any = nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
        products: Any = ContiguousProducts() if self.kind == "bert" and len(ids) > 1 else nullcontext()
        return torch.no_grad(), autocast, evaluation_mode(self.encoder), products

    # ------------------------------------------------------------------ identity

    def content_hash(self) -> str:
        """sha256 (hex) of what prompts become: class, architecture and weights, and what the tokenizer does.

        Weights in half precision count as their float32 values. It is the same under all versions of Transformers.
        """
        content = hashlib.sha256(f"{network_class(self.encoder).__name__}\n".encode())
        content.update(json.dumps(architecture(self.encoder), sort_keys=True, default=str).encode())
        if self.tokenizer is not None:
            content.update(tokenizer_facts(self.tokenizer, self.max_length).encode())
        for name, tensor in sorted(encoder_tensors(self.encoder).items()):
            tensor = full_tensor(tensor.detach()).cpu()
            tensor = tensor.float() if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
            content.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            content.update(tensor.contiguous().numpy().tobytes())
        return content.hexdigest()

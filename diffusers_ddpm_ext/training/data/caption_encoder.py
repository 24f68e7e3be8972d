"""Tokens of cross attention of a run's captions, by a text encoder that is frozen, or trained with the network.

A frozen encoder gets one caption at a time, like a first stage its images (`posterior`): the tokens of a caption
depend neither on the batch nor on whether they were stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.errors import as_config_error
from diffusers_ddpm_ext.models.conditioning import Conditions
from diffusers_ddpm_ext.models.text_encoder import TextEncoder
from diffusers_ddpm_ext.training.data.captions import CaptionTable
from diffusers_ddpm_ext.training.data.posterior import one_by_one
from diffusers_ddpm_ext.utils.host_reads import reads_are_free

KEPT_BYTES = 2**30
"""Embeddings of captions that are kept in memory."""


class EmbeddingStore(Protocol):
    """Embeddings of all captions, computed before."""

    def load(self, numbers: Tensor) -> Tensor:
        """Return the embeddings of captions (b,), (b, T, width), float32, on the CPU."""


@dataclass
class CaptionEncoder:
    """Turns the numbers of captions into tokens of cross attention.

    Attributes:
        stage: text encoder and tokenizer, on the run's device.
        content_hash: sha256 of both at the start of the run, before the encoder is trained.
        is_trained: whether the encoder is trained with the network.
        keeps_embeddings: whether embeddings of a frozen encoder are kept in memory, once they are encoded.
        table: the captions of the run, set once they are read.
        store: embeddings of all captions, where they were computed before.
    """

    stage: TextEncoder
    content_hash: str
    is_trained: bool = False
    keeps_embeddings: bool = False
    table: CaptionTable | None = None
    store: EmbeddingStore | None = None
    _kept: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @property
    def module(self) -> nn.Module:
        """The network."""
        module: nn.Module = self.stage.encoder
        return module

    @property
    def device(self) -> torch.device:
        """Device of the encoder."""
        return next(self.module.parameters()).device

    def read(self, table: CaptionTable, use_cache: bool) -> None:
        """Take the captions of the run, whose embeddings a frozen encoder keeps if ``use_cache`` and memory allow."""
        self.table = table
        self.keeps_embeddings = use_cache and not self.is_trained and self.nbytes <= KEPT_BYTES

    @property
    def nbytes(self) -> int:
        """Size of the embeddings of all captions."""
        assert self.table is not None
        return 4 * len(self.table) * math.prod(self.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens of a caption, and their width."""
        assert self.table is not None
        return self.table.num_tokens, self.stage.width

    def encode_conditions(self, conditions: Conditions) -> Conditions:
        """Conditions with the tokens of captions, (B, T, width), in place of their numbers.

        Of an encoder that is trained, they have gradients, in the precision of the surrounding autocast.
        """
        if conditions.captions is None:
            return conditions
        return replace(conditions, captions=None, encoder_hidden_states=self._tokens(conditions.captions))

    def encode_numbers(self, numbers: Tensor | Sequence[int], check_finite: bool = True) -> Tensor:
        """Tokens of captions (B,) by a frozen encoder: (B, T, width), float32, on its device.

        Raises:
            ConfigError: a token is not finite, and ``check_finite`` reads that.
        """
        assert self.table is not None
        encode = partial(self.stage.encode, check_finite=check_finite)
        with as_config_error("--text_encoder"):
            return torch.cat(one_by_one(encode, self.table.input_ids(numbers)))

    def _tokens(self, numbers: Tensor) -> Tensor:
        assert self.table is not None
        if self.is_trained:
            return self.stage.encode(self.table.input_ids(numbers), requires_grad=True)
        if self.store is not None:
            return self.store.load(numbers).to(self.device, non_blocking=True)
        wanted = numbers.tolist()
        new = [number for number in dict.fromkeys(wanted) if number not in self._kept]
        check = reads_are_free(self.device)  # on an accelerator the loss is not finite either, and is read later
        rows = self.encode_numbers(new, check).unbind() if new else ()
        encoded = dict(zip(new, rows, strict=True))
        if self.keeps_embeddings:
            self._kept.update(encoded)
        return torch.stack([encoded[number] if number in encoded else self._kept[number] for number in wanted])

"""Conditioning of a network: concatenated inputs, cross attention, class labels and pixel coordinates.

What CompVis' ``DiffusionWrapper`` passes to the network under each ``conditioning_key``:

    key            input                context         labels
    (none)         x
    concat         x, concat_inputs
    crossattn      x                    context
    hybrid         x, concat_inputs     context
    adm            x                                    labels
    hybrid-adm     x, concat_inputs     context         labels
    crossattn-adm  x                    context         labels

Inputs are concatenated along the channels.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from diffusers_ddpm_ext.utils.vocabulary import (
    CLASS_TOKEN_KEYS,
    CONDITIONING_KEYS,
    REQUIRED_CONDITIONS,
    required_conditions,
)

COORDINATE_CHANNELS = 2


@dataclass(frozen=True)
class Conditions:
    """The conditions of a batch; None for each that is absent.

    Attributes:
        class_labels: (B,), integer, or (B, width), floating, for a projected embedding.
        concat_inputs: (B, c, H, W), floating, in the units of the samples.
        encoder_hidden_states: (B, tokens, width), floating.
        captions: (B,), int64, on the CPU: numbers of captions in a table of tokens, until they are encoded.
    """

    class_labels: Tensor | None = None
    concat_inputs: Tensor | None = None
    encoder_hidden_states: Tensor | None = None
    captions: Tensor | None = None

    def as_dict(self) -> dict[str, Tensor]:
        """The conditions that are present, by name."""
        return {item.name: getattr(self, item.name) for item in fields(self) if getattr(self, item.name) is not None}

    def to(self, device: torch.device | str) -> Conditions:
        """The same conditions on a device; the numbers of captions stay on the CPU, where their table is."""
        moved = {name: value for name, value in self.as_dict().items() if name != "captions"}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in moved.items()})

    def pin_memory(self) -> Conditions:
        """The same in page-locked memory, from which copies to a device do not wait; a data loader calls it."""
        return replace(self, **{name: value.pin_memory() for name, value in self.as_dict().items()})

    def with_class_tokens(self, table: Tensor) -> Conditions:
        """The same with tokens in place of class labels: rows of ``table``, (num_classes, dim), one token a sample."""
        assert self.class_labels is not None
        tokens = table.to(self.class_labels.device)[self.class_labels][:, None]
        return replace(self, class_labels=None, encoder_hidden_states=tokens)

    def __getitem__(self, index: Any) -> Conditions:
        """The conditions of a part of the batch."""
        return replace(self, **{name: value[index] for name, value in self.as_dict().items()})


@dataclass(frozen=True)
class Conditioning:
    """How a network receives its conditions.

    Attributes:
        conditioning_key: which conditions it requires, and where they go.
        use_positional_encodings: whether two channels of coordinates come last: the column and the row of each pixel,
            from -1 (left, top) to 1.
        embeds_classes: whether the network itself makes its tokens of cross attention from class labels
            (`ClassTokenUNet`), which it requires in their place.

    Raises:
        ValueError: the key is unknown, or has no tokens that could come from classes.
    """

    conditioning_key: str | None = None
    use_positional_encodings: bool = False
    embeds_classes: bool = False

    def __post_init__(self) -> None:
        key = self.conditioning_key
        if not (key is None or isinstance(key, str)) or key not in REQUIRED_CONDITIONS:
            raise ValueError(
                f"conditioning_key is {self.conditioning_key!r}; it must be None or one of "
                f"{', '.join(CONDITIONING_KEYS)}."
            )
        if not isinstance(self.use_positional_encodings, bool):
            raise ValueError(
                f"use_positional_encodings is {self.use_positional_encodings!r}; it must be true or false."
            )
        if self.embeds_classes and key not in CLASS_TOKEN_KEYS:
            raise ValueError(f"embeds_classes needs conditioning_key {' or '.join(CLASS_TOKEN_KEYS)}, got {key!r}.")

    @property
    def required(self) -> tuple[str, ...]:
        """Names of the conditions that the network requires."""
        return required_conditions(self.conditioning_key, self.embeds_classes)

    @property
    def widens_input(self) -> bool:
        """Whether the network's input has more channels than a sample."""
        return "concat_inputs" in self.required or self.use_positional_encodings

    def check(self, conditions: Conditions) -> None:
        """Refuse missing and unused conditions.

        Raises:
            ValueError: a required condition is missing, or one that the network does not take is present.
        """
        present = conditions.as_dict()
        for name in self.required:
            if name not in present:
                raise ValueError(f"{name} is missing: conditioning_key {self.conditioning_key} needs it.")
        for name in present:
            if name not in self.required:
                raise ValueError(f"{name} is given, but conditioning_key {self.conditioning_key} has no place for it.")

    def __call__(self, xt: Tensor, conditions: Conditions) -> tuple[Tensor, dict[str, Tensor]]:
        """Prepare a call of the network.

        Args:
            xt: noisy samples, (B, C, H, W).
            conditions: exactly the required ones.

        Returns:
            The network's input, and the keyword arguments of the call.

        Raises:
            ValueError: a condition is missing, unused, or of another batch or image size.
        """
        self.check(conditions)
        kwargs = conditions.as_dict()
        for name, value in kwargs.items():
            if len(value) != len(xt):
                raise ValueError(f"{name} has {len(value)} entries for a batch of {len(xt)}; give one per sample.")
        inputs = [xt]
        if "concat_inputs" in kwargs:
            extra = kwargs.pop("concat_inputs")
            if extra.ndim != xt.ndim or extra.shape[2:] != xt.shape[2:]:
                raise ValueError(f"concat_inputs has shape {tuple(extra.shape)}; the samples are {tuple(xt.shape)}.")
            inputs.append(extra.to(xt.dtype))
        if self.use_positional_encodings:
            inputs.append(pixel_coordinates(xt))
        kwargs = {name: value.to(xt.dtype) if value.is_floating_point() else value for name, value in kwargs.items()}
        return torch.cat(inputs, dim=1) if len(inputs) > 1 else xt, kwargs


def pixel_coordinates(like: Tensor) -> Tensor:
    """Column and row of each pixel, from -1 to 1; 0 along an axis of one pixel.

    Args:
        like: (B, C, H, W), floating.

    Returns:
        (B, 2, H, W).
    """
    axes = [
        torch.linspace(-1, 1, size, device=like.device, dtype=like.dtype) if size > 1 else like.new_zeros(1)
        for size in (like.shape[-1], like.shape[-2])
    ]
    columns = axes[0].expand(like.shape[-2], -1)
    rows = axes[1][:, None].expand(-1, like.shape[-1])
    return torch.stack([columns, rows]).expand(len(like), -1, -1, -1)


def classifier_free_guidance(conditional: Tensor, unconditional: Tensor, scale: float, channels: int) -> Tensor:
    """Classifier-free guidance: ``u + s (c - u)`` ([CFG] Ho & Salimans 2022, eq. 6, with s = w + 1).

    Args:
        conditional: the network's output c, (B, C or 2C, H, W).
        unconditional: its output u without the condition.
        scale: s; 1 is the conditional output.
        channels: C; a learned variance in the channels after them stays the conditional one.

    Returns:
        The guided output.
    """
    mean = unconditional[:, :channels] + scale * (conditional[:, :channels] - unconditional[:, :channels])
    return mean if conditional.shape[1] == channels else torch.cat([mean, conditional[:, channels:]], dim=1)

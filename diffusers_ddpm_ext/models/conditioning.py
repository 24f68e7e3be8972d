"""How conditions reach a network: joined to its input, as tokens of cross attention, as labels.

What CompVis' ``DiffusionWrapper`` does under each ``conditioning_key``:

    key            input                context         labels
    (none)         x
    concat         x, concat_inputs
    crossattn      x                    context
    hybrid         x, concat_inputs     context
    adm            x                                    labels
    hybrid-adm     x, concat_inputs     context         labels
    crossattn-adm  x                    context         labels

Inputs are joined along the channels, contexts along the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.utils.vocabulary import CONDITIONING_KEYS

REQUIRED_CONDITIONS: dict[str | None, tuple[str, ...]] = {
    None: (),
    "concat": ("concat_inputs",),
    "crossattn": ("encoder_hidden_states",),
    "hybrid": ("concat_inputs", "encoder_hidden_states"),
    "adm": ("class_labels",),
    "hybrid-adm": ("concat_inputs", "encoder_hidden_states", "class_labels"),
    "crossattn-adm": ("encoder_hidden_states", "class_labels"),
}
COORDINATE_CHANNELS = 2


@dataclass(frozen=True)
class Conditions:
    """What a batch is conditioned on; None for what there is not.

    Attributes:
        class_labels: (B,), integer, or (B, width), floating, for a projected embedding.
        concat_inputs: (B, c, H, W), floating, in the units of the samples.
        encoder_hidden_states: (B, tokens, width), floating.
    """

    class_labels: Tensor | None = None
    concat_inputs: Tensor | None = None
    encoder_hidden_states: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        return {item.name: getattr(self, item.name) for item in fields(self) if getattr(self, item.name) is not None}

    def to(self, device: torch.device | str) -> Conditions:
        """The same on a device."""
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in self.named().items()})

    def __getitem__(self, index: Any) -> Conditions:
        """The conditions of some of the batch."""
        return replace(self, **{name: value[index] for name, value in self.named().items()})

    @property
    def batch(self) -> int | None:
        """Number of samples, None where there are no conditions."""
        return next((len(value) for value in self.named().values()), None)


def check_conditioning_key(conditioning_key: str | None) -> str | None:
    """Return a conditioning key that is known.

    Args:
        conditioning_key: one of `CONDITIONING_KEYS`, or None.

    Raises:
        ValueError: it is none of them.
    """
    if conditioning_key not in REQUIRED_CONDITIONS:
        raise ValueError(
            f"conditioning_key is {conditioning_key!r}; it must be None or one of {', '.join(CONDITIONING_KEYS)}."
        )
    return conditioning_key


@dataclass(frozen=True)
class Conditioning:
    """Puts a batch and its conditions together for a network.

    Attributes:
        conditioning_key: which conditions there are, and where they go.
        use_positional_encodings: whether two channels of coordinates come last: the column and the row of each pixel,
            from -1 (left, top) to 1.
    """

    conditioning_key: str | None = None
    use_positional_encodings: bool = False

    def __post_init__(self) -> None:
        check_conditioning_key(self.conditioning_key)

    def __call__(self, xt: Tensor, conditions: Conditions) -> tuple[Tensor, dict[str, Tensor]]:
        """Join.

        Args:
            xt: noisy samples, (B, C, H, W).
            conditions: exactly those that the key asks for.

        Returns:
            The network's input, and the keyword arguments that it is called with.

        Raises:
            ValueError: a condition is missing, too many, or of another batch or size.
        """
        given, needed = conditions.named(), REQUIRED_CONDITIONS[self.conditioning_key]
        for name in needed:
            if name not in given:
                raise ValueError(f"{name} is missing: conditioning_key {self.conditioning_key} needs it.")
        for name, value in given.items():
            if name not in needed:
                raise ValueError(f"{name} is given, but conditioning_key {self.conditioning_key} has no place for it.")
            if len(value) != len(xt):
                raise ValueError(f"{name} has {len(value)} entries for a batch of {len(xt)}; give one a sample.")
        inputs = [xt]
        if "concat_inputs" in given:
            extra = given.pop("concat_inputs")
            if extra.ndim != xt.ndim or extra.shape[2:] != xt.shape[2:]:
                raise ValueError(f"concat_inputs has shape {tuple(extra.shape)}; the samples are {tuple(xt.shape)}.")
            inputs.append(extra.to(xt.dtype))
        if self.use_positional_encodings:
            inputs.append(pixel_coordinates(xt))
        named = {name: value.to(xt.dtype) if value.is_floating_point() else value for name, value in given.items()}
        return torch.cat(inputs, dim=1) if len(inputs) > 1 else xt, named

    @property
    def is_plain(self) -> bool:
        """Whether the network sees nothing but the samples."""
        return self.conditioning_key is None and not self.use_positional_encodings

    @property
    def widens_input(self) -> bool:
        """Whether the network's input has more channels than a sample."""
        return "concat_inputs" in REQUIRED_CONDITIONS[self.conditioning_key] or self.use_positional_encodings


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


def concatenate_parts(value: Any, axis: int) -> Any:
    """A condition given in parts, as CompVis' dictionaries of lists hold them, as one tensor."""
    if isinstance(value, list | tuple) and value and all(isinstance(part, Tensor) for part in value):
        return torch.cat(list(value), dim=axis)
    return value


class ConditionedDenoiser(nn.Module):
    """A network and the way its conditions are joined to it: CompVis' ``DiffusionWrapper``.

    Args:
        unet: a UNet2DModel, or with context a UNet2DConditionModel.
        conditioning_key: one of `CONDITIONING_KEYS`, or None.
        use_positional_encodings: see `Conditioning`.

    Raises:
        ValueError: the key is not known.
    """

    def __init__(
        self, unet: nn.Module, conditioning_key: str | None = None, use_positional_encodings: bool = False
    ) -> None:
        super().__init__()
        self.unet = unet
        self.conditioning = Conditioning(conditioning_key, use_positional_encodings)

    def forward(
        self,
        xt: Tensor,
        t: Tensor,
        *,
        class_labels: Tensor | None = None,
        concat_inputs: Tensor | Sequence[Tensor] | None = None,
        encoder_hidden_states: Tensor | Sequence[Tensor] | None = None,
    ) -> Any:
        """Denoise.

        Args:
            xt: noisy samples, (B, C, H, W).
            t: steps, (B,), or one for all.
            class_labels: see `Conditions`.
            concat_inputs: see `Conditions`; or several, which are joined along the channels.
            encoder_hidden_states: see `Conditions`; or several, which are joined along the tokens.

        Returns:
            The network's output; ``.sample`` is (B, C or 2C, H, W).

        Raises:
            ValueError: see `Conditioning`.
        """
        conditions = Conditions(
            class_labels, concatenate_parts(concat_inputs, 1), concatenate_parts(encoder_hidden_states, 1)
        )
        inputs, named = self.conditioning(xt, conditions)
        return self.unet(inputs, t, **named)


def classifier_free_guidance(conditional: Tensor, unconditional: Tensor, scale: float, channels: int) -> Tensor:
    """Classifier-free guidance: ``u + s (c - u)`` ([CFG] Ho & Salimans 2022, eq. 6, with s = w + 1).

    Args:
        conditional: the network's output, (B, C or 2C, H, W).
        unconditional: the same without the condition.
        scale: s; 1 is the conditional output.
        channels: C; what lies beyond, a learned variance, stays the conditional one.

    Returns:
        The guided output.
    """
    mean = unconditional[:, :channels] + scale * (conditional[:, :channels] - unconditional[:, :channels])
    return mean if conditional.shape[1] == channels else torch.cat([mean, conditional[:, channels:]], dim=1)

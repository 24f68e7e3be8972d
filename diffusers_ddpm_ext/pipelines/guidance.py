"""Conditions as a caller gives them, and classifier-free guidance while sampling.

Source: [CFG] Ho & Salimans 2022; [interval] Kynkäänniemi et al. 2024 (guidance in a limited interval).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.models.conditioning import (
    REQUIRED_CONDITIONS,
    Conditioning,
    Conditions,
    classifier_free_guidance,
    concatenate_parts,
)

Labels = int | Sequence[int] | Tensor


@dataclass(frozen=True)
class ConditionArguments:
    """Conditions as a caller gives them; see `DDPMExtPipeline.__call__`."""

    class_labels: Labels | None = None
    concat_inputs: Tensor | Sequence[Tensor] | None = None
    encoder_hidden_states: Tensor | Sequence[Tensor] | None = None

    @property
    def batch(self) -> int:
        """Number of samples that they are for; 1 where they do not say."""
        sizes = [1]
        for value, axis in ((self.concat_inputs, 1), (self.encoder_hidden_states, 1)):
            whole = concatenate_parts(value, axis)
            sizes += [len(whole)] if isinstance(whole, Tensor) else []
        labels = self.class_labels
        if isinstance(labels, Sequence) or (isinstance(labels, Tensor) and labels.ndim):
            sizes.append(len(labels))
        return max(sizes)


def network_config(network: nn.Module) -> Mapping[str, Any]:
    """The configuration of a Diffusers network, whose type says nothing of it."""
    config: Any = network.config
    return config


@dataclass(frozen=True)
class ConditionedModel:
    """What a pipeline knows of its conditions.

    Attributes:
        unet: the network.
        conditioning: how conditions are joined.
        class_embedder: (num_classes, dim), where classes become tokens.
        null_class_label: the class that stands for none.
        channels: of a sample.
        device: where the network is.
    """

    unet: nn.Module
    conditioning: Conditioning
    class_embedder: Tensor | None
    null_class_label: int | None
    channels: int
    device: torch.device

    @property
    def embeds_classes(self) -> bool:
        """Whether class labels become encoder_hidden_states."""
        needs = REQUIRED_CONDITIONS[self.conditioning.conditioning_key]
        return self.class_embedder is not None and "encoder_hidden_states" in needs and "class_labels" not in needs

    @property
    def num_classes(self) -> int | None:
        """Number of classes, where labels are numbers."""
        if self.embeds_classes and self.class_embedder is not None:
            return len(self.class_embedder)
        classes: int | None = network_config(self.unet).get("num_class_embeds")
        return classes


def prepare_conditions(given: ConditionArguments, model: ConditionedModel, batch: int) -> Conditions:
    """Bring conditions into the form that a network takes.

    Args:
        given: by a caller.
        model: that they are for.
        batch: number of samples; a condition for one sample is taken for all.

    Returns:
        The conditions, on the model's device.

    Raises:
        ValueError: a label is out of range, or a condition is of another batch.
    """
    labels = None if given.class_labels is None else _labels(given.class_labels, model, batch)
    context = concatenate_parts(given.encoder_hidden_states, 1)
    if labels is not None and context is None and model.embeds_classes:
        assert model.class_embedder is not None
        context, labels = model.class_embedder.to(labels.device)[labels][:, None], None
    return Conditions(
        labels,
        _for_all("concat_inputs", concatenate_parts(given.concat_inputs, 1), batch),
        _for_all("encoder_hidden_states", context, batch),
    ).to(model.device)


def _labels(labels: Labels, model: ConditionedModel, batch: int) -> Tensor:
    table = labels if isinstance(labels, Tensor) else torch.tensor(labels)
    table = table.reshape(1) if table.ndim == 0 else table
    if not table.is_floating_point():
        classes = model.num_classes
        table = table.long()
        if classes is not None and not bool(((table >= 0) & (table < classes)).all()):
            raise ValueError(f"class_labels must lie in 0..{classes - 1}, got {table.flatten().tolist()[:10]}.")
    whole = _for_all("class_labels", table, batch)
    assert whole is not None
    return whole


def _for_all(name: str, value: Tensor | None, batch: int) -> Tensor | None:
    if value is None or len(value) == batch:
        return value
    if len(value) != 1:
        raise ValueError(
            f"{name} has {len(value)} entries, but batch_size is {batch}; give one a sample, or one for all."
        )
    return value.expand(batch, *value.shape[1:])


def unconditional_arguments(
    given: ConditionArguments, model: ConditionedModel, positive: Conditions
) -> ConditionArguments:
    """The counterpart of conditions that stands for none of them.

    Args:
        given: what the caller says of it.
        model: that it is for.
        positive: the conditions.

    Returns:
        ConditionArguments, and else: the null class; zeros for embeddings and concatenated inputs.

    Raises:
        ValueError: there is no null class, and none was given.
    """
    needs = REQUIRED_CONDITIONS[model.conditioning.conditioning_key]
    labels, concat, context = given.class_labels, given.concat_inputs, given.encoder_hidden_states
    by_class = "class_labels" in needs or (model.embeds_classes and context is None)
    if by_class and labels is None:
        if model.null_class_label is None:
            raise ValueError(
                "guidance_scale needs negative_class_labels: this model names no null class (null_class_label). A run "
                "with --conditioning_dropout '{\"class_labels\": 0.1}' trains one."
            )
        labels = model.null_class_label
    if context is None and positive.encoder_hidden_states is not None and not model.embeds_classes:
        context = torch.zeros_like(positive.encoder_hidden_states)
    if concat is None and positive.concat_inputs is not None:
        concat = torch.zeros_like(positive.concat_inputs)
    return ConditionArguments(labels, concat, context)


@dataclass(frozen=True)
class Guidance:
    """Calls a network with its conditions, and where asked for, with and without them.

    Attributes:
        model: the network and how its conditions are joined.
        positive: the conditions.
        negative: what stands for none; None without guidance.
        scale: of guidance.
        interval: lowest and highest step of the chain of training at which there is guidance; None for all.
    """

    model: ConditionedModel
    positive: Conditions
    negative: Conditions | None = None
    scale: float = 1.0
    interval: tuple[float, float] | None = None

    def __call__(self, xt: Tensor, t: Tensor) -> Tensor:
        """Denoise.

        Args:
            xt: (B, C, H, W), in the network's dtype.
            t: a step of the chain of training.

        Returns:
            (B, C or 2C, H, W).
        """
        if self.negative is None or not self._guides(float(t)):
            return self._call(xt, t, self.positive)
        pairs = self.negative.named()
        both = {name: torch.cat([value, pairs[name]]) for name, value in self.positive.named().items()}
        out = self._call(torch.cat([xt, xt]), t, Conditions(**both))
        conditional, unconditional = out.chunk(2)
        return classifier_free_guidance(conditional, unconditional, self.scale, self.model.channels)

    def _guides(self, t: float) -> bool:
        return self.interval is None or self.interval[0] <= t <= self.interval[1]

    def _call(self, xt: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        inputs, named = self.model.conditioning(xt, conditions)
        out: Tensor = self.model.unet(inputs, t, **named, return_dict=False)[0]
        return out


def prepare_guidance(
    model: ConditionedModel,
    given: ConditionArguments,
    negative: ConditionArguments,
    batch: int,
    scale: float = 1.0,
    interval: tuple[float, float] | None = None,
) -> Guidance:
    """Check what a caller asks for.

    Args:
        model: of the pipeline.
        given: the conditions.
        negative: their counterparts.
        batch: number of samples.
        scale: of guidance.
        interval: see `Guidance`.

    Returns:
        The network, ready to be called.

    Raises:
        ValueError: a condition is missing, too many or of another shape; guidance without conditions.
    """
    positive = prepare_conditions(given, model, batch)
    key, needs = model.conditioning.conditioning_key, REQUIRED_CONDITIONS[model.conditioning.conditioning_key]
    for name in needs:
        if name not in positive.named():
            raise ValueError(f"{name} is missing: this model's conditioning_key is {key}.")
    for name in positive.named():
        if name not in needs:
            raise ValueError(
                f"{name} is given, but this model's conditioning_key is {key}, which has no place for it."
            )
    if scale != scale or scale in (float("inf"), float("-inf")):
        raise ValueError(f"guidance_scale is {scale}; it must be a finite number.")
    if interval is not None and not (len(interval) == 2 and interval[0] <= interval[1]):
        raise ValueError(f"guidance_interval is {interval}; it must be two steps, the lower one first.")
    if any(value is not None for value in vars(negative).values()) and scale == 1:
        raise ValueError("negative conditions have no effect at guidance_scale 1: give a scale, or leave them out.")
    if scale == 1:
        return Guidance(model, positive)
    if not needs:
        raise ValueError(f"guidance_scale is {scale}, but this model is unconditional; leave it out.")
    return Guidance(
        model,
        positive,
        prepare_conditions(unconditional_arguments(negative, model, positive), model, batch),
        scale,
        interval,
    )

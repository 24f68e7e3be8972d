"""Conditions of a pipeline call, and classifier-free guidance while sampling.

Source: [CFG] Ho & Salimans 2022; [interval] Kynkäänniemi et al. 2024 (guidance in a limited interval).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.models.conditioning import Conditioning, Conditions, classifier_free_guidance

Labels = int | str | Sequence[int | str] | Tensor


@dataclass(frozen=True)
class ConditionArguments:
    """Conditions as arguments of a pipeline call; see `DDPMExtPipeline.__call__`."""

    class_labels: Labels | None = None
    concat_inputs: Tensor | Sequence[Tensor] | None = None
    encoder_hidden_states: Tensor | Sequence[Tensor] | None = None

    @property
    def batch_size(self) -> int:
        """Number of samples that they are for; 1 where they do not determine it."""
        sizes = [1]
        for value in (_concatenated(self.concat_inputs), _concatenated(self.encoder_hidden_states)):
            sizes += [len(value)] if isinstance(value, Tensor) else []
        labels = self.class_labels
        if isinstance(labels, Sequence) or (isinstance(labels, Tensor) and labels.ndim):
            sizes.append(len(labels))
        return max(sizes)


def network_config(network: nn.Module) -> Mapping[str, Any]:
    """The configuration of a Diffusers network, which the type ``nn.Module`` lacks."""
    config: Any = network.config
    return config


@dataclass(frozen=True)
class ConditionedModel:
    """A pipeline's network and its conditioning.

    Attributes:
        unet: the network.
        conditioning: how the network receives its conditions.
        class_embedder: (num_classes, dim), where classes become tokens of cross attention.
        null_class_label: the class that stands for no class.
        channels: of a sample.
        device: of the network.
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
        required = self.conditioning.required
        return self.class_embedder is not None and "encoder_hidden_states" in required and not self._labels_required

    @property
    def _labels_required(self) -> bool:
        return "class_labels" in self.conditioning.required

    @property
    def num_classes(self) -> int | None:
        """Number of classes, where labels are integers."""
        if self.embeds_classes and self.class_embedder is not None:
            return len(self.class_embedder)
        classes: int | None = network_config(self.unet).get("num_class_embeds")
        return classes

    @property
    def takes_labels(self) -> bool:
        """Whether class labels are an argument, for the network itself or to be embedded."""
        return self._labels_required or self.embeds_classes


def prepare_conditions(arguments: ConditionArguments, model: ConditionedModel, batch_size: int) -> Conditions:
    """Convert arguments to the tensors that a network takes, on its device; one for a single sample is used for all.

    Raises:
        ValueError: a label is out of range, or a condition is of another batch.
    """
    labels = None if arguments.class_labels is None else _labels(arguments.class_labels, model, batch_size)
    context = _concatenated(arguments.encoder_hidden_states)
    if labels is not None and context is None and model.embeds_classes:
        assert model.class_embedder is not None
        context, labels = model.class_embedder.to(labels.device)[labels][:, None], None
    return Conditions(
        labels,
        _expanded("concat_inputs", _concatenated(arguments.concat_inputs), batch_size),
        _expanded("encoder_hidden_states", context, batch_size),
    ).to(model.device)


def _concatenated(value: Any) -> Any:
    """One tensor from a list of them, as CompVis' condition dictionaries hold them: along the channels or tokens."""
    if isinstance(value, list | tuple) and value and all(isinstance(part, Tensor) for part in value):
        return torch.cat(list(value), dim=1)
    return value


def _labels(labels: Labels, model: ConditionedModel, batch_size: int) -> Tensor:
    tensor = labels if isinstance(labels, Tensor) else torch.tensor(labels)
    tensor = tensor.reshape(1) if tensor.ndim == 0 else tensor
    if not tensor.is_floating_point():
        classes = model.num_classes
        tensor = tensor.long()
        if classes is not None and not bool(((tensor >= 0) & (tensor < classes)).all()):
            raise ValueError(f"class_labels must be in 0..{classes - 1}, got {tensor.flatten().tolist()[:10]}.")
    expanded = _expanded("class_labels", tensor, batch_size)
    assert expanded is not None
    return expanded


def _expanded(name: str, value: Tensor | None, batch_size: int) -> Tensor | None:
    if value is None or len(value) == batch_size:
        return value
    if len(value) != 1:
        raise ValueError(
            f"{name} has {len(value)} entries, but batch_size is {batch_size}; give one per sample, or one for all."
        )
    return value.expand(batch_size, *value.shape[1:])


def unconditional_arguments(
    negative: ConditionArguments, model: ConditionedModel, positive: Conditions
) -> ConditionArguments:
    """Complete the negative conditions by the null class, and by zeros for embeddings and concatenated inputs.

    Raises:
        ValueError: the model has no null class, and the caller gave no negative label.
    """
    labels, concat, context = negative.class_labels, negative.concat_inputs, negative.encoder_hidden_states
    if model.takes_labels and labels is None and not (model.embeds_classes and context is not None):
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
    """A network called with its conditions and, for guidance, also with the negative ones.

    Attributes:
        model: the network and its conditioning.
        positive: the conditions.
        negative: the conditions that stand for none; None without guidance.
        scale: of guidance.
        interval: lowest and highest timestep of the training schedule at which there is guidance; None for all.
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
            t: a timestep of the training schedule.

        Returns:
            (B, C or 2C, H, W).
        """
        if self.negative is None or not self._in_interval(float(t)):
            return self._call(xt, t, self.positive)
        negative = self.negative.as_dict()
        both = {name: torch.cat([value, negative[name]]) for name, value in self.positive.as_dict().items()}
        out = self._call(torch.cat([xt, xt]), t, Conditions(**both))
        conditional, unconditional = out.chunk(2)
        return classifier_free_guidance(conditional, unconditional, self.scale, self.model.channels)

    def _in_interval(self, t: float) -> bool:
        return self.interval is None or self.interval[0] <= t <= self.interval[1]

    def _call(self, xt: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        inputs, kwargs = self.model.conditioning(xt, conditions)
        out: Tensor = self.model.unet(inputs, t, **kwargs, return_dict=False)[0]
        return out


def prepare_guidance(
    model: ConditionedModel,
    arguments: ConditionArguments,
    negative: ConditionArguments,
    batch_size: int,
    scale: float = 1.0,
    interval: tuple[float, float] | None = None,
) -> Guidance:
    """Check the conditions and the guidance of a pipeline call; ``interval`` as in `Guidance`.

    Raises:
        ValueError: a condition is missing, unused or of another shape; guidance without conditions.
    """
    positive = prepare_conditions(arguments, model, batch_size)
    model.conditioning.check(positive)
    if not math.isfinite(scale):
        raise ValueError(f"guidance_scale is {scale}; it must be a finite number.")
    if interval is not None and not (len(interval) == 2 and interval[0] <= interval[1]):
        raise ValueError(f"guidance_interval is {interval}; it must be two timesteps, the lower one first.")
    if any(value is not None for value in vars(negative).values()) and scale == 1:
        raise ValueError("negative conditions have no effect at guidance_scale 1: give a scale, or leave them out.")
    if scale == 1:
        return Guidance(model, positive)
    if not model.conditioning.required:
        raise ValueError(f"guidance_scale is {scale}, but this model is unconditional; leave it out.")
    negative = unconditional_arguments(negative, model, positive)
    return Guidance(model, positive, prepare_conditions(negative, model, batch_size), scale, interval)

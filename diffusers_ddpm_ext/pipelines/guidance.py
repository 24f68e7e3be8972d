"""Conditions of a pipeline call, and classifier-free guidance while sampling.

Source: [CFG] Ho & Salimans 2022; [interval] Kynkäänniemi et al. 2024 (guidance in a limited interval).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.models.conditioning import Conditioning, Conditions, classifier_free_guidance
from diffusers_ddpm_ext.models.text_encoder import TextEncoder
from diffusers_ddpm_ext.pipelines.class_names import labels_of_names
from diffusers_ddpm_ext.pipelines.prompts import empty_prompt
from diffusers_ddpm_ext.utils.checks import describe
from diffusers_ddpm_ext.utils.wrappers import unwrap

Labels = int | str | Sequence[int | str] | Tensor


@dataclass(frozen=True)
class ConditionArguments:
    """Conditions as arguments of a pipeline call; see `DDPMExtPipeline.__call__`."""

    class_labels: Labels | None = None
    concat_inputs: Tensor | Sequence[Tensor] | None = None
    encoder_hidden_states: Tensor | Sequence[Tensor] | None = None
    context_name: str = "encoder_hidden_states"
    """The argument that the tokens came from, for messages."""

    @property
    def is_empty(self) -> bool:
        """Whether there is no condition."""
        return self.class_labels is None and self.concat_inputs is None and self.encoder_hidden_states is None

    @property
    def batch_size(self) -> int:
        """Number of samples that they are for; 1 where they do not determine it."""
        sizes = [1]
        for value in (_concatenated(self.concat_inputs), _concatenated(self.encoder_hidden_states), self.class_labels):
            if isinstance(value, (list, tuple)) or (isinstance(value, (Tensor, np.ndarray)) and value.ndim):
                sizes.append(len(value))
        return max(sizes)

    def repeated(self, times: int, size: int) -> ConditionArguments:
        """The same with each entry of the conditions that have ``size`` entries repeated, one after the other."""

        def repeat(value: Any) -> Any:
            if isinstance(value, (Tensor, np.ndarray)):
                value = torch.as_tensor(value)
                return value.repeat_interleave(times, dim=0) if value.ndim and len(value) == size else value
            if isinstance(value, (list, tuple)) and len(value) == size:
                return [entry for entry in value for _ in range(times)]
            return value

        concat, context = _concatenated(self.concat_inputs), _concatenated(self.encoder_hidden_states)
        return ConditionArguments(repeat(self.class_labels), repeat(concat), repeat(context), self.context_name)


def network_config(network: nn.Module) -> Mapping[str, Any]:
    """The configuration of a Diffusers network, which the type ``nn.Module`` lacks."""
    config: Any = unwrap(network).config
    return config


def context_width(config: Mapping[str, Any]) -> int | None:
    """Width of the tokens that a network's cross attention takes; None if it has none, or several."""
    width = config.get("encoder_hid_dim") or config.get("cross_attention_dim")
    widths = set(width) if isinstance(width, list | tuple) else {width}
    return widths.pop() if len(widths) == 1 else None


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
        dtype: of the network.
        class_names: name of a class by its number, where classes have names.
        text: the text encoder, whose empty prompt stands for no text.
    """

    unet: nn.Module
    conditioning: Conditioning
    class_embedder: Tensor | None
    null_class_label: int | None
    channels: int
    device: torch.device
    dtype: torch.dtype = torch.float32
    class_names: Mapping[int, str] = field(default_factory=dict)
    text: TextEncoder | None = None

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


def prepare_conditions(
    arguments: ConditionArguments, model: ConditionedModel, batch_size: int, prefix: str = ""
) -> Conditions:
    """Convert arguments to the tensors that a network takes, on its device; one for a single sample is used for all.

    Args:
        arguments: of the call.
        model: that takes them.
        batch_size: number of samples.
        prefix: of the arguments' names in messages.

    Raises:
        ValueError: a label is unknown or out of range, a condition is of another batch or type, or not finite.
    """
    name, context_name = f"{prefix}class_labels", f"{prefix}{arguments.context_name}"
    labels = None if arguments.class_labels is None else _labels(arguments.class_labels, model, batch_size, name)
    context = _checked(context_name, _concatenated(arguments.encoder_hidden_states), model.dtype)
    if context is not None:
        _check_width(context_name, context, model)
    concat = _checked(f"{prefix}concat_inputs", _concatenated(arguments.concat_inputs), model.dtype)
    if labels is not None and context is None and model.embeds_classes:
        assert model.class_embedder is not None
        context, labels = Conditions(labels).with_class_tokens(model.class_embedder).encoder_hidden_states, None
    return Conditions(
        labels, _expanded(f"{prefix}concat_inputs", concat, batch_size), _expanded(context_name, context, batch_size)
    ).to(model.device)


def _checked(name: str, value: Any, dtype: torch.dtype) -> Any:
    """A tensor of numbers that are finite also in the network's precision."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, or a list of tensors, got {describe(value)}.")
    if value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"{name} must hold real numbers, got {value.dtype}.")
    if value.ndim == 0:
        raise ValueError(f"{name} must have one entry per sample, got a single number.")
    floating = value if value.is_floating_point() else value.float()
    if not bool(torch.isfinite(floating.to(dtype)).all()):
        largest = torch.finfo(dtype).max
        raise ValueError(f"{name} has values that are NaN, infinite, or above {largest:.4g}, the largest of {dtype}.")
    return floating


def _check_width(name: str, context: Tensor, model: ConditionedModel) -> None:
    width = context_width(network_config(model.unet))
    if "encoder_hidden_states" not in model.conditioning.required or width is None:
        return
    if context.ndim != 3 or context.shape[2] != width:
        shape = tuple(context.shape)
        raise ValueError(f"{name} has shape {shape}; the network's cross attention takes (batch, tokens, {width}).")


def _concatenated(value: Any) -> Any:
    """One tensor from a list of them, as CompVis' condition dictionaries hold them: along the channels or tokens."""
    if isinstance(value, list | tuple) and value and all(isinstance(part, Tensor) for part in value):
        return torch.cat(list(value), dim=1)
    return value


def _labels(labels: Any, model: ConditionedModel, batch_size: int, name: str) -> Tensor:
    tensor = _labels_tensor(labels, model, name)
    tensor = tensor.reshape(1) if tensor.ndim == 0 else tensor
    classes = model.num_classes
    if not tensor.is_floating_point():
        if tensor.ndim > 1 and (classes is not None or model.embeds_classes):
            raise ValueError(f"{name} must hold one class per sample, got shape {tuple(tensor.shape)}.")
        tensor = tensor.long()
        if classes is not None and not bool(((tensor >= 0) & (tensor < classes)).all()):
            raise ValueError(f"{name} must be in 0..{classes - 1}, got {tensor.flatten().tolist()[:10]}.")
    elif model.embeds_classes or (classes is not None and tensor.ndim == 1):
        raise ValueError(f"{name} must hold integers, the numbers of classes, got {tensor.dtype}.")
    else:
        tensor = _checked(name, tensor, model.dtype)
    expanded = _expanded(name, tensor, batch_size)
    assert expanded is not None
    return expanded


def _labels_tensor(labels: Any, model: ConditionedModel, name: str) -> Tensor:
    """Class labels as a tensor; texts are names of classes."""
    if isinstance(labels, Tensor):
        if labels.dtype == torch.bool or labels.is_complex():
            raise ValueError(f"{name} must hold integers, the numbers of classes, got {labels.dtype}.")
        return labels
    entries = labels.tolist() if isinstance(labels, np.ndarray) else labels
    entries = labels_of_names(entries, model.class_names)
    flat = entries if isinstance(entries, (list, tuple)) else [entries]
    if not flat or any(isinstance(each, (bool, str)) or each is None for each in flat):
        raise ValueError(f"{name} must be the number or name of a class, or one per sample, got {describe(labels)}.")
    try:
        return torch.as_tensor(entries)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(
            f"{name} must be the number or name of a class, or one per sample, got {describe(labels)}."
        ) from None


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

    With a text encoder there is guidance against the empty prompt, as in CompVis' scripts: concatenated inputs, and
    labels without a null class, are the same on both sides, and embeddings in the place of labels become zeros.

    Raises:
        ValueError: the model has no null class, and the caller gave no negative label.
    """
    labels, concat, context = negative.class_labels, negative.concat_inputs, negative.encoder_hidden_states
    if model.text is not None:
        if context is None:
            context = empty_prompt(model.text)
        if concat is None:
            concat = positive.concat_inputs
        if labels is None and positive.class_labels is not None and model.null_class_label is None:
            given = positive.class_labels
            labels = torch.zeros_like(given) if given.is_floating_point() else given
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
    return ConditionArguments(labels, concat, context, negative.context_name)


@dataclass(frozen=True)
class Guidance:
    """A network called with its conditions and, for guidance, also with the negative ones.

    Attributes:
        model: the network and its conditioning.
        positive: the conditions.
        negative_arguments: those of the caller; what they leave out is completed by what stands for no condition.
        batch_size: number of samples.
        interval: lowest and highest timestep of the training schedule at which there is guidance; None for all.
    """

    model: ConditionedModel
    positive: Conditions
    negative_arguments: ConditionArguments
    batch_size: int
    interval: tuple[float, float] | None = None

    def __call__(self, xt: Tensor, t: Tensor, scale: float) -> Tensor:
        """Denoise.

        Args:
            xt: (B, C, H, W), in the network's dtype.
            t: a timestep of the training schedule.
            scale: of guidance; 1 is none.

        Returns:
            (B, C or 2C, H, W).

        Raises:
            ValueError: there is guidance, but nothing that stands for no condition.
        """
        if scale == 1 or not self._in_interval(t):
            return self._call(xt, t, self.positive)
        positive, negative = self.positive.as_dict(), self.negative.as_dict()
        if any(value.shape[1:] != negative[name].shape[1:] for name, value in positive.items()):  # other tokens
            conditional, unconditional = self._call(xt, t, self.positive), self._call(xt, t, self.negative)
            return classifier_free_guidance(conditional, unconditional, scale, self.model.channels)
        both = {name: torch.cat([value, negative[name]]) for name, value in positive.items()}
        out = self._call(torch.cat([xt, xt]), t, Conditions(**both))
        conditional, unconditional = out.chunk(2)
        return classifier_free_guidance(conditional, unconditional, scale, self.model.channels)

    @cached_property
    def negative(self) -> Conditions:
        """The conditions that stand for none."""
        if not self.model.conditioning.required:
            raise ValueError("guidance_scale is not 1, but this model is unconditional; leave it out.")
        arguments = unconditional_arguments(self.negative_arguments, self.model, self.positive)
        return prepare_conditions(arguments, self.model, self.batch_size, "negative_")

    def _in_interval(self, t: Tensor) -> bool:
        # Without an interval the step is not read: that would wait for the device.
        return self.interval is None or self.interval[0] <= float(t) <= self.interval[1]

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
    if not negative.is_empty and scale == 1:
        raise ValueError("negative conditions have no effect at guidance_scale 1: give a scale, or leave them out.")
    guidance = Guidance(model, positive, negative, batch_size, interval)
    if scale != 1:
        model.conditioning.check(guidance.negative)
    return guidance
